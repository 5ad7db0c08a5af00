"""A log that grows by files, and the dataset that grows with it."""

import contextlib
import itertools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from kd_ranker import api
from kd_ranker.errors import UserError
from kd_ranker.pipeline import datasets
from kd_ranker.pipeline.job import open_job
from kd_ranker.pipeline.trained import open_ranker
from kd_ranker.pipeline.warm_start import warm_start
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.vocabulary import read_requests_of, read_vocabulary
from tests.sources import faulty_logs
from tests.sources.faulty_logs import comparable, made_small, make_rows, write_log
from tests.sources.log_server import Server

DAYS = (0, 30, 45, 60)
# Some names sort before those of the day before.
FILES = ("day-b", "day-a", "day-c")
OUTCOME = ("user_label", "label_weight", "teacher_probability", "teacher_weight")


def make_days(texts=False):
    """Requests of three days; each has users, items and values that the one before lacks."""
    rows = make_rows(5, requests=DAYS[-1], texts=texts)
    days = [rows[start:stop] for start, stop in itertools.pairwise(DAYS)]
    for day, of in enumerate(days):
        for row in of[:8]:
            row.of_request["user_id"] = f"u{day}" if texts else 9000 + day
            row.of_request["country"] = f"country of day {day}"
            row.candidates[1]["item_id"] = f"i{day}" if texts else 9000 + day
            row.candidates[1]["author"] = 20 + day
            row.candidates[2]["source"] = f"source of day {day}"
    for row in days[1]:
        row.of_request["recent"] += [days[0][0].candidates[1]["item_id"]]
    return days


def add_file(log, name, rows, **options):
    written = write_log(log.with_name(f"{name}-written"), rows, **options)
    log.mkdir(exist_ok=True)
    (written / "part-0.parquet").rename(log / f"{name}.parquet")


def config_of(log, folder, extends="", **changes):
    config = faulty_logs.config(log, folder, **changes)
    config.data.extends = str(extends)
    config.data.features.author.size = 11
    return config


def requests_of(dataset):
    """Request id in the log -> the request."""
    found = {}
    for split in SPLITS:
        ids = read_requests_of(dataset.directory, split)["request"].to_pylist()
        found |= dict(zip(ids, read_requests(dataset, split), strict=True))
    return found


def outcome_of(request, items):
    """All that does not depend on ids and scales; the order of candidates is that of a split."""
    by_item = [
        (
            str(items[item]),
            *(getattr(request, name)[place : place + 1].tolist() for name in OUTCOME),
        )
        for place, item in enumerate(request.item_id)
    ]
    return request.time, request.num_passed, sorted(by_item)


def names(directory, of):
    table = read_vocabulary(directory, of).to_pydict()
    return dict(zip(table["id"], table["value"], strict=True))


@pytest.mark.parametrize(("texts", "by_request"), [(False, False), (True, True)])
def test_a_dataset_that_grew_is_that_of_the_whole_log(tmp_path, texts, by_request):
    log, days, grown = tmp_path / "log", make_days(texts), []
    changes = {"rows": "request" if by_request else "candidate"}
    for day, (name, rows) in enumerate(zip(FILES, days, strict=True)):
        add_file(log, name, rows, by_request=by_request)
        extends = tmp_path / f"{day - 1}" if day else ""
        config = config_of(log, tmp_path / f"{day}", extends, **changes)
        api.prepare(config)
        grown.append(datasets.dataset_of(config))
    config = config_of(log, tmp_path / "whole", **changes)
    api.prepare(config)
    datasets_ = (datasets.dataset_of(config), grown[-1])
    whole, found = map(requests_of, datasets_)
    items_of_whole, items = (names(of.directory, "item") for of in datasets_)
    assert found.keys() == whole.keys()
    last = {}
    for dataset, rows in zip(grown, days, strict=True):
        # A request was read with what was known by its day.
        server = Server(dataset.directory)
        for row in rows:
            id_ = row.of_request["request_id"]
            server.check(found[id_], row.of_request, row.candidates)
            assert outcome_of(found[id_], items) == outcome_of(whole[id_], items_of_whole)
            last |= {of["item_id"]: (server, of) for of in row.candidates}
    for item, (server, candidate) in last.items():
        id_ = server.ids["item"][item]
        fields = (of[id_] for of in (grown[-1].items.features, grown[-1].items.category))
        server.check_item(*fields, candidate)
    assert len(read_vocabulary(grown[-1].directory, "feature:author")) == 11
    numbers = {of: len(grown[-1].columns[of]) for of in SPLITS}
    assert numbers == {"train": 54, "validation": 2, "test": 4}
    times = [grown[-1].columns[of].counts.time for of in SPLITS]
    assert times[0].max() < times[1].min() <= times[1].max() < times[2].min()
    known = [*map(Path, json.loads((grown[-1].directory / "log.json").read_text()))]
    assert [path.stem for path in known] == sorted(FILES)
    builder = tfds.builder_from_directory(grown[-1].directory)
    for split in SPLITS:
        records = [of["request_id"] for of in builder.as_data_source(split=split)]
        assert records == [of.request_id for of in read_requests(grown[-1], split)]
        table = read_requests_of(grown[-1].directory, split).to_pandas()
        for request, file in table.to_numpy():
            row = next(
                of for of in itertools.chain(*days) if of.of_request["request_id"] == request
            )
            assert row in days[FILES.index(known[file].stem)]


@pytest.fixture(scope="module")
def day_one(tmp_path_factory):
    """The folder of a log of one day, and of its dataset."""
    folder = tmp_path_factory.mktemp("grown")
    add_file(folder / "log", "day-0", make_days()[0])
    api.prepare(config_of(folder / "log", folder / "before"))
    return folder


@pytest.fixture
def second(day_one, tmp_path):
    """A function that adds a file, and extends the dataset; the log is as before after it."""
    log = day_one / "log"
    stat = (log / "day-0.parquet").stat()

    def extend(rows=None, change=lambda path: None, **changes):
        rows = make_days()[1] if rows is None else rows
        if rows:
            add_file(log, "day-1", rows)
            change(log / "day-1.parquet")
        config = config_of(log, tmp_path / "after", day_one / "before", **changes)
        api.prepare(config)
        return datasets.dataset_of(config)

    yield extend
    (log / "day-1.parquet").unlink(missing_ok=True)
    (written := log.with_name("day-1-written")).exists() and written.rmdir()
    if (log / "_aside").exists():
        (log / "_aside").rename(log / "day-0.parquet")
    os.utime(log / "day-0.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_ids_scales_and_files_of_before_stay(second, day_one):
    before = datasets.dataset_of(config_of(day_one / "log", day_one / "before"))
    content = {path: path.read_bytes() for path in before.directory.rglob("*") if path.is_file()}
    after = second()
    assert content == {path: path.read_bytes() for path in content}
    with pytest.raises(
        UserError,
        match=rf"1 file new; with another data.dir, --config.data.extends={day_one}/before adds",
    ):
        api.prepare(config_of(day_one / "log", day_one / "before"))
    for name in ("user", "item", "feature:country", "feature:author"):
        one, other = (names(of.directory, name) for of in (before, after))
        assert one.items() <= other.items()
        assert sorted(one.values()) != sorted(other.values())
        assert min(other.keys() - one.keys()) > max(one)
    rules = [json.loads((of.directory / "transforms.json").read_text()) for of in (before, after)]
    assert rules[0] == rules[1]
    assert os.path.samefile(*(of.directory / "rows-train.bin" for of in (before, after)))
    assert after.earlier == (before.provenance["dataset"],)
    assert after.provenance["dataset"] != before.provenance["dataset"]
    kept = len(before.columns["train"])
    one, other = (list(read_requests(of, "train")) for of in (before, after))
    assert faulty_logs.same(dict.fromkeys(SPLITS, one), dict.fromkeys(SPLITS, other[:kept]))
    report = json.loads((after.directory / "data_report.json").read_text())
    assert report["ids"]["items"] == after.spec.num_items
    assert "(requests: 30, files: 1)" in report["remarks"][0]


def rewritten(change):
    return lambda path: pq.write_table(change(pq.read_table(path)), path)


def with_type(column, type_):
    def change(table):
        values = pc.max_element_wise(table[column], 0).cast(type_)
        return table.set_column(table.column_names.index(column), column, values)

    return rewritten(change)


def test_ids_of_new_files_may_lack_a_sign(second, day_one, tmp_path):
    expected = requests_of(second())
    with_type("item_id", pa.uint64())(day_one / "log" / "day-1.parquet")
    found = requests_of(second((), dir=str(tmp_path / "unsigned")))
    assert found.keys() == expected.keys()
    assert all(comparable(found[id_]) == comparable(expected[id_]) for id_ in found)


LARGE = pa.scalar(2**63, pa.uint64())


def unsigned_and_large(table):
    values = pc.add(pc.max_element_wise(table["item_id"], 0).cast(pa.uint64()), LARGE)
    return table.set_column(table.column_names.index("item_id"), "item_id", values)


EARLY = make_rows(0, requests=1)[0]
EARLY.of_request |= {"request_id": 7, "time": 1_000_000 + 60}

REFUSED = {
    "a column is gone": (
        dict(change=rewritten(lambda table: table.drop_columns(["age"]))),
        "has no column 'age'",
    ),
    "ids of another type": (
        dict(change=with_type("user_id", pa.string())),
        "column 'user_id' .* holds texts, and in training it held whole numbers",
    ),
    "ids too large for the type of before": (
        dict(change=rewritten(unsigned_and_large)),
        "new values of 'item' are no int64, .* leave data.extends out",
    ),
    "requests of another type": (
        dict(change=with_type("request_id", pa.string())),
        r"'request_id' \(data.columns.request\) holds ids of type string in .* has int64; give it",
    ),
    "a request of before": (
        dict(rows=[*make_days()[1], make_days()[0][-1]]),
        "1 requests of the new files, such as 129, are in .* write all rows of a request to one",
    ),
    "not later": (
        dict(rows=[*make_days()[1], EARLY]),
        "1 requests of the new files are earlier than 1970-01-12T14:15:40, .* in the order of time",
    ),
    "no new file": (dict(rows=()), "has no file that .* lacks"),
    "an older file is gone": (
        dict(change=lambda path: path.with_name("day-0.parquet").rename(path.with_name("_aside"))),
        "1 file gone.*restore those files, or leave data.extends out",
    ),
    "an older file is rewritten": (
        dict(change=lambda path: os.utime(path.with_name("day-0.parquet"), ns=(0, 0))),
        "1 file rewritten.*restore those files, or leave data.extends out",
    ),
    "another config": (dict(test_share=0.17), "holds no dataset of this config, with data.path as"),
    "another split": (dict(split="user"), "data.extends needs data.split='time', and it is 'user'"),
    "Spark": (dict(engine="spark"), "takes Parquet files at data.path, and data.engine='duckdb'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_added_is_refused(second, case):
    call, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        second(**call)


def test_a_feature_that_varies_for_the_first_time_has_no_scale(tmp_path):
    log, days = tmp_path / "log", make_days()
    for row in days[0]:
        row.of_request["age"] = 30
    for name, rows, extends in (("before", days[0], ""), ("after", days[1], tmp_path / "before")):
        add_file(log, f"of {name}", rows)
        message = r"data.features.age had at most one value in .* leave it"
        with pytest.raises(UserError, match=message) if extends else contextlib.nullcontext():
            api.prepare(config_of(log, tmp_path / name, extends))


def parameters_of(workdir):
    return jax.tree.map(np.asarray, open_ranker(workdir, with_slots=True).ranker.parameters)


@pytest.fixture
def monday(day_one, tmp_path):
    """A config of a small run on the dataset of the first day, and its workdir."""
    return made_small(config_of(day_one / "log", day_one / "before")), tmp_path / "monday"


def started(config, folder):
    """The parameters of a fresh run, and those that it starts with, without the axis of runs."""
    job = open_job(config, {"": config})
    fresh = tuple(stack.init() for stack in job.trainees.stacks)
    (begun,) = warm_start(job, folder, fresh)
    return jax.tree.map(lambda of: np.asarray(of)[0], (fresh[0].parameters, begun.parameters))


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_training_goes_on_from_a_run_on_the_dataset_before(second, monday, day_one, tmp_path):
    api.train(*monday)
    old = parameters_of(monday[1])
    after = second()
    config = made_small(config_of(day_one / "log", tmp_path / "after"))
    config.train.warm_start, config.seed = str(monday[1]), 7
    fresh, begun = started(config, tmp_path)
    assert_equal(begun.dense, old.dense)
    spec = open_ranker(monday[1]).dataset.spec
    sizes = {"user": "num_users", "item": "num_items", "category": "num_categories"}
    known = {name: getattr(spec, of) for name, of in sizes.items()}
    for name, of in sizes.items():
        first, last = known[name], getattr(after.spec, of)
        assert first < last
        assert_equal(begun.tables[name][:first], old.tables[name][:first])
        assert_equal(begun.tables[name][first:last], fresh.tables[name][first:last])
        assert_equal(begun.tables[name][last], old.tables[name][first])
    # Without a rate, the parameters after training are those before.
    config.optimizer.update(learning_rate=0.0, table_learning_rate=0.0)
    api.train(config, tmp_path / "tuesday")
    new, width = parameters_of(tmp_path / "tuesday"), config.student.width
    assert_equal(new.dense, old.dense)
    for name, first in known.items():
        assert_equal(new.tables[name][:first, :width], old.tables[name][:first, :width])
    config.student.width = 8
    with pytest.raises(UserError, match=r"monday has other model sizes, or rows of another"):
        api.train(config, tmp_path / "wide")
    other = made_small(config_of(day_one / "log", tmp_path / "other"))
    api.prepare(other)
    other.train.warm_start = str(monday[1])
    with pytest.raises(UserError, match=r"monday was trained on parquet-.*, and its ids are not"):
        api.train(other, tmp_path / "wednesday")


def test_a_teacher_starts_with_the_slots_of_its_rows(second, monday, day_one, tmp_path):
    before, workdir = monday
    api.train_teacher(before, workdir)
    dataset = datasets.dataset_of(before)
    (old,), _ = open_job(before).restored(workdir)
    second()
    config = made_small(config_of(day_one / "log", tmp_path / "after"))
    config.teacher.train.warm_start, config.seed = str(workdir), 7
    job = open_job(config)
    (begun,) = warm_start(job, tmp_path, tuple(stack.init() for stack in job.trainees.stacks))
    known = dataset.spec.num_items
    table = np.asarray(old.parameters.tables["item"])
    assert_equal(begun.parameters.tables["item"][:, :known], table[:, :known])
    assert table[:, :known, config.teacher.width + 1 :].any()
    config.teacher.train.warm_start, config.train.warm_start = "", str(workdir)
    student = open_job(config, {"": config})
    with pytest.raises(UserError, match="monday is of a teacher, not of a student"):
        warm_start(student, tmp_path, ())
