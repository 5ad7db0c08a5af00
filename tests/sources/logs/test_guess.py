"""First configs for logs whose every column was planted."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from kd_ranker import api, main
from kd_ranker.config import checks
from kd_ranker.configs import parquet
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.duckdb_engine import DuckDb
from kd_ranker.sources.logs.guess import facts, first_config, funnel, rules, sample
from kd_ranker.sources.registry import SOURCES, SourceEntry
from tests import small
from tests.sources import planted_logs as logs

ROOT = Path(__file__).resolve().parents[3]
FEATURES = {
    "age": ("user", "dense"),
    "country": ("user", "category"),
    "hour": ("context", "category"),
    "device": ("context", "category"),
    "recent_items": ("user", "history"),
    "interests": ("user", "bag"),
    "duration": ("item", "dense"),
    "category_id": ("item", "category"),
    "author_id": ("item", "category"),
    "tags": ("item", "bag"),
    "retrieval_score_7d": ("candidate", "dense"),
    "followed": ("candidate", "category"),
    "item_count": ("user", "dense"),
}


@pytest.fixture(scope="module")
def columns() -> dict[str, Any]:
    return logs.make_columns()


def core(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns that a log must have, and a few others."""
    names = ("request_id", "time", "user_id", "item_id", "stage", "click", "age", "duration")
    return {name: columns[name] for name in names}


def without(columns: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values for name, values in columns.items() if name not in names}


def infer(folder: Path, table: pa.Table | None = None, **data: Any) -> tuple[str, ConfigDict]:
    """The text of the config that is written for a log, and the config that it loads as."""
    if table is not None:
        data["path"] = str(logs.write(table, folder / "feed"))
    template = parquet()
    for key, value in data.items():
        template.data.update_from_flattened_dict({key.replace("__", "."): value})
    written = api.first_config(template, folder / "configs")
    text = written.path.read_text()
    assert written.num_checks == text.count("# CHECK: ")
    return text, load(written.path)


def load(path: Path) -> ConfigDict:
    """The config in a file, by the way that the entry points go."""
    main.read_config(str(path))
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file("config", flag_values=values)
    values(["train", f"--config={path}"])
    assert flag.value is not None
    return flag.value


def features_of(config: ConfigDict) -> dict[str, tuple[str, str]]:
    return {name: (each.of, each.kind) for name, each in config.data.features.items()}


def left_out(text: str) -> dict[str, str]:
    """Column -> why it is left out."""
    section = text.partition("# Left out, and why.")[2].partition("    config.")[0]
    lines = [line.strip().removeprefix("# ") for line in section.splitlines() if line.strip()]
    reasons, reason = {}, []
    for line in lines:
        if match := re.match(r"data\.features\.(\w+)\b", line):
            reasons[match[1]] = " ".join(reason)
            reason = []
        else:
            reason.append(line)
    return reasons


def check_of(text: str, key: str) -> str:
    """What stands to check above the line that sets a key; "" where nothing does."""
    lines = text.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(f"    {key} ="))
    above: list[str] = []
    while lines[place - 1].startswith("    # "):
        place -= 1
        above.insert(0, lines[place].strip().removeprefix("# "))
    return " ".join(above).partition("CHECK: ")[2]


def assert_formatted(*paths: Path) -> None:
    """Whether `ruff format` and the linter would leave files as they are."""
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    for command in (["format", "--diff"], ["check", "--ignore=E501"]):
        finished = subprocess.run(
            [*ruff, *command, *config, *paths], capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr


def fault_of(folder: Path, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        infer(folder, **data)
    message = str(caught.value)
    assert "\n" not in message
    assert not list(folder.glob("configs/*"))
    return message


@pytest.mark.parametrize("rows", ["candidate", "request"])
def test_it_finds_what_was_planted(columns, tmp_path, rows):
    columns = dict(columns)
    if rows == "request":
        # Repeated in lists, it would be the same for all candidates of a request.
        columns["teacher_version"] = np.array(columns["teacher_version"])
        with_version = (*logs.OF_REQUEST, "teacher_version")
        table = logs.by_request(logs.table_of(columns), with_version)
    else:
        table = logs.table_of(columns)
    text, config = infer(tmp_path, table)
    data = config.data
    assert data.rows == rows
    assert data.path == str(tmp_path / "feed")
    assert data.columns.to_dict() == {
        "request": "request_id",
        "time": "time",
        "user": "user_id",
        "item": "item_id",
        "stage": "stage",
        "position": "position",
        "label_weight": "label_weight",
        "teacher_version": "teacher_version",
        "teacher_weight": "",
        "incumbent": "",
        "propensity": "",
    }
    assert data.time_unit == "s"
    assert data.stages.to_dict() == {
        "retrieved": "retrieved",
        "passed": "passed",
        "shown": "shown",
    }
    assert data.labels.to_dict() == {"click": "click", "like": "like"}
    assert config.tasks == ("click", "like")
    assert config.value_weights == (1.0, 1.0)
    assert data.teacher.to_dict() == {
        task: f"teacher_probability_{task}" for task in ("click", "like")
    }
    assert (data.teacher_signal, data.teacher_version) == ("probability", "v2")
    assert config.teacher.source == "logged"
    assert features_of(config) == FEATURES
    assert data.features.interests.length == 3
    lengths = sorted(map(len, {tuple(each) for each in columns["recent_items"]}))
    assert data.features.recent_items.length == lengths[int(np.ceil(0.9 * (len(lengths) - 1)))]
    reasons = left_out(text)
    assert set(reasons) == {"source", "title", "trace", "dwell"}
    assert reasons["source"] == "always 'feed'"
    assert "missing where a candidate was not shown" in reasons["dwell"]
    assert "an id or text" in reasons["title"]
    funnel = config.funnel
    sizes = (funnel.retrieved, funnel.passed, funnel.shown)
    assert sizes == (logs.CANDIDATES, logs.PASSED, logs.SHOWN)
    assert config.batch.candidates == logs.CANDIDATES
    assert config.teacher.batch.candidates == logs.SHOWN


def test_the_config_is_valid_and_formatted(columns, tmp_path):
    text, config = infer(tmp_path, logs.table_of(columns))
    entry = SourceEntry(tuple(config.data.labels), mock.Mock())
    with mock.patch.dict(SOURCES, parquet=entry):
        checks.validate(config)
    assert_formatted(tmp_path / "configs/feed.py")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    # Every assignment says why, beside it or above it.
    for before, line in itertools.pairwise(lines):
        if line.startswith("    data."):
            has_reason = "  # " in line or before.startswith("    # ")
            assert has_reason or "data.stages." in line, line


def test_texts_as_ids_and_timestamps(columns, tmp_path):
    columns = dict(columns)
    for name in ("request_id", "user_id", "item_id"):
        columns[name] = [f"{name[0]}-{value:x}" for value in columns[name]]
    columns["recent_items"] = [[f"i-{i:x}" for i in each] for each in columns["recent_items"]]
    columns["time"] = pa.array(np.array(columns["time"]) * 1000, pa.timestamp("ms", "UTC"))
    text, config = infer(tmp_path, logs.table_of(columns))
    found = config.data.columns
    assert (found.request, found.user, found.item) == ("request_id", "user_id", "item_id")
    assert found.time == "time"
    assert "without effect: a timestamp[ms, tz=UTC] says its unit itself" in text
    assert features_of(config) == FEATURES


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
def test_the_unit_of_numbers_that_are_times(columns, tmp_path, unit):
    factor = {"s": 1, "ms": 1000, "us": 1_000_000}[unit]
    table = logs.table_of(core(columns) | {"time": np.array(columns["time"]) * factor})
    text, config = infer(tmp_path, table)
    assert config.data.time_unit == unit
    assert not check_of(text, "data.time_unit")


def test_numbers_that_are_no_dates_are_to_be_checked(columns, tmp_path):
    steps = np.array(columns["request_id"]) - 10_000
    text, config = infer(tmp_path, logs.table_of(core(columns) | {"time": steps}))
    assert config.data.columns.time == "time"
    assert "or 'ms', 'us'" in check_of(text, "data.time_unit")


def test_a_log_without_stage_and_teacher(columns, tmp_path):
    absent = ("stage", "position", "label_weight", "teacher_version")
    absent += tuple(name for name in columns if name.startswith("teacher_probability"))
    text, config = infer(tmp_path, logs.table_of(without(columns, *absent)))
    data = config.data
    for role in ("stage", "position", "label_weight", "teacher_version", "teacher_weight"):
        assert data.columns[role] == ""
    assert data.labels.to_dict() == {"click": "click", "like": "like"}
    assert data.teacher.to_dict() == {}
    assert config.teacher.source == "live"
    # What was shown is still told by where labels are known.
    assert config.funnel.shown == logs.SHOWN
    assert "dwell" in left_out(text)
    assert "the log does not tell what was passed" in check_of(text, "config.funnel.passed")


def test_a_log_of_what_was_shown_alone(columns, tmp_path):
    table = logs.table_of(without(columns, "stage", "position", "label_weight"))
    table = table.filter(pa.array(columns["stage"] == "shown"))
    text, config = infer(tmp_path, table)
    assert config.data.labels.to_dict() == {"click": "click", "like": "like", "follow": "followed"}
    assert "was each of them shown?" in check_of(text, "data.columns.stage")
    assert "how many does a page have?" in check_of(text, "config.funnel.shown")
    assert config.funnel.retrieved == logs.SHOWN
    assert 1 <= config.funnel.shown <= config.funnel.passed < config.funnel.retrieved
    assert "tells too much of" in left_out(text)["dwell"]


def test_labels_of_zero_where_nothing_was_shown(columns, tmp_path):
    columns = without(columns, "followed")
    for task in logs.TASKS:
        columns[task] = [label or 0 for label in columns[task]]
    columns["dwell"] = [dwell or 0.0 for dwell in columns["dwell"]]
    text, config = infer(tmp_path, logs.table_of(columns))
    assert set(config.data.labels) == set(logs.TASKS)
    assert "shown" in left_out(text)["dwell"]
    assert config.funnel.shown == logs.SHOWN


def test_a_column_that_only_says_what_was_shown(columns, tmp_path):
    table = without(columns, "stage") | {"is_shown": columns["stage"] == "shown"}
    _, config = infer(tmp_path, logs.table_of(table))
    assert config.data.columns.stage == "is_shown"
    assert config.data.stages.to_dict() == {"retrieved": "False", "passed": "", "shown": "True"}
    # Passed is what the teacher has scored.
    assert config.funnel.passed == logs.PASSED


@pytest.mark.parametrize("has_teacher", [True, False])
def test_stages_that_are_numbers(columns, tmp_path, has_teacher):
    stage = columns["stage"]
    columns = dict(columns, stage=np.select([stage == "shown", stage == "passed"], [4, 9], 7))
    if not has_teacher:
        columns = without(columns, *(f"teacher_probability_{task}" for task in logs.TASKS))
    text, config = infer(tmp_path, logs.table_of(columns))
    assert config.data.stages.to_dict() == {"retrieved": "7", "passed": "9", "shown": "4"}
    # Without a teacher, which of the other two is the passed is known by their numbers alone.
    assert ("by their numbers" in check_of(text, "data.stages.retrieved")) is not has_teacher


def test_labels_with_nonsense_among_them(columns, tmp_path):
    click = [7 if i % 300 == 0 and y is not None else y for i, y in enumerate(columns["click"])]
    wrong = click.count(7)
    assert wrong
    text, config = infer(tmp_path, logs.table_of(columns | {"click": click}))
    assert config.data.labels.click == "click"
    assert f"{wrong} of the sample are neither 0 nor 1" in check_of(text, "data.labels.click")


def test_what_ranked_the_candidates_is_kept_to_be_checked(columns, tmp_path):
    level = pd.Series(columns["stage"]).map({"retrieved": 0.0, "passed": 1.0, "shown": 2.0})
    noise = np.random.default_rng(0).normal(size=len(level))
    ranked_by = {"early": level + 0.3 * noise, "certain": level + 0.01 * noise}
    text, _ = infer(tmp_path, logs.table_of(columns | ranked_by))
    assert "what was shown: is it known before?" in check_of(text, "data.features.early")
    assert "tells which candidates were shown" in left_out(text)["certain"]


def test_what_has_the_order_of_the_teacher_is_left_out(columns, tmp_path):
    score = np.random.default_rng(0).random(len(columns["stage"]))
    clicks = np.where(
        columns["stage"] == "shown", np.random.default_rng(1).random() < score, np.nan
    )
    changed = {
        "click": clicks,
        "teacher_probability_click": score,
        "z": np.log(score / (1 - score)),
    }
    text, config = infer(tmp_path, logs.table_of(columns | changed))
    assert config.data.teacher.click == "teacher_probability_click"
    assert "ordered like 'teacher_probability_click', rank corr" in left_out(text)["z"]
    assert "retrieval_score_7d" in features_of(config)


def test_stages_beyond_three_are_to_be_checked(columns, tmp_path):
    stage = np.where(np.arange(len(columns["stage"])) % 60 == 59, "lost", columns["stage"])
    text, config = infer(tmp_path, logs.table_of(columns | {"stage": stage}))
    assert config.data.stages.passed == "passed"
    assert "rows of 'lost' would be rejected" in check_of(text, "data.stages.retrieved")


def test_positions_of_a_teacher(columns, tmp_path):
    columns = without(columns, *(f"teacher_probability_{task}" for task in logs.TASKS))
    rng = np.random.default_rng(0)
    ranks = [rng.permutation(logs.CANDIDATES) + 1 for _ in range(logs.REQUESTS)]
    text, config = infer(tmp_path, logs.table_of(columns | {"final_rank": np.concatenate(ranks)}))
    assert config.data.teacher_signal == "rank"
    assert config.data.teacher.to_dict() == {"click": "final_rank"}
    assert "another task" in check_of(text, "data.teacher.click")
    assert config.data.columns.position == "position"


@pytest.mark.parametrize("rows", ["candidate", "request"])
def test_nan_is_missing_whatever_the_layout(columns, tmp_path, rows):
    """Some writers know no null in a column of numbers."""
    unknown = ("position", "dwell", *logs.TASKS, *(f"teacher_probability_{t}" for t in logs.TASKS))
    with_nan = {name: np.array(columns[name], float) for name in unknown}
    assert all(np.isnan(values).any() for values in with_nan.values())
    text, config = infer(tmp_path, logs.table_of(columns | with_nan, rows))
    data = config.data
    assert data.labels.to_dict() == {"click": "click", "like": "like"}
    assert data.teacher.to_dict() == {t: f"teacher_probability_{t}" for t in logs.TASKS}
    assert data.columns.position == "position"
    assert features_of(config).keys() - {"teacher_version"} == FEATURES.keys()
    assert "missing where a candidate was not shown" in left_out(text)["dwell"]


def test_a_log_of_fifty_positions_is_inferred_prepared_and_trained(columns, tmp_path):
    absent = [f"teacher_probability_{task}" for task in logs.TASKS]
    columns = without(columns, "dwell", "label_weight", "teacher_version", *absent)
    rng, passed = np.random.default_rng(0), 50
    rank = np.concatenate([rng.permutation(logs.CANDIDATES) for _ in range(logs.REQUESTS)])
    shown = rank < logs.SHOWN
    columns["stage"] = np.select([shown, rank < passed], ["shown", "passed"], "retrieved")
    for task in logs.TASKS:
        columns[task] = np.where(shown, rng.integers(2, size=len(rank)), np.nan)
    columns["position"] = np.where(shown, rank, np.nan)
    columns["final_rank"] = np.where(rank < passed, 1.0 + rank, np.nan)
    _, config = infer(tmp_path, logs.table_of(columns))
    assert config.data.teacher.to_dict() == {"click": "final_rank"}
    # The teacher has scored no other task, so its value cannot count one.
    assert dict(zip(config.tasks, config.value_weights, strict=True)) == {"click": 1.0, "like": 0.0}
    assert not LOSSES[config.distill.loss].needs_probabilities
    config.data.dir, config.data.allow = str(tmp_path / "datasets"), ("few_positives",)
    directory = api.prepare(config).directory
    report = json.loads((directory / "data_report.json").read_text())
    coverage = report["teacher"]["tasks"]["click"]["coverage"]["test"]
    assert coverage == {"retrieved": 0.0, "passed": 1.0, "shown": 1.0}
    config.train.steps, config.train.log_every = 2, 1
    api.train(config, str(tmp_path / "student"))


def test_names_that_mislead(columns, tmp_path):
    """Columns called like a role that their values speak against."""
    rng = np.random.default_rng(0)
    num_rows = len(columns["item_id"])
    item = np.array(columns["item_id"]) - 100_000
    user = np.array(columns["user_id"]) - 5_000
    request = np.array(columns["request_id"]) - 10_000
    misleading = {
        # Different for each candidate of a request, as an id would be, but no id.
        "item_count": np.concatenate(
            [rng.choice(9000, 60, replace=False) for _ in range(logs.REQUESTS)]
        ),
        "request_count": rng.integers(0, 30, size=logs.REQUESTS)[request],
        "click_count": rng.permutation(10_000)[:500][item],
        "like_rate": rng.random(500)[item],
        "item_time": logs.START - rng.integers(10**7, size=500)[item],
        "stage_name": np.array(["Berlin", "Paris", "Rome"])[rng.integers(3, size=500)[item]],
        "weight": (10 * rng.random(500))[item],
        "model_version": np.array(["phone 1", "phone 2"])[rng.integers(2, size=80)[user]],
        "rank": rng.integers(1, 100, size=500)[item],
        "share_price": 100 * rng.random(num_rows),
        "item": np.array(["book", "film", "song"])[rng.integers(3, size=500)[item]],
        "user": np.array(["old", "new"])[rng.integers(2, size=logs.REQUESTS)[request]],
    }
    together = columns | misleading
    order = rng.permutation(list(together))
    _, config = infer(tmp_path, logs.table_of({name: together[name] for name in order}))
    assert config.data.columns.to_dict() == {
        "request": "request_id",
        "time": "time",
        "user": "user_id",
        "item": "item_id",
        "stage": "stage",
        "position": "position",
        "label_weight": "label_weight",
        "teacher_version": "teacher_version",
        "teacher_weight": "",
        "incumbent": "",
        "propensity": "",
    }
    assert set(config.data.labels) == set(logs.TASKS)
    assert set(config.data.teacher) == set(logs.TASKS)
    features = features_of(config)
    assert features["item_count"] == ("candidate", "dense")
    assert features["request_count"] == ("context", "dense")
    assert features["click_count"] == features["like_rate"] == ("item", "dense")
    assert features["stage_name"] == features["item"] == ("item", "category")
    assert features["weight"] == ("item", "dense")
    assert features["model_version"] == ("user", "category")
    assert features["share_price"] == ("candidate", "dense")
    assert features["user"] == ("context", "category")
    assert features["rank"][0] == "item"


def test_a_search_log_needs_no_users(columns, tmp_path):
    of_users = {"user_id", "age", "country", "recent_items", "interests", "item_count"}
    columns = {name: of for name, of in columns.items() if name not in of_users}
    columns["query_id"] = columns.pop("request_id")
    text, config = infer(tmp_path, logs.table_of(columns))
    assert (config.data.columns.request, config.data.columns.user) == ("query_id", "")
    assert not check_of(text, "data.columns.user")
    features = features_of(config)
    assert features["hour"][0] == features["device"][0] == "context"
    assert not check_of(text, "data.features.device")


def test_an_incumbent_and_propensities_are_found_by_their_names(columns, tmp_path):
    columns = dict(columns)
    columns["prerank_score"] = columns.pop("retrieval_score_7d")
    columns["propensity"] = [None if each is None else 0.25 for each in columns["position"]]
    _, config = infer(tmp_path, logs.table_of(columns))
    assert config.data.columns.incumbent == "prerank_score"
    assert config.data.columns.propensity == "propensity"


def test_the_time_of_a_request_is_not_that_of_its_items(columns, tmp_path):
    columns = dict(columns)
    item = np.array(columns["item_id"]) - 100_000
    columns["made"] = columns.pop("time")
    columns["created_at"] = logs.START - np.random.default_rng(0).integers(10**7, size=500)[item]
    _, config = infer(tmp_path, logs.table_of(columns))
    assert config.data.columns.time == "made"


@pytest.mark.parametrize("other", ["title", "slug"])
def test_items_are_told_by_their_ids_rather_than_other_names_of_theirs(columns, tmp_path, other):
    """A title has spaces; of two ids, a history lists the one that matters."""
    columns = dict(columns)
    columns["b"] = columns.pop("item_id")
    titles = columns.pop("title")
    columns["a"] = titles if other == "title" else [title.replace(" ", "-") for title in titles]
    if other == "title":
        columns = without(columns, "recent_items")
    _, config = infer(tmp_path, logs.table_of(columns))
    assert config.data.columns.item == "b"


def test_small_numbers_are_not_a_history_because_items_have_such_ids(columns, tmp_path):
    columns = dict(columns)
    columns["item_id"] = np.array(columns["item_id"]) - 100_000
    columns["recent_items"] = [[i - 100_000 for i in each] for each in columns["recent_items"]]
    columns["a"] = columns.pop("interests")
    columns["b"] = columns.pop("recent_items")
    _, config = infer(tmp_path, logs.table_of(columns))
    assert (config.data.features.a.kind, config.data.features.b.kind) == ("bag", "history")


@pytest.mark.parametrize("rows", ["candidate", "request"])
def test_values_alone_say_most_of_it(columns, tmp_path, rows):
    """All names, those of columns and those of stages, mean nothing."""
    stage = columns["stage"]
    columns = columns | {"stage": np.select([stage == "shown", stage == "passed"], [31, 7], 12)}
    rng = np.random.default_rng(1)
    numbers = rng.permutation(len(columns))
    hidden = {name: f"x{number}" for name, number in zip(columns, numbers, strict=True)}
    renamed = {hidden[name]: columns[name] for name in rng.permutation(list(columns))}
    table = logs.table_of(renamed)
    if rows == "request":
        table = logs.by_request(table, tuple(hidden[name] for name in logs.OF_REQUEST))
    text, config = infer(tmp_path, table)
    data = config.data
    planted = {value: name for name, value in hidden.items()}
    found = {role: planted.get(column, "") for role, column in data.columns.items()}
    assert found == {
        "request": "request_id",
        "time": "time",
        "user": "user_id",
        "item": "item_id",
        "stage": "stage",
        "position": "position",
        # These three only a name can tell.
        "label_weight": "",
        "teacher_version": "",
        "teacher_weight": "",
        "incumbent": "",
        "propensity": "",
    }
    assert data.rows == rows
    assert data.stages.to_dict() == {"retrieved": "12", "passed": "7", "shown": "31"}
    assert {planted[column] for column in data.labels.values()} == set(logs.TASKS)
    teacher = {planted[data.labels[task]]: planted[name] for task, name in data.teacher.items()}
    assert teacher == {task: f"teacher_probability_{task}" for task in logs.TASKS}
    kinds = {planted[name]: kind for name, kind in features_of(config).items()}
    expected = dict(FEATURES, item_count=("user", "category"))
    for name, kind in expected.items():
        assert kinds[name] == kind, name
    # The rest is asked for.
    for task in data.teacher:
        assert "its name does not say so" in check_of(text, f"data.teacher.{task}")
    for name in ("age", "author_id"):
        assert check_of(text, f"data.features.{hidden[name]}").startswith("or '")
    reasons = left_out(text)
    assert "a label weight?" in reasons[hidden["label_weight"]]
    assert {"source", "title", "trace", "dwell"} <= {planted[name] for name in reasons}
    assert "what each task is worth" in check_of(text, "config.value_weights")


def test_columns_that_tell_too_much_are_left_out(columns, tmp_path):
    rng = np.random.default_rng(0)
    stage, click = columns["stage"], columns["click"]
    num_rows = len(stage)
    noise = rng.normal(size=num_rows)
    shown = stage == "shown"
    clicks = [sum(filter(None, click[i : i + 60])) for i in range(0, num_rows, logs.CANDIDATES)]
    seen = [list(columns["item_id"][i : i + 4]) for i in range(0, num_rows, logs.CANDIDATES)]
    columns = columns | {
        # Zero but where a candidate was shown.
        "engaged_for": np.where(shown, rng.gamma(2.0, size=num_rows), 0.0),
        # The same, and often zero even there.
        "answered": np.where(shown & (rng.random(num_rows) < 0.4), 1.0 + rng.random(num_rows), 0.0),
        "expensive": pa.array(noise, mask=stage == "retrieved"),
        "echo": [5.0 * bool(y) + 0.3 * n for y, n in zip(click, noise, strict=True)],
        "final_score": noise,
        "num_clicks": np.repeat(clicks, logs.CANDIDATES),
        "seen_items": [seen[row // logs.CANDIDATES] for row in range(num_rows)],
        "note": [f"some words about the number {i} and what it is" for i in range(num_rows)],
        "published_at": pa.array(logs.START - np.array(columns["item_id"]), pa.timestamp("s")),
        "embedding": [[0.5, float(i)] for i in columns["item_id"]],
        "extra": [{"a": 1}] * num_rows,
        "nothing": pa.nulls(num_rows, pa.float64()),
        "honest": noise,
    }  # fmt: skip
    text, config = infer(tmp_path, logs.table_of(columns))
    reasons = left_out(text)
    for name, reason in {
        "engaged_for": "shown",
        "answered": "nearly always the same where a candidate was not shown",
        "expensive": "missing where a candidate was not passed: too late for an early ranker",
        "echo": "",
        "final_score": "CHECK: a model's output?",
        "num_clicks": "goes with the number of 'click' in the request",
        "seen_items": "are candidates of the same request",
        "note": "an id or text",
        "published_at": "a time",
        "embedding": "a column for each",
        "extra": "struct",
        "nothing": "never known",
    }.items():
        assert reason in reasons[name], name
        assert name not in config.data.features
    assert features_of(config)["honest"] == ("candidate", "dense")


def test_numbers_called_like_what_users_do(columns, tmp_path):
    rng = np.random.default_rng(0)
    num_rows = len(columns["item_id"])
    more = {"share": rng.integers(0, 4, size=num_rows), "watch_time": rng.gamma(2.0, size=num_rows)}
    text, config = infer(tmp_path, logs.table_of(columns | more))
    assert "called like a label, but not 0 or 1" in left_out(text)["share"]
    # It tells nothing of the labels, so that it may be of the past.
    assert config.data.features.watch_time.kind == "dense"
    assert check_of(text, "data.features.watch_time") == "known only afterwards?"


def test_lists_of_labels_of_the_shown_alone(columns, tmp_path):
    # Nothing but items is different for each candidate of a request.
    some_columns = without(columns, "trace", "title", "duration", "retrieval_score_7d")
    table = logs.table_of(some_columns, "request")
    some = [[1, 0] * (1 + row % 3) for row in range(table.num_rows)]
    text, config = infer(tmp_path, table.append_column("finished", pa.array(some)))
    assert "labels? 0 and 1" in left_out(text)["finished"]
    assert config.data.rows == "request"


def test_many_values_are_hashed(columns, tmp_path):
    query = [f"q{row % 11_000}" for row in range(len(columns["item_id"]))]
    _, config = infer(tmp_path, logs.table_of(columns | {"match": query}))
    assert config.data.features.match.hashed
    assert not config.data.features.country.hashed


def test_there_is_room_for_one_history(columns, tmp_path):
    other = [each[::-1] for each in columns["recent_items"]]
    text, config = infer(tmp_path, logs.table_of({"other": other} | columns))
    assert config.data.features.recent_items.kind == "history"
    assert "another history than 'recent_items'" in left_out(text)["other"]


def test_names_that_python_and_ruff_stumble_over(columns, tmp_path):
    rng = np.random.default_rng(0)
    num_rows = len(columns["item_id"])
    odd = [
        "class", "items", "get", "7 days", "ä ö", "日本", 'say "x"', "it's", "both ' and \"\"",
        "back\\slash", "new\nline", "dots.in.it", "a" * 90, "b" * 200, "_", "-", "x y", "x.y",
        "word " * 30,
    ]  # fmt: skip
    columns = dict(columns) | {name: rng.normal(size=num_rows) for name in odd}
    columns["request'id"] = columns.pop("request_id")
    columns['user "id"'] = columns.pop("user_id")
    columns["c" * 85] = [f"{'v' * 70}{i}" for i in rng.integers(3, size=num_rows)]
    _, config = infer(tmp_path, logs.table_of(columns))
    read = {each.column or name for name, each in config.data.features.items()}
    assert set(odd) <= read
    assert config.data.columns.request == "request'id"
    assert config.data.columns.user == 'user "id"'
    assert_formatted(tmp_path / "configs/feed.py")


@pytest.mark.parametrize(
    ("click", "like"), [("点击", "购买"), ("geöffnet", "Größe"), ("is_?!", "was ?!"), ("कि", "कु")]
)
def test_names_of_any_script_are_kept_apart(columns, tmp_path, click, like):
    """Two labels, their teachers, and two features whose names differ in one letter or mark."""
    columns = dict(columns)
    new = {"click": click, "like": like, "country": f"{click} 1", "device": f"{like} 1"}
    new |= {f"teacher_probability_{task}": f"p_{new[task]}" for task in logs.TASKS}
    columns |= {name: columns.pop(old) for old, name in new.items()}
    _, config = infer(tmp_path, logs.table_of(columns))
    labels, teacher = config.data.labels.to_dict(), config.data.teacher.to_dict()
    assert sorted(labels.values()) == sorted([click, like])
    assert {labels[task]: of for task, of in teacher.items()} == {
        click: f"p_{click}",
        like: f"p_{like}",
    }
    assert config.tasks == tuple(labels)
    if click.isidentifier():
        assert {*labels} == {click.lower(), like.lower()}
    read = {each.column or name for name, each in config.data.features.items()}
    assert {f"{click} 1", f"{like} 1"} <= read
    config.data.dir, config.data.allow = str(tmp_path / "datasets"), ("few_positives",)
    directory = api.prepare(config).directory
    report = json.loads((directory / "data_report.json").read_text())
    assert {*report["labels"]["tasks"]} == {*labels}
    for name, each in config.data.features.items():
        if each.column in (f"{click} 1", f"{like} 1"):
            kept = pq.read_table(directory / f"vocabularies/feature-{name}.parquet")["value"]
            assert {*kept.to_pylist()} == {*columns[each.column]}


def test_files_that_differ(columns, tmp_path):
    table = logs.table_of(columns)
    half = table.num_rows // 2
    folder = tmp_path / "feed"
    logs.write(table.slice(0, half), folder / "a", files=1)
    other = table.slice(half).drop_columns(["age"])
    other = other.set_column(
        other.column_names.index("country"), "country", pa.array(range(other.num_rows))
    )
    logs.write(other, folder / "b", files=2)
    text, config = infer(tmp_path, path=str(folder))
    reasons = left_out(text)
    assert reasons["age"] == "missing in 2 of 3 files"
    assert reasons["country"] == "files disagree on its type: int64, string"
    assert config.data.columns.request == "request_id"


def test_columns_that_the_user_names_are_taken(columns, tmp_path):
    columns = dict(columns)
    columns["shelf"] = columns.pop("item_id")
    columns["item_id"] = np.arange(len(columns["shelf"]))
    _, config = infer(tmp_path, logs.table_of(columns), columns__item="shelf")
    assert config.data.columns.item == "shelf"
    assert config.data.columns.user == "user_id"


@pytest.mark.parametrize("url", ["glob", "file", "memory"])
def test_globs_single_files_and_urls(columns, tmp_path, url):
    table = logs.table_of(core(columns))
    folder = logs.write(table, tmp_path / "feed", files=1)
    if url == "memory":
        files = fsspec.filesystem("memory")
        files.pipe("/store/feed.parquet", (folder / "part-000.parquet").read_bytes())
    path = {
        "glob": f"{folder}/part-*.parquet",
        "file": str(folder / "part-000.parquet"),
        "memory": "memory://store/feed.parquet",
    }[url]
    _, config = infer(tmp_path, path=path)
    assert config.data.path == path
    assert config.data.columns.item == "item_id"


def test_what_cannot_be_read_is_one_line(tmp_path):
    empty, other, no_rows = tmp_path / "empty", tmp_path / "other", tmp_path / "no_rows"
    empty.mkdir()
    other.mkdir()
    (other / "a.parquet").write_text("no Parquet")
    logs.write(pa.table({"a": pa.array([], pa.int64())}), no_rows, files=1)
    assert "data.path is empty" in fault_of(tmp_path, path="")
    assert "does not exist" in fault_of(tmp_path, path=str(tmp_path / "absent"))
    assert "matches no file" in fault_of(tmp_path, path=str(tmp_path / "absent*.parquet"))
    assert "holds no file that ends in .parquet" in fault_of(tmp_path, path=str(empty))
    assert "a.parquet cannot be read as Parquet" in fault_of(tmp_path, path=str(other))
    assert "have no rows" in fault_of(tmp_path, path=str(no_rows))
    assert "cannot be read" in fault_of(tmp_path, path="nowhere://bucket/feed")


def test_a_log_without_requests_or_items_says_which_key_to_set(columns, tmp_path):
    rng = np.random.default_rng(0)
    plain = {"price": rng.normal(size=500), "color": rng.choice(["red", "blue"], size=500)}
    path = str(logs.write(logs.table_of(plain), tmp_path / "plain", files=1))
    message = fault_of(tmp_path, path=path)
    assert "--config.data.columns.request=COLUMN" in message
    assert "it has: price (double), color (string)" in message
    no_item = without(columns, "item_id", "title", "trace", "position", "author_id")
    path = str(logs.write(logs.table_of(no_item), tmp_path / "no_item"))
    assert "--config.data.columns.item=COLUMN" in fault_of(tmp_path, path=path)
    message = fault_of(tmp_path, path=path, columns__item="itemid")
    assert "data.columns.item='itemid' is no column" in message


def test_a_file_that_is_there_is_not_overwritten(columns, tmp_path):
    table = logs.table_of(core(columns))
    infer(tmp_path, table)
    file = tmp_path / "configs/feed.py"
    file.write_text("mine")
    with pytest.raises(UserError, match=r"feed\.py exists already; move it away"):
        infer(tmp_path, table)
    assert file.read_text() == "mine"


def test_the_entry_point_says_where_the_file_is_and_what_to_run_next(columns, tmp_path):
    path = logs.write(logs.table_of(columns), tmp_path / "feed")
    finished = small.run(
        "-m", "experiments.prepare_data", "--config=configs/parquet.py",
        f"--config.data.path={path}", "--config.data.infer=True", f"--workdir={tmp_path}",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    first, *rest = finished.stdout.splitlines()
    assert first == f"config: {tmp_path / 'feed.py'}"
    assert f"    python -m experiments.prepare_data --config={tmp_path / 'feed.py'}" in rest
    assert load(tmp_path / "feed.py").data.columns.item == "item_id"


def sampled(log: sample.Footers, folder: Path) -> tuple[DuckDb, sample.Sample]:
    engine = DuckDb(ibis.duckdb.connect(threads=1), folder)
    return engine, sample.read_sample(engine, log)


def test_a_sample_is_bounded_and_spread(columns, tmp_path):
    path = logs.write(logs.table_of(columns), tmp_path / "feed", row_group_size=900)
    log = sample.open_log(str(path))
    with mock.patch.object(sample, "MAX_ROWS", 3000):
        engine, read = sampled(log, tmp_path)
    met = engine.fetch(read.table)["request_id"].to_numpy()
    assert 2000 < read.file_rows == len(met) <= 3000
    requests = np.array(columns["request_id"])
    # From the first request to the last row group.
    assert met.min() == requests[0]
    assert met.max() > requests[-900]
    with mock.patch.object(sample, "MAX_CELLS", 60_000):
        assert sampled(log, tmp_path)[1].file_rows * len(log.types) < 90_000
    with mock.patch.object(sample, "MAX_BYTES", 500_000):
        assert sampled(log, tmp_path)[1].file_rows < 0.5 * log.num_rows


def test_requests_that_a_sample_cuts_off_do_not_count_for_the_funnel(columns, tmp_path):
    path = logs.write(logs.table_of(columns), tmp_path / "feed", row_group_size=1000)
    # Some 80 rows of a row group: hardly more than one whole request, and two parts of others.
    with mock.patch.object(sample, "MAX_ROWS", 2000):
        text, config = infer(tmp_path, path=str(path))
    assert re.search(r"Guessed from (1,9\d\d|2,000) of 12,000 rows", text)
    funnel = config.funnel
    sizes = (funnel.retrieved, funnel.passed, funnel.shown)
    assert sizes == (logs.CANDIDATES, logs.PASSED, logs.SHOWN)


def test_a_column_may_be_called_owner(columns, tmp_path):
    _, config = infer(tmp_path, logs.table_of(columns | {"owner": columns["author_id"]}))
    assert "owner" in config.data.features
    funnel = config.funnel
    sizes = (funnel.retrieved, funnel.passed, funnel.shown)
    assert sizes == (logs.CANDIDATES, logs.PASSED, logs.SHOWN)


def test_files_of_an_archive_are_not_taken_for_those_read_before(columns, tmp_path):
    files = sorted(logs.write(logs.table_of(core(columns)), tmp_path / "feed").iterdir())
    with zipfile.ZipFile(tmp_path / "feed.zip", "w") as archive:
        for file in files:
            archive.write(file, file.name)
    log = sample.open_log(f"zip://*.parquet::{tmp_path / 'feed.zip'}").log
    engine = DuckDb(ibis.duckdb.connect(threads=1), tmp_path)
    for name, file in zip(log.files, files, strict=True):
        rows = engine.fetch(engine.rows_of(dataclasses.replace(log, files=(name,)), [0]))
        assert rows["item_id"].equals(pq.read_table(file)["item_id"])


def test_rows_in_any_order(columns, tmp_path):
    table = logs.table_of(columns)
    table = table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows)))
    _, config = infer(tmp_path, table)
    assert config.data.columns.request == "request_id"
    assert features_of(config) == FEATURES


def test_more_requests_are_read_to_tell_users_from_contexts(columns, tmp_path):
    path = logs.write(logs.table_of(columns), tmp_path / "feed")
    log = sample.open_log(str(path))
    names = ["user_id", "age", "country", "hour"]
    engine = DuckDb(ibis.duckdb.connect(threads=1), tmp_path)
    read = engine.keep("read", sample.read_requests(engine, log, "request_id", names))
    found = engine.fetch(read).to_pandas()
    found = found.set_index("request_id").sort_index()[names]
    frame = pd.DataFrame({name: columns[name] for name in ("request_id", *names)})
    expected = frame.drop_duplicates("request_id").set_index("request_id").sort_index()
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)


@pytest.mark.parametrize("rows", ["candidate", "request"])
def test_the_dataset_is_built_from_the_config_as_it_is(columns, tmp_path, rows):
    _, config = infer(tmp_path, logs.table_of(columns, rows))
    config.data.dir = str(tmp_path / "datasets")
    config.data.allow = ("few_positives",)
    directory = api.prepare(config).directory
    splits = tfds.builder_from_directory(directory).info.splits
    assert sum(splits[split].num_examples for split in SPLITS) == logs.REQUESTS


TYPES = st.sampled_from([
    pa.int8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(),
    pa.string(), pa.large_string(), pa.binary(), pa.timestamp("us"), pa.date32(), pa.time64("us"),
    pa.decimal128(9, 2), pa.null(), pa.list_(pa.int64()), pa.list_(pa.string()),
    pa.large_list(pa.float32()), pa.list_(pa.int32(), 3), pa.list_(pa.list_(pa.int64())),
    pa.struct([("a", pa.int64())]), pa.dictionary(pa.int32(), pa.string()),
])  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """Tables of any types, that may look like a log or not."""
    num_rows = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrays = {}
    if draw(st.booleans()):
        arrays["request_id"] = pa.array(np.sort(rng.integers(6, size=num_rows)))
        arrays["item_id"] = pa.array(rng.permutation(num_rows))
    for name in draw(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=6)):
        if name.isprintable() and name not in arrays:
            arrays[name] = array_of(rng, draw(TYPES), num_rows, draw(st.integers(1, 70)))
    arrays.setdefault("x", pa.array(rng.normal(size=num_rows)))
    return pa.table(arrays)


def array_of(rng: np.random.Generator, of: pa.DataType, number: int, distinct: int) -> pa.Array:
    """Values of a type, with nulls among them and at most so many different ones."""
    known = rng.random(number) < rng.choice([0.0, 0.5, 1.0])
    codes = rng.integers(distinct, size=number)

    def value(code: int, of: pa.DataType) -> Any:
        if pa.types.is_dictionary(of):
            return f"d{code}"
        if pa.types.is_fixed_size_list(of):
            return [code] * 3
        if hasattr(of, "value_type"):
            return [value(code + i, of.value_type) for i in range(code % 4)]
        if pa.types.is_struct(of):
            return {"a": code}
        if pa.types.is_floating(of) or pa.types.is_decimal(of):
            return float("nan") if code % 7 == 3 and pa.types.is_floating(of) else code / 2
        if pa.types.is_boolean(of):
            return bool(code % 2)
        if pa.types.is_binary(of):
            return bytes([code, 255])
        return f"s{code}" if pa.types.is_string(of) or pa.types.is_large_string(of) else code

    if pa.types.is_null(of):
        return pa.nulls(number)
    values = [value(int(c), of) if k else None for c, k in zip(codes, known, strict=True)]
    if pa.types.is_decimal(of):
        return pa.array(values, pa.float64()).cast(of)
    if pa.types.is_float16(of):
        return pa.array([None if v is None else np.float16(v) for v in values], of)
    if pa.types.is_dictionary(of):
        return pa.array(values, pa.string()).dictionary_encode()
    return pa.array(values, of)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(table=tables())
def test_any_table_gives_a_config_or_one_line(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    pq.write_table(table, folder / "feed.parquet", row_group_size=25)
    config = parquet()
    log = sample.open_log(str(folder / "feed.parquet"))
    text, message = "", ""
    try:
        text = first_config.config_text("feed", log, config)
    except UserError as error:
        message = str(error)
    if message:
        assert "\n" not in message
        return
    names: dict[str, Any] = {}
    exec(compile(text, "feed.py", "exec"), names)
    data = names["get_config"]().data
    used = {*data.columns.values(), *data.labels.values(), *data.teacher.values()} - {""}
    used |= {each.column or name for name, each in data.features.items()}
    assert used <= set(table.column_names)


def cells(columns: dict[str, Any], folder: Path) -> facts.Cells:
    """The cells of columns of whole numbers; -1 is none."""
    arrays = {name: pa.array(x, mask=np.array(x) < 0) for name, x in columns.items()}
    place = pa.array(range(len(next(iter(columns.values())))))
    pq.write_table(pa.table(arrays | {sample.AT: place}), folder / "cells.parquet")
    engine = DuckDb(ibis.duckdb.connect(threads=1), folder)
    table = engine.backend.read_parquet(folder / "cells.parquet")
    return facts.make_cells(engine, table, "cells")


def test_agreement_is_one_minus_differing_over_expected(tmp_path):
    rng = np.random.default_rng(0)
    owner = rng.integers(-1, 40, size=300)
    of_owner = np.where(rng.random(300) < 0.1, rng.integers(-1, 4, size=300), owner % 5)
    columns = {"owner": owner, "same": of_owner, "any": rng.integers(-1, 3, size=300)}
    of = cells(columns, tmp_path)
    found = of.within(of.owners("owner")).loc["owner"]
    for name in ("same", "any"):
        frame = pd.DataFrame({"value": columns[name], "owner": owner})
        chance = float((frame[frame.value >= 0].value.value_counts(normalize=True) ** 2).sum())
        groups = frame[(frame.value >= 0) & (frame.owner >= 0)].groupby("owner").value
        differing = sum(len(group) - group.value_counts().max() for _, group in groups)
        expected = sum(len(group) - 1 for _, group in groups) * (1 - chance)
        assert found.owners[name] == sum(len(group) > 1 for _, group in groups)
        assert found.expected[name] == pytest.approx(expected)
        assert found.kappa[name] == pytest.approx(1 - differing / expected)
        distinct = sum(group.nunique() for _, group in groups)
        assert found.repeats[name] == pytest.approx(
            1 - distinct / sum(map(len, dict(list(groups)).values()))
        )


def test_a_rare_label_does_not_belong_to_its_item(tmp_path):
    """It is the same nearly wherever the item is; so it is anywhere."""
    rng = np.random.default_rng(0)
    item = rng.integers(1000, size=20_000)
    label = (rng.random(20_000) < 0.01).astype(int)
    flag = (rng.random(1000) < 0.01).astype(int)[item]
    of = cells({"item": item, "label": label, "flag": flag}, tmp_path)
    found = of.within(of.owners("item")).constant["item"]
    assert not found["label"]
    assert found["flag"]


def test_permutations_are_counted_group_by_group(tmp_path):
    numbers = [[0, 1, 2], [2, 1, 3], [1, 2, 4], [0, 0, 1], [2, 3], [5], [1, 0]]
    owner = [group for group, of in enumerate(numbers) for _ in of]
    order = np.random.default_rng(0).permutation(len(owner))
    columns = {"owner": np.array(owner)[order], "number": np.concatenate(numbers)[order]}
    of = cells(columns, tmp_path)
    # Of the six groups of two or more, the first, the second and the last count from 0 or 1.
    assert of.within(of.owners("owner")).counting["owner", "number"] == 3 / 6


def test_a_few_rows_prove_nothing():
    # 0.3 ^ 9 is below 0.001 / 20, and 0.3 ^ 8 is not.
    assert rules.is_no_chance(9, 0.3, tests=20)
    assert not rules.is_no_chance(8, 0.3, tests=20)


def open_bandit(has_request: bool) -> dict[str, Any]:
    """Columns like those of raw Open Bandit: a row an impression, and 80 sparse counts."""
    rng = np.random.default_rng(0)
    rows, items, groups = 9_000, 34, 240
    page = np.repeat(np.arange(rows // 3), 3)
    group = rng.integers(groups, size=rows // 3)[page]
    time = logs.START * 10**6 + 20_000_000 * page + rng.integers(3_000_000, size=rows)
    columns: dict[str, Any] = {
        "timestamp": pa.array(time, pa.timestamp("us", "UTC")),
        "item_id": np.concatenate([rng.choice(items, 3, replace=False) for _ in range(rows // 3)]),
        "position": np.concatenate([rng.permutation(3) + 1 for _ in range(rows // 3)]),
        "click": (rng.random(rows) < 0.004).astype(int),
        "propensity_score": np.exp(-3.5 + 0.2 * rng.normal(size=rows)),
    }
    for number, values in enumerate((4, 6, 10, 10)):
        hashes = np.array([f"{rng.integers(2**62):032x}" for _ in range(values)])
        columns[f"user_feature_{number}"] = hashes[rng.integers(values, size=groups)[group]]
    for number in range(80):
        counts = rng.poisson(1.0, size=rows) * (rng.random(rows) < rng.choice([3e-4, 0.01, 0.05]))
        columns[f"user-item_affinity_{number}"] = counts.astype(float)
    return {"request_id": page} | columns if has_request else columns


@pytest.mark.parametrize("has_request", [True, False])
def test_names_outdo_sparse_counts_that_coincide(tmp_path, has_request):
    """Of 80 columns that are nearly always 0, some are 1 where one position was, say."""
    columns = open_bandit(has_request)
    text, config = infer(tmp_path, logs.table_of(columns))
    data = config.data
    found = data.columns.to_dict()
    expected = dict.fromkeys(found, "") | {
        "request": "request_id" if has_request else "",
        "item": "item_id",
        "time": "timestamp",
        "position": "position",
        "propensity": "propensity_score",
    }
    # No column of the log holds users: what comes nearest to it is to be checked, if anything.
    expected["user"] = found["user"]
    assert found == expected
    assert bool(check_of(text, "data.columns.user")) is (not has_request or found["user"] != "")
    assert data.labels.to_dict() == {"click": "click"}
    assert data.teacher.to_dict() == {}
    features = features_of(config)
    affinities = {name for name in features if name.startswith("user_item_affinity_")}
    assert len(affinities) == sum(np.any(columns[name]) for name in columns if "affinity" in name)
    assert "was each of them shown?" in check_of(text, "data.columns.stage")
    assert bool(check_of(text, "data.columns.request")) is not has_request
    # Positions say how many a page has.
    if has_request:
        assert config.funnel.shown == 3
    assert check_of(text, "config.funnel.shown")


def test_pages_of_two(columns, tmp_path):
    """Positions of 0 and 1 are no label."""
    two = [position if position in (0, 1) else None for position in columns["position"]]
    stage = np.where([each is None for each in two], "passed", "shown")
    _, config = infer(tmp_path, logs.table_of(columns | {"position": two, "stage": stage}))
    assert config.data.columns.position == "position"
    assert "position" not in config.data.labels


def test_a_request_far_larger_than_the_rest_is_a_remark(columns, tmp_path):
    place = np.arange(len(columns["stage"]))
    kept = (columns["stage"] == "shown") | (place % logs.CANDIDATES < 2)
    text, config = infer(tmp_path, logs.table_of(columns).filter(pa.array(kept)))
    assert "the largest request" not in check_of(text, "config.funnel.retrieved")
    kept |= place < logs.CANDIDATES  # the whole of the first request
    sizes = np.sort(np.bincount(place[kept] // logs.CANDIDATES))
    hint = (
        f"largest request has {logs.CANDIDATES} candidates; the median is {sizes[99]}, the 99.9% "
        f"quantile {sizes[198]}: if it is an error, set config.funnel.retrieved={sizes[198]}, "
    )
    (tmp_path / "configs/feed.py").unlink()
    text, config = infer(tmp_path, logs.table_of(columns).filter(pa.array(kept)))
    assert f"the {hint}" in check_of(text, "config.funnel.retrieved")
    assert config.funnel.retrieved == logs.CANDIDATES
    config.data.dir, config.data.allow = str(tmp_path / "datasets"), ("few_positives",)
    report = json.loads((api.prepare(config).directory / "data_report.json").read_text())
    assert [remark for remark in report["remarks"] if remark.startswith(f"The {hint}")]
    of_each = report["requests"]["candidates_a_request"]["quantiles"]
    levels = [float(q) for q in of_each]
    assert [*of_each.values()] == np.quantile(sizes, levels, method="lower").tolist()


def test_steps_suit_the_size_of_the_log(columns, tmp_path):
    with mock.patch.object(funnel, "_LEAST_STEPS", 1):
        _, config = infer(tmp_path, logs.table_of(core(columns)))
    # Ten passes over 160 training requests, 32 or 128 a step.
    assert (config.batch.requests, config.teacher.batch.requests) == (32, 128)
    assert (config.train.steps, config.teacher.train.steps) == (50, 20)
