"""First configs of logs where the role of each column is known: a role may be open, never wrong."""

import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

import kd_ranker as kd
from kd_ranker import main
from kd_ranker.config import schema
from kd_ranker.errors import UserError
from kd_ranker.sources.logs.infer.guess import OPEN
from tests import small
from tests.sources import ebnerd_files
from tests.sources import planted_logs as logs

TEACHER = {task: f"teacher_probability_{task}" for task in logs.TASKS}
# Role -> the column that has it; all other columns of the log have no role.
PLANTED = {
    "data.rows": "candidate",
    **{f"data.columns.{role}": f"{role}_id" for role in ("request", "user", "item")},
    **{f"data.columns.{of}": of for of in ("time", "stage", "position")},
    **{f"data.columns.{of}": of for of in ("label_weight", "teacher_version")},
    **{f"data.stages.{stage}": stage for stage in ("retrieved", "passed", "shown")},
    **{f"data.labels.{task}": task for task in logs.TASKS},
    **{f"data.teacher.{task}": column for task, column in TEACHER.items()},
}
FEATURES = {
    "age": ("user", "dense"), "country": ("user", "category"), "recent_items": ("user", "history"),
    "interests": ("user", "bag"), "item_count": ("user", "dense"), "hour": ("context", "category"),
    "device": ("context", "category"), "duration": ("item", "dense"),
    "category_id": ("item", "category"), "author_id": ("item", "category"), "tags": ("item", "bag"),
    "retrieval_score_7d": ("candidate", "dense"),
}  # fmt: skip


@pytest.fixture(scope="module")
def columns() -> dict[str, Any]:
    return logs.make_columns()


def infer(folder: Path, log: Any, named: dict[str, Any] | None = None) -> tuple[str, ConfigDict]:
    """The text of the config for a log, or for a table that is written first, and the config."""
    if isinstance(log, pa.Table):
        log = logs.write(log, folder / "feed")
    log = log if isinstance(log, pd.DataFrame) else str(log)
    written = kd.infer(log, folder / "configs", named)
    text = written.path.read_text()
    assert written.num_checks == text.count("# CHECK: ")
    return text, main.read_config(str(written.path))


def roles_of(config: ConfigDict) -> dict[str, Any]:
    """The roles that a config gives: key -> value, without those that are open or that none has."""
    data = config.data
    found = {"data.rows": data.rows}
    for section in ("columns", "labels", "teacher"):
        found |= {f"data.{section}.{name}": of for name, of in data[section].items()}
    if data.columns.stage not in ("", OPEN):
        found |= {f"data.stages.{stage}": of for stage, of in data.stages.items()}
    return {key: of for key, of in found.items() if of not in ("", OPEN)}


def wrong(config: ConfigDict, truth: dict[str, Any], text: str = "") -> dict[str, Any]:
    """The roles that the log does not give, whatever task names the config made up.

    With the text of the config, those below a CHECK do not count.
    """
    found, tasks = roles_of(config), {}
    if text:
        found = {key: of for key, of in found.items() if not is_checked(text, key)}
    for key in [key for key in found if key.startswith(("data.labels.", "data.teacher."))]:
        tasks[key] = found.pop(key)
    labels = {of: key.rpartition(".")[2] for key, of in truth.items() if "labels" in key}
    for key, column in tasks.items():
        label = config.data.labels[key.rpartition(".")[2]]
        found[key.rpartition(".")[0] + "." + labels.get(label, "no label")] = column
    return {key: of for key, of in found.items() if truth.get(key, "") != of}


def features_of(config: ConfigDict) -> dict[str, tuple[str, str]]:
    features = config.data.features.items()
    return {each.column or name: (each.of, each.kind) for name, each in features}


def check_of(text: str, key: str) -> str:
    """The doubt above the line that sets a key; "" for none."""
    section, _, name = key.rpartition(".")
    statement, comments = "", []
    for line in text.splitlines():
        code = line.strip()
        if code.startswith("# "):
            comments.append(code[2:])
            continue
        if re.match(r" {4}\S", line):
            statement = code
        # A section may be one line, or have one for each of its names.
        is_of_section = statement.startswith((f"{section} = ", f"{section}.update("))
        if code.startswith(f"{key} = ") or (
            is_of_section and re.search(rf"'{name}':|\b{name}=", line)
        ):
            return " ".join(comments).partition("CHECK: ")[2]
        comments = []
    raise AssertionError(f"no line sets {key}")


def is_checked(text: str, key: str) -> bool:
    """Whether a CHECK is above the line that sets a key, or the column of the stages."""
    if key.startswith("data.stages."):
        return is_checked(text, "data.columns.stage")
    is_written = key != "data.rows" or "data.rows =" in text
    return is_written and bool(check_of(text, key))


def left_out(text: str) -> dict[str, str]:
    """Column -> why it is left out."""
    reasons = dict(re.findall(r"^    # '(.*)': (.*)$", text, re.MULTILINE))
    for line in re.findall(r"^    # (data\.features\..*)$", text, re.MULTILINE):
        code, _, why = line.partition("  # ")
        name = code.split(" = ")[0].removeprefix("data.features.")
        column = re.search(r"column='(.*?)'[,)]", code)
        reasons[column[1] if column else name] = why
    return reasons


@pytest.mark.parametrize("rows", ["candidate", "request"])
def test_it_finds_the_planted_roles(columns, tmp_path, rows):
    # A request has one version of the teacher in no log.
    absent = () if rows == "candidate" else ("teacher_version",)
    table = logs.table_of({of: x for of, x in columns.items() if of not in absent}, rows)
    text, config = infer(tmp_path, table)
    truth = PLANTED | {"data.rows": rows}
    assert roles_of(config) == {key: of for key, of in truth.items() if of not in absent}
    assert (config.data.time_unit, config.teacher.source) == ("s", "logged")
    assert config.data.teacher_version == ("" if absent else "v2")
    sizes = (config.funnel.retrieved, config.funnel.passed, config.funnel.shown)
    assert sizes == (logs.CANDIDATES, logs.PASSED, logs.SHOWN)
    assert features_of(config) == FEATURES
    assert {"source", "title", "trace", "dwell", "followed"} == left_out(text).keys()
    assert check_of(text, "config.value_weights")
    versions = "only this version counts; or '' for all?"
    assert text.count("CHECK: ") == (1 if absent else 2)
    assert (versions in text) == (not absent)


OLD = ("request_id", "time", "user_id", "item_id", "stage", "position", "label_weight", *logs.TASKS)
# Names of the columns `OLD` in other logs. A session, its creation, a device, a target, a rank and
# a weight may be other things.
RENAMED = {
    "english": "impressionId ts member_id video_id funnel_stage slot sample_weight is_clicked like",
    "german": "anfrage_id zeitstempel kunden_id Artikel_ID Stufe Platz label_weight klick gefallen",
    "chinese": "请求ID 时间 用户ID 商品ID 阶段 位置 label_weight 点击 点赞",
    "partly": "session_id created_at device_id target_id status rank weight y f2",
    "unknown": "x1 x2 x3 x4 x5 x6 x7 x8 x9",
}
# Roles that the values of the log point at.
OF_VALUES = ("request", "time", "user", "item", "position")


def renamed(new: dict[str, str]) -> dict[str, Any]:
    """The planted roles of a log whose columns have other names."""
    of_columns = ("data.columns.", "data.labels.", "data.teacher.")
    return {k: new.get(v, v) if k.startswith(of_columns) else v for k, v in PLANTED.items()}


@pytest.mark.parametrize("language", RENAMED)
def test_names_of_other_logs(columns, tmp_path, language):
    new = dict(zip(OLD, RENAMED[language].split(), strict=True))
    new |= {TEACHER[task]: f"p_{new[task]}" for task in TEACHER}
    table = logs.table_of({new.get(of, of): values for of, values in columns.items()})
    text, config = infer(tmp_path, table)
    assert not wrong(config, renamed(new))
    found = {key.removeprefix("data.columns.") for key in roles_of(config)}
    is_hidden = language in ("partly", "unknown")
    is_open = {"label_weight"} if is_hidden else set()
    assert {of.removesuffix("_id") for of in OLD[:-2]} - found == is_open
    for role in OF_VALUES:
        check = check_of(text, f"data.columns.{role}")
        assert check == (f"by its values; is it the {role}?" if is_hidden else "")
    assert {*config.data.labels.values()} == {new[task] for task in logs.TASKS}
    assert {*config.data.teacher.values()} == {new[of] for of in TEACHER.values()}


# The columns of a log whose names say nothing: what identifies, what the ranking wrote, a label.
ODD_NAMES = {
    "italian": {
        "request_id": "richiesta", "user_id": "utente", "item_id": "pellicola", "time": "quando",
        "stage": "esito", "position": "slot no.", "click": "abbonato", "score": "voto_finale",
        "shown": "mostrato", "passed": "passato", "retrieved": "scartato",
    },
    "german": {
        "request_id": "abruf", "user_id": "person", "item_id": "film", "time": "wann",
        "stage": "stufe", "position": "reihe", "click": "gemocht", "score": "endnote",
        "shown": "gesehen", "passed": "weiter", "retrieved": "raus",
    },
}  # fmt: skip
WRITTEN_AFTER = ("stage", "position", "score", "click")
EARLIER = ("duration", "retrieval_score_7d", "category_id", "author_id")


def odd_log(
    columns: dict[str, Any], names: dict[str, str], scored: float, is_zero: bool, after: Any
) -> pa.Table:
    """A log with rows in any order, and a score for a share of the passed or, above 1, for all.

    A label is 0 or missing where a candidate was not shown. Of what was written after the ranking,
    it has the columns in `after`.
    """
    rng = np.random.default_rng(0)
    rows = len(columns["item_id"])
    stage = np.array(columns["stage"])
    order = np.lexsort([rng.random(rows), stage == "retrieved", stage != "shown"])
    score = np.empty(rows)
    score[order] = -3 + 4 * np.sort(rng.random(rows))[::-1]
    is_scored = (stage != "retrieved") & (rng.random(rows) < scored) | (scored > 1)
    label = columns["click"]
    new = {names[of]: columns[of] for of in ("request_id", "user_id", "item_id", "time")}
    new |= {of: columns[of] for of in (*EARLIER, "followed", "age", "country", "hour")}
    new |= {"listino": np.where(rng.random(rows) < 0.2, np.nan, rng.random(rows))}
    written = {
        "stage": [names[of] for of in stage],
        "position": columns["position"],
        "score": pa.array(score, mask=~is_scored),
        "click": [y or 0 for y in label] if is_zero else label,
    }
    new |= {names[of]: written[of] for of in after}
    return logs.table_of(new).take(rng.permutation(rows))


@pytest.mark.parametrize("language", ODD_NAMES)
@pytest.mark.parametrize("scored", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("is_zero", [False, True], ids=["missing", "zero"])
@pytest.mark.parametrize("is_named", [False, True], ids=["unnamed", "named"])
def test_what_the_ranking_wrote_is_no_feature_by_whatever_name(
    columns, tmp_path, language, scored, is_zero, is_named
):
    names = ODD_NAMES[language]
    roles = {"request": "request_id", "user": "user_id", "item": "item_id", "time": "time"}
    named = {f"data.columns.{role}": names[of] for role, of in roles.items()}
    if is_named:
        named["data.labels.click"] = names["click"]
    table = odd_log(columns, names, scored, is_zero, WRITTEN_AFTER)
    text, config = infer(tmp_path, table, named)
    features = {*features_of(config)}
    assert not features & {names[of] for of in WRITTEN_AFTER}
    assert {*EARLIER} <= features
    proposed = {"stage": "data.columns.stage", "position": "data.columns.position"}
    for of in ("stage", "position", "score"):
        is_proposed = roles_of(config).get(proposed.get(of)) == names[of]
        assert is_proposed or names[of] in left_out(text)
    # It has nothing to do with the ranking, which no value shows.
    assert left_out(text)["listino"] == "differs within a request"


@pytest.mark.parametrize("is_zero", [False, True], ids=["missing", "zero"])
def test_a_score_is_no_feature_where_only_labels_tell_shown(columns, tmp_path, is_zero):
    names = ODD_NAMES["italian"]
    after = ("score", "click") if not is_zero else ("score", "click", "stage")
    table = odd_log(columns, names, 0.7, is_zero, after)
    named = {"data.columns.request": "richiesta", "data.labels.abbonato": "abbonato"}
    text, config = infer(tmp_path, table, named)
    assert "voto_finale" not in features_of(config)
    assert "'voto_finale'" in check_of(text, "data.teacher")
    assert "which column has the teacher" in check_of(text, "data.teacher")


def test_a_log_of_passed_candidates_whose_scores_are_all_known(columns, tmp_path):
    names = ODD_NAMES["german"]
    table = odd_log(columns, names, 1.0, False, ("score", "click"))
    passed = table.filter(pa.compute.is_valid(table["endnote"]))
    named = {"data.columns.request": "abruf", "data.labels.click": "gemocht"}
    text, config = infer(tmp_path, passed, named)
    assert "endnote" not in features_of(config)
    assert "which column has the teacher: 'endnote'" in check_of(text, "data.teacher")


def test_named_labels_are_the_tasks(columns, tmp_path):
    table = logs.table_of(columns)
    _, config = infer(tmp_path / "all", table, {"data.labels": {"aime": "like"}})
    assert config.data.labels.to_dict() == {"aime": "like"}
    assert config.tasks == ("aime",)
    assert len(config.value_weights) == 1
    assert "click" not in features_of(config)
    _, config = infer(tmp_path / "some", table, {"data.labels.aime": "like"})
    assert {*config.tasks} == {*config.data.labels} == {"aime", "click"}
    named = {"data.columns": {"user": "author_id"}, "data.teacher": {"aime": "retrieval_score_7d"}}
    _, config = infer(tmp_path / "columns", table, named | {"data.labels": {"aime": "like"}})
    assert config.data.columns.user == "author_id"
    assert config.data.columns.item == "item_id"
    assert config.data.teacher.to_dict() == {"aime": "retrieval_score_7d"}
    with pytest.raises(UserError, match=r"data\.labels\.aime='likes' does not exist"):
        infer(tmp_path / "other", table, {"data.labels": {"aime": "likes"}})


@pytest.mark.parametrize("seed", range(3))
def test_any_names_give_no_wrong_role(columns, tmp_path, seed):
    """Each column keeps its name, has one that means nothing, or that of another column."""
    rng = np.random.default_rng(seed)
    names = np.array([*columns])
    kinds = rng.choice(["own", "none", "other"], len(names), p=[0.5, 0.3, 0.2])
    hidden = [f"f{i}" for i in range(len(names))]
    moved = [f"old_{of}" for of in rng.permutation(names)]
    new = np.select([kinds == "own", kinds == "none"], [names, hidden], moved)
    table = logs.table_of({str(of): columns[name] for of, name in zip(new, names, strict=True)})
    text, config = infer(tmp_path, table)
    truth = renamed(dict(zip(names.tolist(), new.tolist(), strict=True)))
    assert not wrong(config, truth, text), new


def test_names_that_mislead(columns, tmp_path):
    """Columns are called like a role, or like a part of one, which their values contradict."""
    rng = np.random.default_rng(0)
    item, user = np.array(columns["item_id"]) - 100_000, np.array(columns["user_id"]) - 5_000
    request, rows = np.array(columns["request_id"]) - 10_000, len(item)
    together = columns | {
        "click_count": rng.permutation(10_000)[:500][item],
        "item_time": logs.START - rng.integers(10**7, size=500)[item],
        "created_at": logs.START - rng.integers(10**7, size=500)[item],
        "signup_time": logs.START - rng.integers(10**7, size=80)[user],
        "stage_name": np.array(["Berlin", "Paris", "Rome"])[rng.integers(3, size=500)[item]],
        "weight": (10 * rng.random(500))[item],
        "model_version": np.array(["phone 1", "phone 2"])[rng.integers(2, size=80)[user]],
        "rank": rng.integers(1, 100, size=500)[item],
        "share_price": 100 * rng.random(rows),
        "item": np.array(["book", "film", "song"])[rng.integers(3, size=500)[item]],
        "user": np.array(["old", "new"])[rng.integers(2, size=logs.REQUESTS)[request]],
        "share": rng.random(rows) < 0.3,
        "like_rate": rng.random(500)[item],
        "row": np.arange(rows),
        "__index_level_0__": np.arange(rows),
    }
    order = [str(of) for of in rng.permutation([*together])]
    text, config = infer(tmp_path, logs.table_of({of: together[of] for of in order}))
    assert roles_of(config) == PLANTED
    features = features_of(config)
    assert features["click_count"] == features["weight"] == ("item", "dense")
    assert features["model_version"] == ("user", "category")
    assert features["item"] == ("item", "category")
    assert left_out(text)["share"] == "differs within a request"
    assert left_out(text)["__index_level_0__"] == "a row number"


def open_bandit(folder: Path, rows: int = 6_000) -> None:
    """Write all.csv and item_context.csv: a row per impression, and many sparse counts."""
    rng = np.random.default_rng(0)
    page = np.repeat(np.arange(rows // 3), 3)
    time = pd.Timestamp("2019-11-24", tz="UTC") + pd.to_timedelta(20 * page + rng.random(rows), "s")
    groups = rng.integers(240, size=rows // 3)[page]
    columns = {
        "": np.arange(rows),
        "timestamp": time,
        "item_id": np.concatenate([rng.choice(34, 3, replace=False) for _ in range(rows // 3)]),
        "position": np.concatenate([rng.permutation(3) + 1 for _ in range(rows // 3)]),
        "click": (rng.random(rows) < 0.004).astype(int),
        "propensity_score": np.exp(-3.5 + 0.2 * rng.normal(size=rows)),
    }
    for number in range(4):
        hashes = np.array([f"{rng.integers(2**62):032x}" for _ in range(6)])
        columns[f"user_feature_{number}"] = hashes[rng.integers(6, size=240)[groups]]
    for number in range(34):
        counts = rng.poisson(1.0, rows) * (rng.random(rows) < rng.choice([3e-4, 0.05]))
        columns[f"user-item_affinity_{number}"] = counts.astype(float)
    pd.DataFrame(columns).to_csv(folder / "all.csv", index=False)
    hashes = {f"item_feature_{i}": [f"{rng.integers(9):032x}" for _ in range(80)] for i in (1, 2)}
    items = {"item_id": range(80), "item_feature_0": rng.normal(size=80)} | hashes
    pd.DataFrame(items).to_csv(folder / "item_context.csv", index=False)


def movielens(folder: Path) -> None:
    """Write ratings.csv, movies.csv and tags.csv of new releases, and u.data of the first one."""
    rng = np.random.default_rng(0)
    pairs = rng.permutation(30 * 60)[:900]
    columns = {"userId": pairs // 60 + 1, "movieId": pairs % 60 + 1}
    time = 1_200_000_000 + rng.integers(10**8, size=900)
    ratings = pd.DataFrame({**columns, "rating": rng.integers(1, 11, 900) / 2, "timestamp": time})
    ratings.to_csv(folder / "ratings.csv", index=False)
    ratings.to_csv(folder / "u.tsv", sep="\t", header=False, index=False)
    tags = pd.DataFrame({**columns, "tag": [f"tag {i % 50}" for i in pairs], "timestamp": time})
    tags.to_csv(folder / "tags.csv", index=False)
    movies = [(i, f"Movie {i} (1990)", ["Drama", "Comedy|Drama"][i % 2]) for i in range(60)]
    movies = pd.DataFrame(movies, columns=["movieId", "title", "genres"])
    movies.to_csv(folder / "movies.csv", index=False)


RATING = {"user": "userId", "item": "movieId", "time": "timestamp"}
VISIT = {"request": "impression_id", "user": "user_id", "time": "impression_time"}
BANDIT = {"item": "item_id", "time": "timestamp", "position": "position"}
BANDIT |= {"propensity": "propensity_score", "data.labels.click": "click"}


@pytest.mark.parametrize(
    ("write", "file", "rows", "found", "allowed"),
    [
        (open_bandit, "all.csv", "candidate", BANDIT, {}),
        (open_bandit, "item_context.csv", "candidate", {"item": "item_id"}, {}),
        (movielens, "ratings.csv", "candidate", RATING, {}),
        (movielens, "tags.csv", "candidate", {}, RATING),
        (movielens, "movies.csv", "candidate", {}, RATING),
        (movielens, "u.tsv", "candidate", {}, {}),
        (ebnerd_files.write, "train/behaviors.parquet", "request", VISIT, {}),
        (ebnerd_files.write, "train/history.parquet", "candidate", {}, {"user": "user_id"}),
        (ebnerd_files.write, "articles.parquet", "candidate", {}, {"item": "article_id"}),
    ],
)
def test_raw_files_of_public_datasets(tmp_path, write, file, rows, found, allowed):
    write(tmp_path)
    text, config = infer(tmp_path, tmp_path / file)
    sure, truth = (
        {"data.rows": rows} | {k if "." in k else f"data.columns.{k}": v for k, v in of.items()}
        for of in (found, found | allowed)
    )
    assert not wrong(config, truth)
    assert roles_of(config).items() >= sure.items()
    if "request" not in found:
        assert "which column has the request" in check_of(text, "data.columns.request")
        assert check_of(text, "config.funnel.retrieved")
    if "data.labels.click" not in found:
        assert "which column has the label, 0 or 1" in check_of(text, "data.labels.label")
    if file == "train/behaviors.parquet":
        assert "'article_ids_inview'" in check_of(text, "data.columns.item")
        later = {"article_ids_clicked", "read_time", "next_read_time"}
        assert not later & {*features_of(config)}


def test_what_the_user_names_counts(columns, tmp_path):
    named = {
        "data.columns.item": "trace", "data.columns.user": "author_id", "data.columns.stage": "",
        "data.labels.click": "like", "data.teacher.click": "retrieval_score_7d",
        "data.split": "user", "data.time_unit": "ms", "funnel.shown": 3, "train.steps": 7,
    }  # fmt: skip
    _, config = infer(tmp_path, logs.table_of(columns), named)
    for key, value in named.items():
        assert schema.value_of(config, key) == value, key
    with pytest.raises(UserError, match=r"data\.columns\.item='itemid' does not exist"):
        infer(tmp_path / "other", logs.table_of(columns), {"data.columns.item": "itemid"})


def test_the_command_line(columns, tmp_path):
    """Even the names of the template are named by whoever gives them."""
    columns = dict(columns, user_id=np.zeros(len(columns["user_id"]), int))
    path = logs.write(logs.table_of(columns), tmp_path / "feed")
    finished = small.run(
        "-m", "experiments.prepare_data", "--config=configs/parquet.py", "--config.data.infer=True",
        f"--config.data.path={path}", "--config.data.columns.user=user_id", f"--workdir={tmp_path}",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    first, *rest = finished.stdout.splitlines()
    assert first == f"config: {tmp_path / 'feed.py'}"
    assert f"    kd-ranker prepare --config={tmp_path / 'feed.py'}" in rest
    assert main.read_config(str(tmp_path / "feed.py")).data.columns.user == "user_id"


def test_the_first_config_of_a_frame_builds_a_dataset(columns, tmp_path):
    _, config = infer(tmp_path, logs.table_of(columns).to_pandas().sort_values("trace"))
    assert roles_of(config) == PLANTED
    assert config.data.title == "log"
    assert not [of for of in features_of(config) if "index" in of]
    config.data.dir, config.data.allow = str(tmp_path / "datasets"), ("few_positives",)
    assert (kd.prepare(config).directory / "data_report.json").exists()


def test_positions_of_a_teacher_are_named(columns, tmp_path):
    without = {of: x for of, x in columns.items() if of not in TEACHER.values()}
    rng = np.random.default_rng(0)
    ranks = [rng.permutation(logs.CANDIDATES) + 1 for _ in range(logs.REQUESTS)]
    text, config = infer(tmp_path, logs.table_of(without | {"final_rank": np.concatenate(ranks)}))
    doubt = "which columns have the teacher, one per task: 'final_rank'?"
    assert doubt in check_of(text, "data.teacher")
    assert not config.data.teacher
    assert "final_rank" not in features_of(config)


def test_a_log_of_only_shown_candidates(columns, tmp_path):
    gone = ("stage", "position", "label_weight")
    kept = {of: x for of, x in columns.items() if of not in (*gone, "followed")}
    table = logs.table_of(kept | {"f": columns["followed"]})
    text, config = infer(tmp_path, table.filter(pa.array(columns["stage"] == "shown")))
    assert not wrong(config, {k: v for k, v in PLANTED.items() if not any(of in k for of in gone)})
    assert {*config.data.labels} == {*logs.TASKS}
    assert left_out(text)["f"] == "perhaps a label"


def test_columns_whose_keys_are_equal_have_a_key_each(columns, tmp_path):
    """A label without a key would be a feature. DuckDB numbers names that differ in case."""
    twice = {"is_click": columns["click"], "source id": columns["age"], "source_id": columns["age"]}
    twice |= {"row ": columns["hour"], "Hour": columns["hour"]}
    _, config = infer(tmp_path, logs.table_of(columns | twice))
    assert {"click", "is_click", "like"} == {*config.data.labels.values()}
    assert {"source id", "source_id", "row ", "Hour_1"} < features_of(config).keys()


def test_what_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.parquet").write_text("no Parquet")
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "empty.parquet")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/a.py").write_text("mine")
    for log, message in (
        ("", "data.path is empty"),
        (f"{tmp_path}/absent", "does not exist"),
        (f"{tmp_path}/other", "cannot be read: "),
        (f"{tmp_path}/empty.parquet", "has no rows"),
        ("nowhere://bucket/feed", "cannot be read"),
        (f"{tmp_path}/absent.csv", "cannot be read: IO Error: No files found"),
        (f"{tmp_path}/a.parquet", r"a\.py exists already; move it away"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            infer(tmp_path, log)
        assert "\n" not in str(caught.value)


def test_files_of_other_stores_and_columns_that_differ(columns, tmp_path):
    table = logs.table_of(columns)
    other = table.drop_columns(["age"]).slice(6_000)
    files = fsspec.filesystem("memory")
    for day, part in enumerate((table.slice(0, 6_000), other)):
        pq.write_table(part, tmp_path / "part.parquet")
        files.pipe(f"/infer/day={day}/a.parquet", (tmp_path / "part.parquet").read_bytes())
    _, config = infer(tmp_path, "memory://infer")
    assert roles_of(config) == PLANTED
    assert {"age", "day"} <= {*features_of(config)}


ODD = {
    pa.uint64(): int, pa.float16(): np.float16, pa.bool_(): bool, pa.large_string(): str,
    pa.binary(): lambda i: bytes([i, 255]), pa.timestamp("us", "UTC"): int, pa.date32(): int,
    pa.time64("us"): int, pa.decimal128(9, 2): int, pa.null(): lambda i: None,
    pa.large_list(pa.float32()): lambda i: [float(i)] * (i % 3),
    pa.list_(pa.list_(pa.int64())): lambda i: [[i]],
    pa.struct([("a", pa.int64())]): lambda i: {"a": i},
    pa.dictionary(pa.int32(), pa.string()): str,
}  # fmt: skip


def test_columns_of_any_type_are_features_or_left_out(columns, tmp_path):
    rng, number = np.random.default_rng(0), len(columns["item_id"])
    odd = {}
    for place, (type_, make) in enumerate(ODD.items()):
        values = rng.integers(50, size=number).tolist()
        odd[f"f{place}"] = pa.array([make(of) if of % 10 else None for of in values], type_)
    text, config = infer(tmp_path, logs.table_of(columns | odd))
    assert roles_of(config) == PLANTED
    # The struct has a field `a`.
    names = {"f12_a" if of == "f12" else of for of in odd}
    assert {*features_of(config)} == {*FEATURES, *names} - left_out(text).keys()
