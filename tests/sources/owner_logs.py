"""Logs of one funnel as different owners write them, and what their columns are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

REQUESTS, CANDIDATES, PASSED, SHOWN = 240, 40, 16, 6
USERS, ITEMS, SESSIONS = 60, 300, 120
SIZES = (CANDIDATES, PASSED, SHOWN)
Columns = dict[str, Any]


class OwnerLog(NamedTuple):
    """A log, and the config that it should get."""

    write: Callable[[Path], str]  # into a folder; returns `data.path`
    roles: dict[str, str]  # key of the config -> its value, with tasks called as their labels
    features: dict[str, str]  # column -> its owner, of those that no name has to settle
    # Columns that tell the answer: never a feature.
    outcomes: set[str]
    sizes: tuple[int, int, int] = SIZES


def simulate(seed: int = 0) -> Columns:
    """Return a row per candidate: number of request, user, item; scores, place and outcomes."""
    rng = np.random.default_rng(seed)
    row = np.repeat(np.arange(REQUESTS), CANDIDATES)
    session = np.sort(rng.integers(SESSIONS, size=REQUESTS))
    user = rng.integers(USERS, size=SESSIONS)[session]
    # The requests of a session follow each other within minutes.
    minutes = 600 * session + rng.integers(1, 9, size=REQUESTS).cumsum() % 500
    items = [rng.choice(ITEMS, CANDIDATES, replace=False) for _ in range(REQUESTS)]
    item = np.concatenate(items)
    taste, quality = rng.normal(size=(USERS, 4)), rng.normal(size=(ITEMS, 4))
    logit = (taste[user[row]] * quality[item]).sum(axis=1) - 0.5
    early = 1 / (1 + np.exp(-(logit + 1.5 * rng.normal(size=len(row)))))
    is_passed = _place(-early, row) < PASSED
    final = {}
    for task, shift in (("first", 0.5), ("second", -1.5)):
        noisy = logit + shift + 0.4 * rng.normal(size=len(row))
        final[task] = np.where(is_passed, 1 / (1 + np.exp(-noisy)), np.nan)
    place = _place(np.nan_to_num(-final["first"], nan=9.0), row)
    is_shown = place < SHOWN
    columns = {
        "request": row, "session": session[row], "user": user[row], "item": item,
        "minutes": minutes[row], "early": early, "passed": is_passed, "shown": is_shown,
        "place": place,
    }  # fmt: skip
    for task, probability in final.items():
        columns[f"final_{task}"] = probability
        columns[task] = rng.random(len(row)) < np.nan_to_num(probability)
    columns["dwell"] = rng.gamma(2.0, 20.0, size=len(row)) * (1 + columns["first"])
    columns["discount"] = rng.integers(0, 30, size=len(row))
    return columns


def _place(keys: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return the place of each candidate in its request, from 0, by ascending keys."""
    place = np.empty(len(row), int)
    place[np.lexsort([keys, row])] = np.tile(np.arange(CANDIDATES), REQUESTS)
    return place


def _only(values: Any, where: np.ndarray) -> list[Any]:
    """Return values as a list, with None elsewhere."""
    return [value if known else None for value, known in zip(values, where, strict=True)]


def _of(owner: np.ndarray, values: list[Any] | np.ndarray) -> np.ndarray:
    """Return the value of each row's owner, in turn."""
    return np.asarray(values)[owner % len(values)]


def _write_requests(file: Path, of_requests: Columns, of_candidates: Columns) -> str:
    """Write a row per request, with the values of its candidates as lists; returns the path."""
    starts = pa.array(np.arange(0, REQUESTS * CANDIDATES + 1, CANDIDATES, dtype=np.int32))
    lists = {
        name: pa.ListArray.from_arrays(starts, pa.array(values))
        for name, values in of_candidates.items()
    }
    pq.write_table(pa.table(of_requests | lists), file)
    return str(file)


def french_csv(folder: Path) -> str:
    """A shop's CSV in any order: texts as ids, true and false, a session, a price for each."""
    log = simulate(1)
    rng = np.random.default_rng(1)
    request, user, item, shown = log["request"], log["user"], log["item"], log["shown"]
    base = rng.integers(5, 90, size=ITEMS)
    start = pd.Timestamp("2025-03-01 08:00:00")
    etat = np.where(shown, "vu", np.where(log["passed"], "garde", "ecarte"))
    columns = {
        "visite": [f"v{number:04d}" for number in log["session"]],
        "recherche": [f"r-{number:05d}" for number in request],
        "horaire": start + pd.to_timedelta(log["minutes"], unit="min"),
        "acheteur": [f"c{number:03d}" for number in user],
        "ref": [f"SKU{number:05d}X" for number in item],
        "rayon": _of(item, ["livres", "jeux", "musique", "films", "maison"]),
        "marque": [f"marque {number % 37}" for number in item],
        "tranche": _of(user, ["18-25", "26-40", "41-60", "61+"]),
        "magasin": "en ligne",
        "prix vu": base[item] * (1 - log["discount"] / 100),
        "rapide": log["early"],
        "notation": log["final_first"],
        "etat": etat,
        "rang affiche": _only(log["place"] + 1, shown),
        "clic": _only(log["first"], shown),
        "secondes": _only(log["dwell"].round(1), shown),
    }
    frame = pd.DataFrame(columns).sample(frac=1, random_state=0)
    frame.to_csv(folder / "boutique.csv", index=False)
    return str(folder / "boutique.csv")


FRENCH = OwnerLog(
    french_csv,
    {
        "data.rows": "candidate",
        "data.columns.request": "recherche", "data.columns.time": "horaire",
        "data.columns.user": "acheteur", "data.columns.item": "ref",
        "data.columns.stage": "etat", "data.columns.position": "rang affiche",
        "data.stages.shown": "vu", "data.stages.passed": "garde", "data.stages.retrieved": "ecarte",
        "data.columns.incumbent": "rapide",
        "data.labels.clic": "clic", "data.teacher.clic": "notation",
    },
    {"rayon": "item", "marque": "item", "tranche": "user"},
    {"etat", "rang affiche", "clic", "secondes", "notation", "rapide"},
)  # fmt: skip


def polish_lists(folder: Path) -> str:
    """A Parquet file with a row per request, lists of candidates, and milliseconds."""
    log = simulate(2)
    rng = np.random.default_rng(2)
    shown, passed = log["shown"], log["passed"]
    seen = [rng.choice(ITEMS, size=rng.integers(3, 9)) for _ in range(REQUESTS)]
    of_candidates = {
        "oferty": [f"o{number}" for number in log["item"]],
        "dzial": log["item"] % 11,
        "wstepnie": log["early"],
        "wynik": _only(log["final_first"], passed),
        "kolejnosc": _only(log["place"], shown),
        "otwarte": _only(log["first"].astype(int), shown),
        "cena": (20 + log["item"] % 17) * (1 - log["discount"] / 100),
        "patrzyl": _only(log["dwell"], shown),
    }
    first = slice(None, None, CANDIDATES)
    of_requests = {
        "zapytanie": [f"{number:08x}" for number in rng.permutation(10**6)[:REQUESTS]],
        "kiedy": 1_740_000_000_000 + 60_000 * log["minutes"][first],
        "kto": 700 + log["user"][first],
        "wiek": _of(log["user"][first], rng.integers(15, 80, size=USERS)),
        "ekran": _of(np.arange(REQUESTS), ["telefon", "komputer"]),
        "ostatnie": [[f"o{number}" for number in numbers] for numbers in seen],
    }
    return _write_requests(folder / "oferty.parquet", of_requests, of_candidates)


POLISH = OwnerLog(
    polish_lists,
    {
        "data.rows": "request",
        "data.columns.request": "zapytanie", "data.columns.time": "kiedy",
        "data.columns.user": "kto", "data.columns.item": "oferty",
        "data.columns.position": "kolejnosc", "data.columns.incumbent": "wstepnie",
        "data.labels.otwarte": "otwarte", "data.teacher.otwarte": "wynik",
        "data.time_unit": "ms",
    },
    {"dzial": "item", "wiek": "user", "ekran": "context", "ostatnie": "user"},
    {"wynik", "kolejnosc", "otwarte", "patrzyl", "wstepnie"},
)  # fmt: skip


def english_folder(folder: Path) -> str:
    """Three Parquet files in any order: times as text, 0 where not shown, and two tasks."""
    log = simulate(3)
    rng = np.random.default_rng(3)
    shown, item, user = log["shown"], log["item"], log["user"]
    uuids = [f"{number:032x}" for number in rng.permutation(10**7)[:REQUESTS]]
    start = pd.Timestamp("2025-06-01")
    times = (start + pd.to_timedelta(log["minutes"], unit="min")).strftime("%Y-%m-%dT%H:%M:%SZ")
    columns = {
        "visit": log["session"] + 5_000,
        "page_load": _of(log["request"], uuids),
        "at": times,
        "person": user + 90,
        "thing": item + 1_000_000,
        "blurb": [f"a few words on thing number {number}" for number in item],
        "shelf": item % 13,
        "heft": _of(item, rng.gamma(2.0, 1.0, size=ITEMS)),
        "tenure": _of(user, rng.integers(0, 4_000, size=USERS)),
        "hop": 1,
        "offer": (9 + item % 17) * (1 - log["discount"] / 100),
        "lvl": np.where(shown, 2, log["passed"].astype(int)),
        "m_a": log["final_first"],
        "m_b": log["final_second"],
        "opened": (log["first"] & shown).astype(int),
        "saved": (log["second"] & shown).astype(int),
        "gaze": np.where(shown, log["dwell"], np.nan),
    }
    frame = pd.DataFrame(columns).sample(frac=1, random_state=0)
    (folder / "feed").mkdir()
    for part in range(3):
        frame[part::3].to_parquet(folder / f"feed/{part}.parquet", index=False)
    return str(folder / "feed")


ENGLISH = OwnerLog(
    english_folder,
    {
        "data.rows": "candidate",
        "data.columns.request": "page_load", "data.columns.time": "at",
        "data.columns.user": "person", "data.columns.item": "thing", "data.columns.stage": "lvl",
        "data.stages.shown": "2", "data.stages.passed": "1", "data.stages.retrieved": "0",
        "data.labels.opened": "opened", "data.labels.saved": "saved",
        "data.teacher.opened": "m_a", "data.teacher.saved": "m_b",
    },
    {"shelf": "item", "heft": "item", "tenure": "user"},
    {"lvl", "m_a", "m_b", "opened", "saved", "gaze"},
)  # fmt: skip


def german_shown(folder: Path) -> str:
    """A CSV of the shown candidates only, with a score for each and a label of 0 and 1."""
    log = simulate(4)
    shown = log["shown"]
    item, user = log["item"], log["user"]
    columns = {
        "Aufruf": log["request"] + 1,
        "Moment": 1_750_000_000 + 60 * log["minutes"],
        "Leserin": user + 17,
        "Beitrag": item + 4_000,
        "Ressort": _of(item, ["Politik", "Sport", "Kultur", "Wissen"]),
        "Abo": _of(user, ["ja", "nein", "probe"]),
        "Reihe": log["place"] + 1,
        "Wertung": log["final_first"],
        "gelesen": log["first"].astype(int),
    }
    pd.DataFrame(columns)[shown].to_csv(folder / "zeitung.csv", index=False, sep=";")
    return str(folder / "zeitung.csv")


GERMAN = OwnerLog(
    german_shown,
    {
        "data.rows": "candidate",
        "data.columns.request": "Aufruf", "data.columns.time": "Moment",
        "data.columns.user": "Leserin", "data.columns.item": "Beitrag",
        "data.columns.position": "Reihe",
        "data.labels.gelesen": "gelesen", "data.teacher.gelesen": "Wertung",
    },
    {"Ressort": "item", "Abo": "user"},
    {"Reihe", "Wertung", "gelesen"},
    (SHOWN, SHOWN, SHOWN),
)  # fmt: skip


def swedish_json(folder: Path) -> str:
    """JSON lines of passed and shown candidates: a flag of the shown, a score for all."""
    log = simulate(5)
    rng = np.random.default_rng(5)
    shown, passed, item, user = log["shown"], log["passed"], log["item"], log["user"]
    start = pd.Timestamp("2024-11-05 12:00")
    columns = {
        "fraga": [f"q{number}" for number in log["request"]],
        "klockan": (start + pd.to_timedelta(log["minutes"], unit="min")).astype(str),
        "lyssnare": [f"u-{number}" for number in user],
        "spar": [f"t-{number}" for number in item],
        "artist": [f"a-{number % 80}" for number in item],
        "tempo": _of(item, rng.normal(120, 20, size=ITEMS).round(1)),
        "land": _of(user, ["se", "no", "fi"]),
        "visad": shown,
        "modell": log["final_first"],
        "spelad": _only(log["first"], shown),
        "gillad": _only(log["second"], shown),
        "sekunder": _only(log["dwell"].round(), shown),
    }
    frame = pd.DataFrame(columns)[passed].sample(frac=1, random_state=0)
    frame.to_json(folder / "spelning.jsonl", orient="records", lines=True)
    return str(folder / "spelning.jsonl")


SWEDISH = OwnerLog(
    swedish_json,
    {
        "data.rows": "candidate",
        "data.columns.request": "fraga", "data.columns.time": "klockan",
        "data.columns.user": "lyssnare", "data.columns.item": "spar", "data.columns.stage": "visad",
        "data.stages.shown": "True", "data.stages.passed": "False",
        "data.labels.spelad": "spelad", "data.labels.gillad": "gillad",
        "data.teacher.spelad": "modell",
    },
    {"artist": "item", "tempo": "item", "land": "user"},
    {"visad", "modell", "spelad", "gillad", "sekunder"},
    (PASSED, PASSED, SHOWN),
)  # fmt: skip


def terse_lists(folder: Path) -> str:
    """A Parquet file with lists, short names, codes of stages, and scores on a scale of their own.

    Candidates that were not shown have position -1, label 0 and no seconds.
    """
    log = simulate(6)
    rng = np.random.default_rng(6)
    shown, passed, item = log["shown"], log["passed"], log["item"]
    logit = np.log(log["final_first"]) - np.log1p(-log["final_first"])
    of_candidates = {
        "vids": 7 * 10**15 + item * 131_071,
        "lr_s": np.log(log["early"]) - np.log1p(-log["early"]),
        "hr_s": _only(logit, passed),
        "stg": (passed.astype(int) + shown).astype(np.int8),
        "slot": np.where(shown, log["place"], -1).astype(np.int16),
        "lk": (log["first"] & shown).astype(np.int8),
        "wt_s": np.where(shown, log["dwell"], 0.0),
        "dur_s": _of(item, rng.integers(5, 120, size=ITEMS)),
        "lng": _of(item, ["en", "de", "hi", "es", "ja"]),
        "upl_age_h": (item % 211) + log["minutes"] / 60,
    }
    first = slice(None, None, CANDIDATES)
    of_requests = {
        "qid": 10**17 + np.arange(REQUESTS) * 131_071,
        "uid": 88 * 10**12 + log["user"][first],
        "ts_ms": 1_718_000_000_000 + 60_000 * log["minutes"][first],
        "dev": _of(np.arange(REQUESTS) // 3, ["ios", "android", "tv", "web"]),
        "ctry": _of(log["user"][first], ["US", "DE", "IN", "MX", "JP"]),
    }
    return _write_requests(folder / "vfeed.parquet", of_requests, of_candidates)


TERSE = OwnerLog(
    terse_lists,
    {
        "data.rows": "request",
        "data.columns.request": "qid", "data.columns.time": "ts_ms",
        "data.columns.user": "uid", "data.columns.item": "vids", "data.columns.stage": "stg",
        "data.columns.position": "slot", "data.columns.incumbent": "lr_s",
        "data.stages.shown": "2", "data.stages.passed": "1", "data.stages.retrieved": "0",
        "data.labels.lk": "lk", "data.teacher.lk": "hr_s",
        "data.time_unit": "ms",
    },
    {"dur_s": "item", "lng": "item", "ctry": "user", "dev": "context"},
    {"lr_s", "hr_s", "stg", "slot", "lk", "wt_s"},
)  # fmt: skip


def italian_json(folder: Path) -> str:
    """JSON lines, compressed: days before months, texts as ids, no stage, and a model's version."""
    log = simulate(7)
    rng = np.random.default_rng(7)
    shown, passed, item, user = log["shown"], log["passed"], log["item"], log["user"]
    # Eight days of March: their numbers may be months as well.
    times = pd.Timestamp("2024-03-04 06:00") + pd.to_timedelta(log["minutes"] / 7, unit="min")
    columns = {
        "cod_ric": [f"{number * 7919:08x}" for number in log["request"]],
        "quando": times.strftime("%d/%m/%Y %H:%M:%S"),
        "cod_cand": [f"C{number:06d}" for number in user],
        "cod_off": [f"off-{number * 131_071:08x}" for number in item],
        "nota_pre": np.log(log["early"]) - np.log1p(-log["early"]),
        "pb_fin": _only(log["final_first"].round(5), passed),
        "pos_scherm": _only(log["place"] + 1, shown),
        "aperto": _only(log["first"].astype(int), shown),
        "sec_lett": _only(log["dwell"].round(1), shown),
        "canale": _of(log["request"], ["app", "web", "posta"]),
        "settore": _of(user, ["edilizia", "sanita", "vendite", "logistica"]),
        "citta_off": _of(item, ["Milano", "Roma", "Torino", "Napoli", "Bari"]),
        "paga": _of(item, rng.normal(2300, 350, size=ITEMS).round()),
        "ver_mod": np.where(log["request"] < REQUESTS // 2, "mf-3.1", "mf-3.2"),
    }
    frame = pd.DataFrame(columns).sample(frac=1, random_state=0)
    for part in range(2):
        file = folder / f"ricerche{part}.jsonl.gz"
        frame[part::2].to_json(file, orient="records", lines=True)
    return str(folder / "ricerche*.jsonl.gz")


ITALIAN = OwnerLog(
    italian_json,
    {
        "data.rows": "candidate",
        "data.columns.request": "cod_ric", "data.columns.time": "quando",
        "data.columns.user": "cod_cand", "data.columns.item": "cod_off",
        "data.columns.position": "pos_scherm", "data.columns.incumbent": "nota_pre",
        "data.columns.teacher_version": "ver_mod",
        "data.labels.aperto": "aperto", "data.teacher.aperto": "pb_fin",
        "data.time_format": "%d/%m/%Y %H:%M:%S",
    },
    {"canale": "context", "settore": "user", "citta_off": "item", "paga": "item"},
    {"nota_pre", "pb_fin", "pos_scherm", "aperto", "sec_lett", "ver_mod"},
)  # fmt: skip

OWNERS = {
    "french": FRENCH, "polish": POLISH, "english": ENGLISH, "german": GERMAN, "swedish": SWEDISH,
    "terse": TERSE, "italian": ITALIAN,
}  # fmt: skip
