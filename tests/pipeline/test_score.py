"""A log that training has never seen, scored by what was trained on another one."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from kd_ranker import api, manifest
from kd_ranker.batch import CandidateBatch, Items
from kd_ranker.configs import cascade
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.pipeline import datasets, runs, scoring
from kd_ranker.pipeline.job import Opened
from kd_ranker.requests.columns import columns_of
from kd_ranker.requests.records import read_requests
from kd_ranker.serving import check
from kd_ranker.sources.logs import ordered, unseen
from kd_ranker.sources.logs.vocabulary import settled_by
from kd_ranker.sweep.members import sweep_members
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.state import select_member
from tests import small
from tests.batches.packing_by_hand import full_fields
from tests.sources import faulty_logs
from tests.sources.faulty_logs import TASKS, Row, make_rows, write_log
from tests.sources.log_server import Server

REQUESTS, TESTED = 60, 18
FEATURES = ["age", "country", "hour", "recent", "spots", "author", "duration", "quality", "tags"]
RAW = ["request_id", "time", "user_id", "item_id", *FEATURES, "score", "source"]
# An item that no history has, so that only as a candidate it can be known or not.
ITEM = "item-3"
COLUMNS = ("request", "item", *(f"probability_{task}" for task in TASKS), "value", "version")
Scores = dict[tuple[Any, Any], list[float]]


class World(NamedTuple):
    """A log with the dataset and the rankers that were made of it."""

    folder: Path
    rows: list[Row]
    config: ConfigDict

    @property
    def tested(self) -> list[Row]:
        """The rows of the requests of the test split, the last ones."""
        return self.rows[-TESTED:]


def make_world(folder: Path) -> World:
    rows = make_rows(0, requests=REQUESTS, texts=True)
    generator = np.random.default_rng(1)
    for row in rows:
        row.of_request["recent"] = [item for item in row.of_request["recent"] if item != ITEM]
        if generator.random() < 0.2:
            row.of_request.update(age=None, country=None, recent=None, spots=None)
        for candidate in row.candidates:
            if generator.random() < 0.1:
                candidate.update(score=float("nan"), source="", duration=None, tags=[None])
    rows[-1].candidates = rows[-1].candidates[:1]
    log = write_log(folder / "log", rows, files=2, shuffle=1)
    config = faulty_logs.config(log, folder / "datasets")
    config.parallel.devices = 1
    config.batch.requests, config.batch.candidates = 8, 12
    config.teacher.batch.update(requests=8, candidates=12)
    for train in (config.train, config.teacher.train):
        train.update(steps=6, log_every=3, checkpoint_every=6, eval_every=0)
    config.student.update(width=4, interests=2, hidden=(8,))
    config.teacher.update(width=4, attention_hidden=4, experts=2, expert_hidden=4, cross_layers=1)
    config.teacher.source, config.teacher.stage = "live", "retrieved"
    config.teacher.workdir = str(folder / "teacher")
    config.evaluation.requests = 8
    config.sweep.update(modes=("none",), seeds=(0, 1))
    config.funnel.policies = ("threshold",)
    api.prepare(config)
    api.train_teacher(config, folder / "teacher")
    config.distill.mode, config.distill.serve = "aux", "blend"
    api.train(config, folder / "student")
    api.sweep(config, folder / "sweep")
    return World(folder, rows, config)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("score"))


def write_raw(folder: Path, rows: list[Row], by_request: bool = False, **options: Any) -> Path:
    """A log with nothing that is known only after a request."""
    log = write_log(folder, rows, by_request, **options)
    for file in log.iterdir():
        pq.write_table(pq.read_table(file).select(RAW), file, row_group_size=16)
    return log


def config_for(world: World, workdir: str, log: Path, **changes: Any) -> ConfigDict:
    config = workdirs.read_config(world.folder / workdir)
    config.data.path = str(log)
    config.update_from_flattened_dict(changes)
    return config


def scores_in(scored: scoring.Scored) -> Scores:
    """(request, item), both as in the log -> its probabilities and its value."""
    table = pa.concat_tables(pq.read_table(path) for path in scored.directory.rglob("*.parquet"))
    assert tuple(table.column_names) == scored.columns == COLUMNS
    rows = [[*row.values()] for row in table.to_pylist()]
    assert len({(request, item) for request, item, *_ in rows}) == len(rows)
    return {(request, item): numbers for request, item, *numbers, _ in rows}


def requests_of_test(world: World) -> dict[Any, tuple[Any, list[Any]]]:
    """Request as in the log -> the request of the dataset, and its items as in the log."""
    dataset = datasets.dataset_of(world.config)
    table = pq.read_table(dataset.directory / "vocabularies/item.parquet").to_pydict()
    items = dict(zip(table["id"], table["value"], strict=True))
    name = {row.of_request["time"]: row.of_request["request_id"] for row in world.rows}
    return {
        name[request.time]: (request, [items[item] for item in request.item_id.tolist()])
        for request in read_requests(dataset, "test")
    }


def student_of(world: World, workdir: Path, member: str = ""):
    config = workdirs.read_config(workdir)
    (group,), _ = runs.trained_students(Opened(config).job({"": config}), workdir)
    return group.ranker.serve, select_member(group.ranker.parameters, 0)


def served(world: World, serve: Any, parameters: Any, name: str, items: Any = None) -> Scores:
    """What a ranker says of the test requests as the dataset has them, one by one."""
    dataset = datasets.dataset_of(world.config)
    known = items or dataset.items
    scores = {}
    for id_, (request, names) in requests_of_test(world).items():
        fields = full_fields(columns_of([request], dataset.spec), len(names))
        batch = CandidateBatch(**fields)
        (probability,) = np.asarray(serve(parameters, batch, known).probability[name])
        for item, of_item in zip(names, probability, strict=True):
            value = float(of_item @ np.array(world.config.value_weights))
            scores[id_, item] = [*of_item.tolist(), value]
    return scores


def assert_close(found: Scores, expected: Scores) -> None:
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(
        [found[key] for key in expected], [*expected.values()], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("form", ["candidate", "request", "select"])
def test_a_held_out_log_has_the_teachers_scores_of_the_dataset(world, tmp_path, form):
    log = write_raw(tmp_path / "log", world.tested, form == "request", files=2, shuffle=3)
    config = config_for(world, "teacher", log)
    if form == "select":
        config.data.path, config.data.sql = "", f"SELECT * FROM '{log}/*.parquet'"
    else:
        config.data.rows = form
    scored, _ = scoring.score_unseen(config, world.folder / "teacher", output=tmp_path / "out")
    found, logged = scores_in(scored), scores_in(api.log_teacher(world.config))
    assert len(found) == sum(len(row.candidates) for row in world.tested)
    assert_close(found, {key: logged[key] for key in found})
    assert len(logged) == sum(len(row.candidates) for row in world.rows)


def test_an_export_says_of_raw_rows_what_scoring_and_evaluation_say(world, tmp_path):
    """A server that knows the folder alone makes the inputs from the columns of the log."""
    workdir, folder = world.folder / "student", tmp_path / "export"
    api.export(workdir, folder, formats=("jax",))
    server, programs = Server(folder), check.open_programs(folder, "jax")
    described = json.loads((folder / "export.json").read_text())
    fields = server.fields([(row.of_request, row.candidates) for row in world.tested])
    expected = dict(
        described["programs"]["user"]["inputs"], **described["programs"]["score"]["inputs"]
    )
    sizes = {"requests": TESTED, "candidates": faulty_logs.RETRIEVED}
    for name in {*fields} & {*expected}:
        assert fields[name].dtype == expected[name]["dtype"], name
        shape = [sizes.get(size, size) for size in expected[name]["shape"]]
        assert [*fields[name].shape] == shape, name
    answers = check.rank(programs, check.read_tables(folder) | fields)
    found = {}
    for place, row in enumerate(world.tested):
        for number, candidate in enumerate(row.candidates):
            of = [*answers["probability"][place, number], answers["value"][place, number]]
            found[row.of_request["request_id"], candidate["item_id"]] = of
    assert_close(found, served(world, *student_of(world, workdir), "blend"))
    config = config_for(world, "student", write_raw(tmp_path / "log", world.tested))
    scored, _ = scoring.score_unseen(config, workdir, output=tmp_path / "out")
    assert_close(found, scores_in(scored))


def test_new_users_and_items_get_the_reserved_row_and_are_counted(world, tmp_path):
    rows = copy.deepcopy(world.tested)
    users = {rows[0].of_request["user_id"], "user-1"}
    for row in rows:
        if row.of_request["user_id"] in users:
            row.of_request["user_id"] = f"new {row.of_request['user_id']}"
        for candidate in row.candidates:
            if candidate["item_id"] == ITEM:
                candidate["item_id"] = "new"
    workdir = world.folder / "student"
    config = config_for(world, "student", write_raw(tmp_path / "log", rows))
    scored, lines = scoring.score_unseen(config, workdir, output=tmp_path / "out")
    found = scores_in(scored)
    # As if their own rows held what the reserved ones hold.
    serve, parameters = student_of(world, workdir)
    dataset = datasets.dataset_of(world.config)
    tables = dict(parameters.tables)
    for name, values, size in (
        ("user", users, dataset.spec.num_users),
        ("item", {ITEM}, dataset.spec.num_items),
    ):
        table = pq.read_table(dataset.directory / f"vocabularies/{name}.parquet").to_pydict()
        ids = [id_ for value, id_ in zip(*table.values(), strict=True) if value in values]
        width = world.config.student.width
        of_reserved = tables[name][size, :width]
        assert len(ids) == len(values)
        tables[name] = np.array(tables[name])
        tables[name][ids, :width] = of_reserved
    expected = served(world, serve, parameters.replace(tables=tables), "blend")
    own = served(world, serve, parameters, "blend")
    assert len([key for key in own if own[key] != expected[key]]) > 10
    assert_close(
        found, {(id_, "new" if of == ITEM else of): row for (id_, of), row in expected.items()}
    )
    of_users = sum(
        len(row.candidates) for row in rows if row.of_request["user_id"].startswith("new")
    )
    of_items = sum(of["item_id"] == "new" for row in rows for of in row.candidates)
    number = len(found)
    assert of_users
    assert of_items
    assert lines[1:] == [
        f"candidates: {number} in the log = {number} scored + 0 rejected",
        f"unknown to training: {of_users} candidates ({of_users / number:.1%}) by their user, "
        f"{of_items} candidates ({of_items / number:.1%}) by their item",
    ]


def test_a_known_item_has_the_features_that_the_log_gives_it(world, tmp_path):
    rows = copy.deepcopy(world.tested)
    last = {of["item_id"]: of for row in rows for of in row.candidates}
    one, other = "item-5", "item-6"
    features = {name: last[other][name] for name in ("author", "duration", "quality", "tags")}
    for row in rows:
        for candidate in row.candidates:
            if candidate["item_id"] == one:
                candidate.update(features)
    workdir = world.folder / "student"
    config = config_for(world, "student", write_raw(tmp_path / "log", rows))
    scored, _ = scoring.score_unseen(config, workdir, output=tmp_path / "out")
    dataset = datasets.dataset_of(world.config)
    table = pq.read_table(dataset.directory / "vocabularies/item.parquet").to_pydict()
    id_of = dict(zip(table["value"], table["id"], strict=True))
    features, category = dataset.item_features.copy(), dataset.item_category.copy()
    for of in (features, category):
        assert of[id_of[one]].tolist() != of[id_of[other]].tolist()
        of[id_of[one]] = of[id_of[other]]
    expected = served(world, *student_of(world, workdir), "blend", Items(features, category))
    assert_close(scores_in(scored), expected)


def test_what_validation_and_test_have_alone_counts_as_unknown(tmp_path):
    """It has ids in the vocabularies, and training has met none of them."""
    rows = make_rows(2, requests=20, texts=True)
    rows[-1].of_request["user_id"] = "late"
    config = faulty_logs.config(write_log(tmp_path / "log", rows), tmp_path / "datasets")
    directory = api.prepare(config).directory
    layout = faulty_logs.layout(config)
    spec = datasets.dataset_of(config).spec
    settled = settled_by(layout, spec, directory)
    log, own = unseen.open_unseen(layout, layout)
    (tmp_path / "read").mkdir()
    items = datasets.dataset_of(config).items
    unseen.read_unseen(log, own, settled, items, tmp_path / "read")
    found = unseen.load_unseen(tmp_path / "read").counted
    in_train = rows[: 20 - round(0.4 * 20)]
    users = {row.of_request["user_id"] for row in in_train}
    known = {of["item_id"] for row in in_train for of in row.candidates}
    of_new = [len(row.candidates) for row in rows if row.of_request["user_id"] not in users]
    assert found.new["user"] == sum(of_new) >= len(rows[-1].candidates)
    number = sum(of["item_id"] not in known for row in rows for of in row.candidates)
    assert found.new["item"] == number > 0


def test_what_cannot_be_scored_is_absent_and_counted(world, tmp_path):
    rows = copy.deepcopy(world.tested)
    rows[0].of_request["user_id"] = None
    rows[1].candidates[1]["item_id"] = None
    rows[2].candidates.append(dict(rows[2].candidates[0]))
    lost = len(rows[0].candidates)
    config = config_for(world, "teacher", write_raw(tmp_path / "log", rows))
    scored, lines = scoring.score_unseen(config, world.folder / "teacher", output=tmp_path / "out")
    expected = {
        (row.of_request["request_id"], of["item_id"]) for row in rows for of in row.candidates
    }
    absent = {(rows[0].of_request["request_id"], of["item_id"]) for of in rows[0].candidates}
    absent.add((rows[1].of_request["request_id"], None))
    assert scores_in(scored).keys() == expected - absent
    assert lines[1].endswith(
        f"scored + {lost + 2} rejected (missing_user {lost}, missing_item 1, duplicate_item 1)"
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_run_that_was_killed_resumes(world, tmp_path, monkeypatch):
    monkeypatch.setattr(ordered, "PIECE", 40)
    log = write_raw(tmp_path / "log", world.tested, files=2)
    workdir = world.folder / "student"
    config = config_for(world, "student", log)
    whole = contents(scoring.score_unseen(config, workdir, output=tmp_path / "whole")[0].directory)
    written, write_part = [], scoring._write_part

    class Killed(BaseException):
        pass

    def dying(path, *arguments):
        if len(written) == 2:
            raise Killed
        written.append(path.name)
        write_part(path, *arguments)

    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(scoring, "_write_part", dying)
        with pytest.raises(Killed):
            scoring.score_unseen(config, workdir, output=output)
    assert not [*output.glob("*.parquet")]

    def read_again(*arguments):
        raise AssertionError("it reads the log again")

    later = []
    with monkeypatch.context() as patched:
        patched.setattr(scoring.unseen, "read_unseen", read_again)
        patched.setattr(
            scoring, "_write_part", lambda *of: later.append(of[0].name) or write_part(*of)
        )
        scoring.score_unseen(config, workdir, output=output)
    assert written + later == [f"{n:06d}.parquet" for n in range(len(written + later))]
    files = sorted(name for name in whole if name.endswith(".parquet"))
    assert files == ["00000-part-0.parquet", "00001-part-1.parquet"]
    assert len(later) > 1
    assert contents(output) == whole


def test_a_second_run_reads_nothing_and_says_the_same(world, tmp_path, monkeypatch):
    config = config_for(world, "teacher", write_raw(tmp_path / "log", world.tested))
    workdir = world.folder / "teacher"
    config.data.dir = str(world.folder / "datasets")
    first = scoring.score_unseen(config, workdir)
    assert first[0].directory.parent == world.folder / "datasets" / "scored"

    def broken(*arguments):
        raise AssertionError("it works again")

    monkeypatch.setattr(scoring.unseen, "read_unseen", broken)
    assert scoring.score_unseen(config, workdir) == first


def test_a_log_may_lack_the_time_and_call_its_columns_otherwise(world, tmp_path):
    log = write_raw(tmp_path / "log", world.tested)
    config = config_for(world, "teacher", log)
    workdir = world.folder / "teacher"
    before, _ = scoring.score_unseen(config, workdir, output=tmp_path / "before")
    file = log / "part-0.parquet"
    table = pq.read_table(file).drop_columns(["time"])
    pq.write_table(table.rename_columns({"age": "years"}), file)
    config.data.features.age.column = "years"
    config.parallel.devices = config.batch.requests = config.teacher.batch.requests = 64
    after, _ = scoring.score_unseen(config, workdir, output=tmp_path / "after")
    assert scores_in(before) == scores_in(after)


def test_without_a_member_the_best_of_a_sweep_on_validation_scores(world, tmp_path):
    workdir = world.folder / "sweep"
    log = write_raw(tmp_path / "log", world.tested)
    config = config_for(world, "sweep", log)
    table = results.read_csv(workdir / results.FILE)
    rows = table[(table["role"] == "student") & (table["split"] == "validation")]
    best = rows["member"][rows["passed_for_99"].astype(float).idxmin()]
    _, lines = scoring.score_unseen(config, workdir, output=tmp_path / "out")
    assert lines[0] == (
        f"ranker: member {best} of the sweep at {workdir} (the best of 2 on validation), by its "
        "probabilities 'user'"
    )

    named, lines = scoring.score_unseen(config, workdir, "none-seed1", tmp_path / "named")
    assert lines[0].startswith("ranker: member none-seed1 of the sweep")
    (cohort,) = (workdir / "cohorts").iterdir()
    members = sweep_members(workdirs.read_config(workdir))
    groups, _ = runs.trained_students(Opened(world.config).job(members), cohort)
    (own,) = (of for group in groups if (of := group.only(("none-seed1",))).names)
    expected = served(world, own.ranker.serve, select_member(own.ranker.parameters, 0), "user")
    assert_close(scores_in(named), expected)


def test_a_policy_marks_the_candidates_to_pass(world, tmp_path):
    workdir = world.folder / "sweep"
    config = config_for(world, "sweep", write_raw(tmp_path / "log", world.tested))
    plain, _ = scoring.score_unseen(config, workdir, output=tmp_path / "plain")
    assert json.loads((plain.directory / scoring.FILE).read_text())["policy"] == ""
    folder = api.score(workdir, config.data.path, tmp_path / "out", policy="threshold")
    table = pa.concat_tables(map(pq.read_table, folder.glob("*.parquet"))).to_pandas()
    assert table.drop(columns="passed").equals(
        pa.concat_tables(map(pq.read_table, plain.directory.glob("*.parquet"))).to_pandas()
    )
    (stored,) = workdir.glob("cohorts/*/test/policies.json")
    described = json.loads((folder / scoring.FILE).read_text())
    title = described["ranker"]
    (of,) = (of for of in json.loads(stored.read_text()) if f"member {of['member']} " in title)
    # All k of so few candidates are in the grid. The best candidate always passes.
    best = table.groupby("request")["value"].transform("max")
    expected = (table["value"] >= of["threshold"]) | (table["value"] == best)
    assert table["passed"].tolist() == expected.tolist()
    assert 0 < table["passed"].mean() < 1
    assert described["policy"] == "threshold"
    config.value_weights = (4.0, *config.value_weights[1:])
    with pytest.raises(UserError, match="--policy: fitted with value_weights="):
        scoring.score_unseen(config, workdir, output=tmp_path / "other", policy="threshold")


def test_a_student_scores_where_its_teacher_is_gone(world, tmp_path):
    log = write_raw(tmp_path / "log", world.tested)
    config = config_for(world, "student", log)
    (world.folder / "teacher").rename(world.folder / "elsewhere")
    try:
        scoring.score_unseen(config, world.folder / "student", output=tmp_path / "out")
    finally:
        (world.folder / "elsewhere").rename(world.folder / "teacher")


@pytest.mark.slow
def test_a_student_that_learned_from_a_scored_copy_scores(world, tmp_path):
    config = world.config.copy_and_resolve_references()
    config.teacher.source = "logged"
    api.log_teacher(config)
    config.distill.mode = "shared"  # which has no choice of heads, whatever the config says
    api.train(config, tmp_path / "student")
    log = write_raw(tmp_path / "log", world.tested)
    own = workdirs.read_config(tmp_path / "student")
    own.data.path = str(log)
    scored, _ = scoring.score_unseen(own, tmp_path / "student", output=tmp_path / "out")
    found = scores_in(scored)
    assert_close(found, served(world, *student_of(world, tmp_path / "student"), "user"))


def fault_of(config: ConfigDict, workdir: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        scoring.score_unseen(config, workdir, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input_is_one_line_and_leaves_nothing(world, tmp_path):
    log = write_raw(tmp_path / "log", world.tested)
    config, workdir = config_for(world, "sweep", log), world.folder / "sweep"
    out = {"output": tmp_path / "out"}
    assert "no run at" in fault_of(config, tmp_path, **out)
    told = fault_of(config, workdir, member="x", **out)
    assert told.endswith("has no member 'x'; it has: none-seed0, none-seed1")
    assert "leave --member out" in fault_of(config, world.folder / "student", member="x", **out)
    other = config.copy_and_resolve_references()
    other.data.features.age.kind = "category"
    assert "data.features.age; leave --config out" in fault_of(other, workdir, **out)
    other = config.copy_and_resolve_references()
    other.data.dir = str(tmp_path)
    assert "no dataset at" in fault_of(other, workdir, **out)
    # Of a column that is missing, or of another type.
    file = log / "part-0.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["age", "tags"]), file)
    assert "'age' (data.features.age), 'tags' (data.features.tags)" in fault_of(
        config, workdir, **out
    )
    column = pa.array(range(len(table)))
    pq.write_table(table.drop_columns(["item_id"]).append_column("item_id", column), file)
    assert "a history holds item ids" in fault_of(config, workdir, **out)
    history = table.drop_columns(["country"]).append_column("country", column)
    pq.write_table(history, file)
    assert (
        "column 'country' (data.features.country) holds whole numbers, and in training it held "
        "texts" in fault_of(config, workdir, **out)
    )
    # Hashed, there is no vocabulary, and each value would get some row.
    spots = pa.array([[0, 1]] * len(table))
    pq.write_table(table.drop_columns(["spots"]).append_column("spots", spots), file)
    assert fault_of(config, workdir, **out) == (
        "column 'spots' (data.features.spots) holds whole numbers, and in training it held texts; "
        "give it the type that it had"
    )
    pq.write_table(table.slice(0, 1).set_column(3, "item_id", pa.array([None], pa.string())), file)
    assert "not one row of the log can be used" in fault_of(config, workdir, **out)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_not_written_to(world, tmp_path):
    log = write_raw(tmp_path / "log", world.tested)
    config, workdir = config_for(world, "teacher", log), world.folder / "teacher"
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("")
    assert "give another folder with --out" in fault_of(config, workdir, output=out)
    assert "is inside the log" in fault_of(config, workdir, output=log / "scored")
    (out / "mine.txt").unlink()
    scoring.score_unseen(config, workdir, output=out)
    other = config_for(world, "student", log)
    assert "give another folder with --out" in fault_of(other, world.folder / "student", output=out)
    # Nor is a finished log whose files have changed or are gone accepted as finished.
    description = (out / scoring.FILE).read_text()
    (out / scoring.FILE).write_text(description.replace('"version": "', '"version": "1', 1))
    assert f"{out / scoring.FILE} has changed" in fault_of(config, workdir, output=out)
    (out / scoring.FILE).write_text(description)
    next(out.rglob("*.parquet")).unlink()
    assert ".parquet is missing; remove the folder" in fault_of(config, workdir, output=out)


def test_a_run_that_is_not_finished_does_not_score(world, tmp_path):
    log = write_raw(tmp_path / "log", world.tested)
    copied = tmp_path / "sweep"
    shutil.copytree(world.folder / "sweep", copied)
    (copied / manifest.FILE).unlink()
    assert "is not finished" in fault_of(config_for(world, "sweep", log), copied)
    copied = tmp_path / "student"
    shutil.copytree(world.folder / "student", copied)
    for step in (copied / "checkpoints").iterdir():
        shutil.rmtree(step)
    assert "stopped at step 0 of 6" in fault_of(config_for(world, "student", log), copied)


def test_what_was_trained_on_no_log_scores_none(tmp_path):
    config = cascade("small")
    workdirs.write_config(tmp_path, "train", config, {"dataset": "d"})
    assert "and one is of cascade; experiments.log_teacher" in fault_of(config, tmp_path)


def test_the_command_needs_a_workdir_and_the_path_of_a_log(world, tmp_path):
    log = write_raw(tmp_path / "log", world.tested)
    workdir, out = world.folder / "sweep", tmp_path / "out"
    flags = [f"--workdir={workdir}", f"--config.data.path={log}", f"--out={out}"]
    finished = small.run("-m", "experiments.score", *flags, "--member=none-seed0")
    assert finished.returncode == 0, finished.stderr
    told = finished.stdout.splitlines()
    assert told[0].startswith("ranker: member none-seed0")
    assert told[-2:] == [
        f"scores: {out}",
        "their columns: request, item, probability_watch, probability_like, value, version",
    ]
    finished = small.run("-m", "experiments.score", *flags, "--config.data.rows=requests")
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert "data.rows" in finished.stderr
