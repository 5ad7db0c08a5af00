"""First configs of folders that hold a log as several tables."""

import json
import uuid
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest

import kd_ranker as kd
from tests.sources import owner_logs
from tests.sources.logs.test_infer import (
    check_of,
    features_of,
    infer,
    left_out,
    roles_of,
)

_DAYS = 3


@pytest.fixture
def tables() -> dict[str, pd.DataFrame]:
    """Tables of one funnel: candidates, their requests, users, items and events."""
    log = owner_logs.simulate(8)
    rng = np.random.default_rng(8)
    item, request, shown = log["item"], log["request"], log["shown"]
    first = slice(None, None, owner_logs.CANDIDATES)
    # The retrieval dropped some candidates, so that requests differ in the number passed.
    kept = rng.random(len(item)) < 0.9
    candidates = pd.DataFrame(
        {
            "req": [f"r{number}" for number in request],
            "article": [f"a{number}" for number in item],
            "prescore": log["early"],
            "reached": np.where(shown, "page", np.where(log["passed"], "heavy", "light")),
            "bigscore": np.where(log["passed"], log["final_first"], np.nan),
            "placed": np.where(shown, log["place"] + 1, np.nan),
        }
    )[kept]
    num_passed = candidates.groupby("req", sort=False)["bigscore"].count()
    requests = pd.DataFrame(
        {
            "req": num_passed.index,
            "ts": pd.Timestamp("2025-06-01") + pd.to_timedelta(log["minutes"][first], unit="min"),
            "reader": log["user"][first] + 40,
            "screen": rng.choice(["phone", "desk"], size=owner_logs.REQUESTS),
            "sent_on": num_passed.to_numpy(),
        }
    )
    readers = pd.DataFrame({"reader": np.arange(owner_logs.USERS) + 40})
    readers["plan"] = rng.choice(["free", "paid", "trial"], size=owner_logs.USERS)
    articles = pd.DataFrame({"article": [f"a{number}" for number in range(owner_logs.ITEMS)]})
    articles["desk"] = rng.choice(["sport", "world", "arts"], size=owner_logs.ITEMS)
    # The events copy the stage, which is no type of event.
    keys = candidates[["req", "article", "reached"]]
    # Impressions are logged by the screen: not all that was shown was seen.
    is_seen = shown[kept] & (rng.random(len(keys)) < 0.9)
    is_open, is_saved = (log[task][kept] & shown[kept] for task in ("first", "second"))
    events = pd.concat(
        [
            keys[is_seen].assign(kind="impression"),
            keys[is_open].assign(kind="open"),
            keys[is_open].assign(kind="open"),  # some are written twice
            keys[is_saved].assign(kind="save"),
        ]
    ).sample(frac=1, random_state=0)
    return {
        "candidates": candidates, "requests": requests, "readers": readers, "articles": articles,
        "events": events,
    }  # fmt: skip


def write(tables: dict[str, pd.DataFrame], folder: Path) -> str:
    """Write each table in a form of its own, the candidates by day; returns the folder."""
    request, _ = pd.factorize(tables["candidates"]["req"])
    for day in range(_DAYS):
        part = folder / f"candidates/dt=2025-06-0{day + 1}"
        part.mkdir(parents=True)
        of_day = tables["candidates"][request % _DAYS == day]
        of_day.to_parquet(part / "part.parquet", index=False)
    tables["requests"].to_parquet(folder / "requests.parquet", index=False)
    tables["readers"].to_csv(folder / "readers.csv", index=False)
    tables["articles"].to_csv(folder / "articles.csv", index=False)
    (folder / "events").mkdir()
    file = folder / "events/all.jsonl.gz"
    tables["events"].to_json(file, orient="records", lines=True)
    (folder / "_delta_log").mkdir()
    (folder / "_delta_log/0.json").write_text('{"rows": 1}')
    return str(folder)


@pytest.fixture
def inferred(tables: dict[str, pd.DataFrame], tmp_path: Path) -> tuple[str, Any]:
    return infer(tmp_path, write(tables, tmp_path / "log"))


def test_the_tables_give_the_roles(inferred):
    text, config = inferred
    roles = roles_of(config)
    # Which of two alike tasks the score predicts is for the owner to say.
    scored = [key for key, column in roles.items() if column == "bigscore"]
    assert len(scored) == 1
    assert scored[0].startswith("data.teacher.")
    assert "# CHECK: by its values; is it the final ranker's score of" in text
    del roles[scored[0]]
    tasks = {column: task for task, column in config.data.labels.items()}
    assert roles == {
        "data.rows": "candidate",
        "data.columns.request": "req", "data.columns.time": "ts", "data.columns.user": "reader",
        "data.columns.item": "article", "data.columns.position": "placed",
        "data.columns.stage": "reached", "data.stages.shown": "page",
        "data.stages.passed": "heavy", "data.stages.retrieved": "light",
        "data.columns.incumbent": "prescore",
        f"data.labels.{tasks['open']}": "open", f"data.labels.{tasks['save']}": "save",
    }  # fmt: skip
    assert check_of(text, "data.sql") == (
        "is each row of 'candidates' a candidate, and are the tables joined right?"
    )


def test_features_come_from_every_table(inferred):
    _, config = inferred
    assert features_of(config) == {
        "screen": ("context", "category"), "plan": ("user", "category"),
        "desk": ("item", "category"),
    }  # fmt: skip


def test_what_was_shown_is_no_label_and_a_count_of_the_passed_no_feature(inferred):
    text, _ = inferred
    assert left_out(text)["sent_on"] == "the number of passed candidates of the request"
    assert "impression" in left_out(text)


def test_the_select_has_a_row_per_candidate(tables, inferred, tmp_path):
    _, config = inferred
    config.data.dir, config.data.allow = str(tmp_path / "data"), ("few_positives", "one_candidate")
    prepared = kd.prepare(config)
    report = json.loads((prepared.directory / "data_report.json").read_text())
    assert report["candidates"]["used"] == len(tables["candidates"])


def test_a_type_of_event_is_1_where_there_is_one_and_0_elsewhere(tables, inferred):
    _, config = inferred
    rows = duckdb.sql(config.data.sql).df()
    has_saved = rows.set_index(["req", "article"])["save"].sort_index()
    candidates, events = tables["candidates"], tables["events"]
    saved = events[events["kind"] == "save"].set_index(["req", "article"]).index
    expected = candidates.set_index(["req", "article"]).index.isin(saved)
    by_key = pd.Series(expected, candidates.set_index(["req", "article"]).index).sort_index()
    assert 0 < by_key.sum() < len(by_key)
    assert has_saved.tolist() == by_key.astype(float).tolist()


def test_parts_of_one_table_are_the_usual_log(tmp_path):
    folder = owner_logs.english_folder(tmp_path)
    _, config = infer(tmp_path, folder)
    assert not config.data.sql
    assert config.data.path == folder


def test_numbered_files_beside_others_are_one_table(tables, tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    candidates = tables["candidates"]
    candidates[:5000].to_parquet(folder / "scored-9.parquet", index=False)
    candidates[5000:].to_parquet(folder / "scored-10.parquet", index=False)
    tables["events"].to_parquet(folder / "scored-events.parquet", index=False)
    tables["requests"].to_csv(folder / "requests.csv", index=False)
    _, config = infer(tmp_path, str(folder))
    assert len(duckdb.sql(config.data.sql)) == len(candidates)
    assert {*config.data.labels.values()} == {"open", "save"}


@pytest.mark.parametrize("others", [lambda number: -number, lambda number: f"other {number}"])
def test_a_table_without_a_common_key_is_not_joined(tables, tmp_path, others):
    tables["readers"]["reader"] = tables["readers"]["reader"].map(others)
    text, config = infer(tmp_path, write(tables, tmp_path / "log"))
    assert check_of(text, "data.sql").endswith("Not joined: readers.")
    assert "plan" not in features_of(config)


def test_a_table_with_a_repeated_key_is_not_joined(tables, tmp_path):
    tables["articles"] = pd.concat([tables["articles"], tables["articles"].iloc[:1]])
    text, config = infer(tmp_path, write(tables, tmp_path / "log"))
    assert check_of(text, "data.sql").endswith("Not joined: articles.")
    assert "desk" not in features_of(config)


def _with_sparse_articles(tables: dict[str, pd.DataFrame]) -> None:
    """Number the articles as a database does that other tables share."""
    for name in ("candidates", "articles", "events"):
        numbers = tables[name]["article"].str[1:].astype(int)
        tables[name]["article"] = 70_000_000 + 9973 * numbers


def test_the_same_ids_join_under_other_names(tables, tmp_path):
    """The events are of another system, which writes the ids of articles as texts.

    Texts that are UUIDs have a type of their own when they are read from JSON.
    """
    _with_sparse_articles(tables)
    for name in ("candidates", "requests", "events"):
        numbers = tables[name]["req"].str[1:].astype(int)
        tables[name]["req"] = [str(uuid.UUID(int=10**30 + number)) for number in numbers]
    events = tables["events"].rename(columns={"req": "searchId", "article": "adId"})
    events["adId"] = events["adId"].astype(str)
    tables["events"] = events
    tables["articles"] = tables["articles"].rename(columns={"article": "number"})
    text, config = infer(tmp_path, write(tables, tmp_path / "log"))
    assert "Not joined" not in check_of(text, "data.sql")
    assert features_of(config)["desk"] == ("item", "category")
    rows = duckdb.sql(config.data.sql).df()
    saved = set(events.loc[events["kind"] == "save", ["searchId", "adId"]].itertuples(index=False))
    expected = [
        (request, str(article)) in saved
        for request, article in zip(rows["req"], rows["article"], strict=True)
    ]
    assert 0 < sum(expected) < len(rows) == len(tables["candidates"])
    assert rows["save"].astype(bool).tolist() == expected


def test_names_of_keys_may_differ_in_case(tables, tmp_path):
    tables["readers"] = tables["readers"].rename(columns=str.upper)
    text, config = infer(tmp_path, write(tables, tmp_path / "log"))
    assert "Not joined" not in check_of(text, "data.sql")
    assert features_of(config)["PLAN"] == ("user", "category")


def test_small_numbers_of_other_names_do_not_join(tables, tmp_path):
    """The desk of a number is of articles, and says nothing on a reader with this number."""
    desks = tables["articles"].assign(number=np.arange(owner_logs.ITEMS)).drop(columns="article")
    tables["articles"] = desks
    text, config = infer(tmp_path, write(tables, tmp_path / "log"))
    assert check_of(text, "data.sql").endswith("Not joined: articles.")
    assert "desk" not in features_of(config)


def test_candidates_with_a_position_are_the_shown_ones_of_a_log_without_their_stage(
    tables, tmp_path
):
    """The types of events are known, 0 or 1, for every candidate."""
    candidates = tables["candidates"]
    candidates["reached"] = (candidates["reached"] != "light").astype(int)
    by_request = candidates.groupby("req")
    candidates["placed"] = by_request["placed"].rank()  # without gaps
    del tables["events"]["reached"]
    _, config = infer(tmp_path, write(tables, tmp_path / "log"))
    assert (config.data.columns.stage, config.data.columns.position) == ("reached", "placed")
    assert set(config.data.stages) == {"retrieved", "passed"}
    assert config.funnel.shown == by_request["placed"].count().median()
    assert config.funnel.passed == by_request["reached"].sum().median()


@pytest.mark.parametrize("days", [0, 400])
def test_a_table_that_is_later_than_the_requests_is_doubted(tables, tmp_path, days):
    """Its prices and states may be those after a sale; one as old as the log hides nothing."""
    changed = pd.Timestamp("2024-06-01") + pd.to_timedelta(days, unit="D")
    tables["articles"]["changed"] = changed
    tables["articles"].loc[::3, "changed"] = pd.Timestamp("2024-01-01")
    text, _ = infer(tmp_path, write(tables, tmp_path / "log"))
    is_doubted = "Times in 'changed' are later than the requests" in check_of(text, "data.sql")
    assert is_doubted == (days > 0)


def _with_visitors(tables: dict[str, pd.DataFrame], returning: int) -> None:
    """Give each visitor visits within minutes, and one in `returning` a visit nine days later.

    An account is known for half of them. A town and a region are coarser than both, and each sets
    another column, as a user does.
    """
    requests, readers = tables["requests"], tables["readers"]
    numbers = requests.pop("reader").to_numpy()
    requests["vis_id"] = [f"v{number}" for number in numbers]
    requests["usr_id"] = [f"u{number}" if number % 2 else None for number in numbers]
    for name, of_name, count in (("town", "county", 30), ("region", "state", 20)):
        requests[name] = [f"{name}{number % count}" for number in numbers]
        requests[of_name] = [f"{of_name}{number % count // 2}" for number in numbers]
    readers["vis_id"] = [f"v{number}" for number in readers.pop("reader")]
    visit = requests.groupby("vis_id").cumcount()
    is_late = (visit == 2) & (numbers % returning == 0)
    first = requests.groupby("vis_id")["ts"].transform("min")
    requests["ts"] = first + pd.to_timedelta(visit + 60 * 24 * 9 * is_late, unit="min")


def test_a_user_may_have_mostly_single_visits(tables, tmp_path):
    _with_visitors(tables, returning=4)
    _, config = infer(tmp_path, write(tables, tmp_path / "log"))
    assert config.data.columns.user == "vis_id"


def test_the_names_of_two_users_count_more_than_other_values(tables, tmp_path):
    """By their values, visitors who never return are sessions, and towns or regions are users."""
    _with_visitors(tables, returning=1000)
    text, _ = infer(tmp_path, write(tables, tmp_path / "log"))
    doubt = check_of(text, "data.columns.user")
    assert doubt.startswith("which column has the user: 'vis_id' or 'usr_id'?")
