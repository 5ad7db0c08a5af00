"""A log that is written back with the columns of a teacher that was trained on its dataset."""

import json
import math
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from kd_ranker import api, manifest
from kd_ranker.errors import UserError
from kd_ranker.evaluation.evaluate import Ranker, Served
from kd_ranker.pipeline import datasets, scoring, teachers
from kd_ranker.pipeline.teachers import Teacher
from kd_ranker.requests import storage
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs import ordered, write_back
from tests import small
from tests.sources import faulty_logs
from tests.sources.faulty_logs import TASKS, make_rows, write_log

VERSION = "0123456789ab"
ADDED = ["teacher_probability_watch_scored", "teacher_probability_like_scored"]
ADDED_VERSION = "teacher_version_scored"


def stub_teacher(*unused: Any) -> Teacher:
    """A teacher whose probability of a candidate depends on all that it may know of it."""

    def serve(parameters: Any, batch: Any, items: Any) -> Served:
        of_item = np.asarray(items.features)[np.maximum(np.asarray(batch.item_id), 0)].sum(-1)
        of_request = np.asarray(batch.user_features).sum(-1) + 0.37 * np.asarray(batch.user_id)
        history = 0.11 * np.asarray(batch.history_id).sum(-1)
        of_candidate = np.asarray(batch.candidate_features).sum(-1) + of_item
        logit = of_candidate + (of_request + history)[:, None] + 0.7 * np.asarray(batch.item_id)
        both = np.stack([0.1 * logit, 0.2 * logit + 1], -1)
        return Served({"user": (1 / (1 + np.exp(-both))).astype(np.float32)}, {})

    ranker = Ranker(serve, None)  # type: ignore[arg-type]
    return Teacher(None, None, ranker, VERSION, 0, 0)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    for module in (scoring, teachers):
        monkeypatch.setattr(module, "load_teacher", stub_teacher)


def make_config(folder: Path, by_request: bool = False, **options: Any) -> ConfigDict:
    """A config of a log with faults in three files, its dataset built; has `teacher_version`."""
    rows = make_rows(3, requests=40, faults=0.05, texts=True)
    log = write_log(folder / "log", rows, by_request, files=3, row_group=16, shuffle=5)
    for file in log.iterdir():
        # Something that no config names, and what only a file's writer knows.
        table = pq.read_table(file)
        name = "teacher_version" if file.name == "part-0.parquet" else "note"
        table = table.append_column(name, pa.array([f"{i}" for i in range(len(table))]))
        table = table.replace_schema_metadata({"writer": f"of {file.name}"})
        pq.write_table(table, file, row_group_size=16)
    config = faulty_logs.config(log, folder / "datasets", **options)
    config.data.rows = "request" if by_request else "candidate"
    config.evaluation.requests = 8
    api.prepare(config)
    return config


def copy_scores(config: ConfigDict) -> dict[tuple[int, Any], np.ndarray]:
    """(time, item as in the log) -> the probabilities in the scored copy of the dataset."""
    copy = datasets.dataset_of(config, VERSION)
    table = pd.read_parquet(datasets.dataset_of(config).directory / "vocabularies/item.parquet")
    items = dict(zip(table["id"], table["value"], strict=True))
    return {
        (request.time, items[item]): probability
        for split in SPLITS
        for request in read_requests(copy, split)
        for item, probability in zip(request.item_id, request.teacher_probability, strict=False)
    }


def written_rows(directory: Path, by_request: bool) -> list[dict[str, Any]]:
    """The candidates of the scored log: its columns, and whether the row has a version."""
    rows = []
    for file in sorted(directory.glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            if not by_request:
                rows.append(row)
                continue
            lists = [name for name in ("item_id", *ADDED) if row[name] is not None]
            assert len({len(row[name]) for name in lists}) <= 1
            rows += [
                row | {name: row[name][place] for name in lists}
                for place in range(len(row["item_id"] or []))
            ]
    return rows


@pytest.mark.parametrize("stage", ["shown", "passed", "retrieved"])
@pytest.mark.parametrize("by_request", [False, True])
def test_a_row_has_the_probability_of_its_candidate_in_the_copy(tmp_path, by_request, stage):
    config = make_config(tmp_path, by_request)
    config.teacher.stage = stage
    logged = api.log_teacher(config)
    assert logged.log.columns == (*ADDED, ADDED_VERSION)
    expected = copy_scores(config)
    # Of a request whose rows have several times, the copy knows the earliest, a full minute.
    found, unscored = {}, 0
    for row in written_rows(logged.log.directory, by_request):
        if row[ADDED[0]] is None:
            assert row[ADDED[1]] is None
            unscored += 1
            continue
        assert row[ADDED_VERSION] == VERSION
        time = row["time"] - (row["time"] - 1_000_000) % 60
        # Each candidate of the copy is one row of the log.
        assert (time, row["item_id"]) not in found
        found[time, row["item_id"]] = [row[name] for name in ADDED]
    assert found.keys() == expected.keys()
    copy = datasets.dataset_of(config, VERSION)
    for split in SPLITS:
        for request in read_requests(copy, split):
            reached = {
                "shown": len(request.user_label),
                "passed": request.num_passed,
                "retrieved": len(request.item_id),
            }
            # What models are measured on is scored whole.
            number = reached[stage if split == "train" else "retrieved"]
            assert len(request.teacher_probability) == number
    assert len(found) > 100
    assert unscored > 10
    np.testing.assert_array_equal([*found.values()], [expected[key] for key in found])
    assert len({tuple(pair) for pair in found.values()}) > 0.9 * len(found)


def test_the_teacher_is_asked_for_all_that_was_used_and_for_nothing_that_was_rejected(tmp_path):
    config = make_config(tmp_path)
    config.teacher.stage = "retrieved"
    logged = api.log_teacher(config)
    rejected = datasets.dataset_of(config).directory / "rejected"
    nulls = {
        (name, row)
        for name in ("part-0", "part-1", "part-2")
        for row, value in enumerate(
            pq.read_table(logged.log.directory / f"{name}.parquet")[ADDED_VERSION].to_pylist()
        )
        if value is None
    }
    table = pd.concat([pd.read_parquet(file) for file in rejected.iterdir()])
    assert nulls == {
        (Path(file).stem, row) for file, row in zip(table["file"], table["row"], strict=True)
    }


def assert_same(before: pa.Table, after: pa.Table) -> None:
    assert after.schema.equals(before.schema, check_metadata=True)
    for name in before.schema.names:
        # As text, in which NaN is the same as NaN and no null.
        assert repr(after[name].to_pylist()) == repr(before[name].to_pylist())


@pytest.mark.parametrize("by_request", [False, True])
def test_all_that_was_in_the_log_is_as_it_was(tmp_path, by_request):
    config = make_config(tmp_path, by_request)
    directory = api.log_teacher(config).log.directory
    assert directory == Path(config.data.dir) / "scored" / datasets.dataset_name(config, VERSION)
    type_ = pa.list_(pa.float32()) if by_request else pa.float32()
    for file in Path(config.data.path).iterdir():
        before, after = pq.read_table(file), pq.read_table(directory / file.name)
        number = len(before.schema)
        assert_same(before, after.select(range(number)))
        assert after.schema.names[number:] == [*ADDED, ADDED_VERSION]
        assert after.schema.types[number:] == [type_, type_, pa.string()]
        assert after.schema.metadata == {b"writer": f"of {file.name}".encode()}


def test_columns_have_their_plain_names_where_the_log_has_none_of_these(tmp_path):
    config = make_config(tmp_path)
    for file in Path(config.data.path).iterdir():
        table = pq.read_table(file)
        names = [name for name in table.schema.names if not name.startswith("teacher_")]
        pq.write_table(table.select(names), file)
    config.data.teacher = ConfigDict()
    config.data.test_share = 0.2
    api.prepare(config)
    logged = api.log_teacher(config)
    assert logged.log.columns == (
        "teacher_probability_watch", "teacher_probability_like", "teacher_version",
    )  # fmt: skip
    (first, *_) = sorted(logged.log.directory.glob("*.parquet"))
    assert pq.read_table(first)["teacher_version"].null_count < len(pq.read_table(first))


@pytest.mark.parametrize("kind", ["types", "nested", "empty"])
def test_odd_files_are_written_back_as_they_are(tmp_path, kind):
    log = write_log(tmp_path / "log", make_rows(3, requests=40), files=2)
    extra = log / "day=1" / "part-9.parquet"
    if kind == "empty":
        extra.parent.mkdir()
        pq.write_table(pq.read_table(log / "part-1.parquet").slice(0, 0), extra)
    elif kind == "nested":
        extra.parent.mkdir()
        (log / "part-1.parquet").rename(extra)
    else:
        extra = log / "part-1.parquet"
        table = pq.read_table(extra)
        number = len(table)
        for name, array in {
            "nanoseconds": pa.array(range(number), pa.timestamp("ns", "Europe/Paris")),
            "bytes": pa.array([b"\x00\xff"] * number, pa.binary(2)),
            "decimal": pa.array([None, *range(number - 1)], pa.decimal128(30, 4)),
            "codes": pa.array(["a", None] * number, pa.string())[:number].dictionary_encode(),
            "struct": pa.array([{"a": [1, None], "b": None}] * number),
            "large": pa.array(["x"] * number, pa.large_string()),
            "nan": pa.array([math.nan, None] * number, pa.float32())[:number],
        }.items():
            table = table.append_column(pa.field(name, array.type, metadata={"k": name}), array)
        pandas = {b"pandas": pa.Schema.from_pandas(table.to_pandas()).metadata[b"pandas"]}
        pq.write_table(table.replace_schema_metadata(pandas), extra)
    config = faulty_logs.config(log, tmp_path / "datasets")
    api.prepare(config)
    directory = api.log_teacher(config).log.directory
    before, after = (
        pq.read_table(root / extra.relative_to(log), partitioning=None) for root in (log, directory)
    )
    number = len(before.schema)
    assert_same(before, after.select(range(number)))
    assert len(pd.read_parquet(directory / extra.relative_to(log))) == len(before)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_run_that_was_killed_goes_on_with_the_files_that_are_missing(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    whole = contents(api.log_teacher(config).log.directory)
    directory = api.log_teacher(config).log.directory
    for file in directory.glob("*.parquet"):
        file.unlink()

    class Killed(BaseException):
        pass

    class Writer(pq.ParquetWriter):
        batches = 0

        def write_batch(self, *arguments, **options):
            Writer.batches += 1
            # In the midst of the second file, which has more batches than that.
            if Writer.batches > rows_of_first + 2:
                raise Killed
            super().write_batch(*arguments, **options)

    first = pq.ParquetFile(Path(config.data.path) / "part-0.parquet")
    rows_of_first = first.num_row_groups
    assert rows_of_first > 3
    with monkeypatch.context() as patched:
        patched.setattr(write_back.pq, "ParquetWriter", Writer)
        with pytest.raises(Killed):
            api.log_teacher(config)
    assert [path.name for path in directory.glob("**/*.parquet")] == ["part-0.parquet"]
    before = os.stat(directory / "part-0.parquet").st_mtime_ns
    api.log_teacher(config)
    assert os.stat(directory / "part-0.parquet").st_mtime_ns == before
    assert contents(directory) == whole
    assert not [*Path(config.data.dir).glob(".scored-*")]


def test_a_run_that_was_killed_while_the_teacher_scored_goes_on_with_what_is_missing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(scoring, "_BATCHES", 1)
    config = make_config(tmp_path)
    logged = api.log_teacher(config)
    whole = contents(logged.log.directory)
    for directory in (logged.dataset, logged.log.directory):
        shutil.rmtree(directory)

    class Killed(BaseException):
        pass

    written, write = [], storage.write_shard

    def dying(path, *rest):
        if len(written) == 2:
            raise Killed
        written.append(path.name)
        write(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_shard", dying)
        with pytest.raises(Killed):
            api.log_teacher(config)
    assert not logged.dataset.exists()
    later = []
    monkeypatch.setattr(
        storage, "write_shard", lambda path, *rest: later.append(path.name) or write(path, *rest)
    )
    assert api.log_teacher(config) == logged
    assert len(later) >= 2
    assert not set(later) & set(written)
    assert contents(logged.log.directory) == whole


def test_a_second_run_reads_nothing_and_writes_nothing(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    logged = api.log_teacher(config)

    def broken(*arguments):
        raise AssertionError("it works again")

    for name in ("write_scores", "write_file"):
        monkeypatch.setattr(write_back, name, broken)
    assert api.log_teacher(config) == logged


def test_several_processes_change_nothing(tmp_path):
    config = make_config(tmp_path)
    directory = api.log_teacher(config).log.directory
    whole = contents(directory)
    for file in directory.glob("*.parquet"):
        file.unlink()
    config.data.processes = 2
    api.log_teacher(config)
    assert contents(directory) == whole


def test_files_are_completed_that_have_no_row_of_some_parts_of_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(ordered, "PIECE", 200)
    log = write_log(tmp_path / "log", make_rows(3, requests=400), files=3)
    config = faulty_logs.config(log, tmp_path / "datasets")
    directory = api.prepare(config).directory
    # In the order of time, as the log: the first part of the dataset is all in the first file.
    rows = [pq.read_table(file) for file in sorted((directory / "candidate_rows").iterdir())]
    assert any(set(of["file"].to_pylist()) == {0} for of in rows)
    directory = api.log_teacher(config).log.directory
    whole = contents(directory)
    for number in (1, 2):
        (directory / f"part-{number}.parquet").unlink()
    api.log_teacher(config)
    assert contents(directory) == whole


def fault_of(config: ConfigDict) -> str:
    with pytest.raises(UserError) as caught:
        api.log_teacher(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_log_that_has_changed_or_gone_is_refused_before_any_scoring(tmp_path):
    config = make_config(tmp_path)
    file = Path(config.data.path) / "part-1.parquet"
    kept = file.read_bytes()
    pq.write_table(pq.read_table(file).slice(1), file)
    assert "1 file written anew" in fault_of(config)
    file.write_bytes(kept)
    for path in Path(config.data.path).iterdir():
        path.unlink()
    assert "holds no file" in fault_of(config)
    assert not [*Path(config.data.dir).glob("requests/*-teacher-*")]
    assert not (Path(config.data.dir) / "scored").exists()


@pytest.mark.parametrize("stale", ["copy", "scored"])
def test_what_was_made_of_an_older_log_is_not_taken_for_that_of_the_new_one(tmp_path, stale):
    config = make_config(tmp_path)
    logged = api.log_teacher(config)
    folder = logged.dataset if stale == "copy" else logged.log.directory
    manifest = json.loads((folder / "log.json").read_text())
    (folder / "log.json").write_text(json.dumps(dict(list(manifest.items())[1:])))
    assert f"{folder} was made of the log as it was before; remove that folder" in fault_of(config)


def test_a_copy_of_other_requests_is_refused(tmp_path):
    config = make_config(tmp_path)
    dataset = datasets.dataset_of(config)
    api.log_teacher(config)
    log = Path(config.data.dir) / "scored"
    log.rename(tmp_path / "elsewhere")
    rows = dataset.directory / "candidate_rows" / "train-00000.parquet"
    table = pq.read_table(rows)
    pq.write_table(table.slice(1), rows)
    assert "candidate_rows/train-00000.parquet has changed" in fault_of(config)
    manifest.write(dataset.directory, {"dataset": dataset.directory.parent.name})
    assert "holds other requests" in fault_of(config)
    assert not [*log.rglob("*.parquet")]


def test_a_dataset_from_before_candidates_were_traced_is_to_be_made_anew(tmp_path):
    config = make_config(tmp_path)
    directory = datasets.dataset_of(config).directory
    (directory / "candidate_rows").rename(tmp_path / "elsewhere")
    assert "make it anew with: python -m experiments.prepare_data" in fault_of(config)


def test_files_of_a_glob_are_written_below_what_they_have_in_common(tmp_path):
    log = write_log(tmp_path / "log", make_rows(3, requests=40), files=2)
    for number in range(2):
        (tmp_path / f"day-{number}").mkdir()
        (log / f"part-{number}.parquet").rename(tmp_path / f"day-{number}" / "rows.data")
    config = faulty_logs.config(tmp_path / "day-*" / "*.data", tmp_path / "datasets")
    api.prepare(config)
    directory = api.log_teacher(config).log.directory
    assert sorted(str(path.relative_to(directory)) for path in directory.rglob("*.parquet")) == [
        "day-0/rows.data.parquet", "day-1/rows.data.parquet",
    ]  # fmt: skip


def test_a_log_of_another_file_system_is_written_to_this_machine(tmp_path):
    import fsspec

    config = make_config(tmp_path / "local")
    remote = fsspec.filesystem("memory")
    remote.put(str(config.data.path), "/scoring-log", recursive=True)
    elsewhere = config.copy_and_resolve_references()
    elsewhere.data.path = "memory://scoring-log"
    api.prepare(elsewhere)
    one, other = (api.log_teacher(of).log.directory for of in (config, elsewhere))
    for name in ("part-0.parquet", "part-1.parquet", "part-2.parquet"):
        assert (other / name).read_bytes() == (one / name).read_bytes()


def test_no_name_in_an_archive_leads_out_of_the_folder_that_is_written_to(tmp_path):
    log = write_log(tmp_path / "log", make_rows(3, requests=40), files=3)
    names = ("../../evil.parquet", "a/../../../b.parquet", "etc/c.parquet")
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as archive:
        for part, name in zip(sorted(log.iterdir()), names, strict=True):
            archive.writestr(name, part.read_bytes())
    config = faulty_logs.config(f"zip://**::{tmp_path}/log.zip", tmp_path / "data" / "sets")
    api.prepare(config)
    before = {*tmp_path.rglob("*.parquet")}
    directory = api.log_teacher(config).log.directory
    written = {*tmp_path.rglob("*.parquet")} - before
    names = {"evil.parquet", "b.parquet", "etc/c.parquet"}
    assert written == {directory / name for name in names}


def test_log_teacher_prints_where_both_lie(tmp_path, capsys):
    config = make_config(tmp_path)
    print(api.log_teacher(config))
    logged = api.log_teacher(config)
    assert capsys.readouterr().out.splitlines() == [
        f"dataset: {logged.dataset}",
        f"scored log: {logged.log.directory}",
        f"its new columns: {', '.join([*ADDED, ADDED_VERSION])}",
    ]


@pytest.mark.slow
def test_a_scored_log_is_a_log_with_a_teacher(tmp_path, monkeypatch):
    monkeypatch.undo()  # with a teacher of its own
    log = write_log(tmp_path / "log", make_rows(0, requests=60, faults=0.02), shuffle=1, files=2)
    config = faulty_logs.config(log, tmp_path / "datasets")
    config.data.teacher = ConfigDict()
    config.data.columns.teacher_version = config.data.teacher_version = ""
    config.parallel.devices = 1
    config.batch.requests, config.batch.candidates = 8, 12
    config.teacher.batch.update(requests=8, candidates=12)
    config.train.update(steps=6, log_every=3, checkpoint_every=6, eval_every=0)
    config.teacher.train.update(steps=6, log_every=3, checkpoint_every=6, eval_every=0)
    config.student.update(width=4, interests=2, hidden=(8,))
    config.teacher.update(width=4, attention_hidden=4, experts=2, expert_hidden=4, cross_layers=1)
    config.teacher.source, config.teacher.stage = "live", "retrieved"
    config.evaluation.requests = 8
    api.prepare(config)
    api.train_teacher(config, tmp_path / "teacher")
    config.teacher.workdir = str(tmp_path / "teacher")
    logged = api.log_teacher(config)

    again = config.copy_and_resolve_references()
    again.data.path = str(logged.log.directory)
    again.data.teacher = ConfigDict(dict(zip(TASKS, logged.log.columns, strict=False)))
    again.data.columns.teacher_version = logged.log.columns[-1]
    again.teacher.source, again.teacher.workdir = "logged", ""
    again.distill.mode = "aux"
    api.prepare(again)
    # The same requests with the same probabilities, as if the teacher lived elsewhere.
    dataset = datasets.dataset_of(config)
    copy = datasets.dataset_of(config, teachers.load_teacher(config, dataset).version)
    for split in SPLITS:
        one, other = (list(read_requests(of, split)) for of in (copy, datasets.dataset_of(again)))
        for before, after in zip(one, other, strict=True):
            np.testing.assert_array_equal(before.item_id, after.item_id)
            np.testing.assert_allclose(before.teacher_probability, after.teacher_probability, 1e-6)
            assert (after.teacher_weight == 1).all()
    for row in small.rows_on_test(api.train(again, tmp_path / "student")):
        assert math.isfinite(row["teacher_kl/watch"])
