"""A log that training has never seen, scored by what was trained on another one."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from kd_ranker import api
from kd_ranker.batch import Items
from kd_ranker.configs import cascade
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.evaluation.evaluate import make_serve
from kd_ranker.pipeline import datasets, scoring
from kd_ranker.pipeline.job import open_job
from kd_ranker.requests.columns import columns_of
from kd_ranker.requests.records import read_requests
from kd_ranker.serving import check
from kd_ranker.sources.logs import encode, unseen
from kd_ranker.sources.logs.vocabulary import read_requests_of, read_vocabulary
from kd_ranker.sweep import sweep_members
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.state import select_member
from tests.batches.packing_by_hand import full_batch
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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
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
    config = faulty_logs.made_small(faulty_logs.config(log, folder / "datasets"), steps=6)
    config.teacher.batch.update(requests=8, candidates=12)
    config.teacher.source, config.teacher.stage = "live", "retrieved"
    config.teacher.workdir = str(folder / "teacher")
    config.sweep.update(modes=("none",), seeds=(0, 1))
    config.funnel.policies = ("threshold",)
    api.prepare(config)
    api.train_teacher(config, folder / "teacher")
    config.distill.mode, config.distill.serve = "aux", "blend"
    api.train(config, folder / "student")
    api.sweep(config, folder / "sweep")
    return World(folder, rows, config)


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


@pytest.fixture
def score(world, tmp_path):
    """A function that writes rows as a log and scores it by a run of the world."""

    def score(workdir: str, rows: list[Row], **options: Any) -> tuple[Scores, list[str]]:
        config = config_for(world, workdir, write_raw(tmp_path / "log", rows, **options))
        folder = world.folder / workdir
        scored, lines = scoring.score_unseen(config, folder, output=tmp_path / "out")
        return scores_in(scored), lines

    return score


def scores_in(scored: scoring.Scored) -> Scores:
    """(request, item), both as in the log -> its probabilities and its value."""
    table = pa.concat_tables(pq.read_table(path) for path in scored.directory.rglob("*.parquet"))
    assert tuple(table.column_names) == scored.columns == COLUMNS
    rows = [[*row.values()] for row in table.to_pylist()]
    assert len({(request, item) for request, item, *_ in rows}) == len(rows)
    return {(request, item): numbers for request, item, *numbers, _ in rows}


def ids_in(dataset: Any, name: str) -> dict[Any, int]:
    """Value of the log -> its id."""
    table = read_vocabulary(dataset.directory, name).to_pydict()
    return dict(zip(table["value"], table["id"], strict=True))


def student_of(workdir: Path):
    config = workdirs.read_config(workdir)
    return serve_and_parameters(open_job(config, {"": config}), workdir)


def serve_and_parameters(job, workdir: Path, name: str = ""):
    """What serves the student of this name, and its parameters in the newest checkpoint."""
    states, _ = job.restored(workdir)
    ((group, state),) = (of for of in zip(job.groups, states, strict=True) if name in of[0].names)
    parameters = select_member(state.parameters, group.names.index(name))
    return make_serve(group.recipe.model, group.recipe.mode), parameters


def served(world: World, serve: Any, parameters: Any, name: str, items: Any = None) -> Scores:
    """What a ranker says of the test requests as the dataset has them, one by one."""
    dataset = datasets.dataset_of(world.config)
    known, scores = items or dataset.items, {}
    name_of = {id_: value for value, id_ in ids_in(dataset, "item").items()}
    ids = read_requests_of(dataset.directory, "test")["request"].to_pylist()
    for id_, request in zip(ids, read_requests(dataset, "test"), strict=True):
        names = [name_of[item] for item in request.item_id.tolist()]
        batch = full_batch(columns_of([request], dataset.spec), len(names))
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


def test_an_export_says_of_raw_rows_what_scoring_and_evaluation_say(world, tmp_path, score):
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
    assert_close(found, served(world, *student_of(workdir), "blend"))
    assert_close(found, score("student", world.tested)[0])


def test_new_users_and_items_get_the_reserved_row_and_are_counted(world, score):
    rows = copy.deepcopy(world.tested)
    users = {rows[0].of_request["user_id"], "user-1"}
    for row in rows:
        if row.of_request["user_id"] in users:
            row.of_request["user_id"] = f"new {row.of_request['user_id']}"
        for candidate in row.candidates:
            if candidate["item_id"] == ITEM:
                candidate["item_id"] = "new"
    found, lines = score("student", rows)
    # As if their own rows held what the reserved ones hold.
    serve, parameters = student_of(world.folder / "student")
    dataset = datasets.dataset_of(world.config)
    tables = dict(parameters.tables)
    for name, values, size in (
        ("user", users, dataset.spec.num_users),
        ("item", {ITEM}, dataset.spec.num_items),
    ):
        ids = [ids_in(dataset, name)[value] for value in values]
        width = world.config.student.width
        of_reserved = tables[name][size, :width]
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


def test_a_known_item_has_the_features_that_the_log_gives_it(world, score):
    rows = copy.deepcopy(world.tested)
    last = {of["item_id"]: of for row in rows for of in row.candidates}
    one, other = "item-5", "item-6"
    features = {name: last[other][name] for name in ("author", "duration", "quality", "tags")}
    for row in rows:
        for candidate in row.candidates:
            if candidate["item_id"] == one:
                candidate.update(features)
    dataset = datasets.dataset_of(world.config)
    id_of = ids_in(dataset, "item")
    features, category = dataset.item_features.copy(), dataset.item_category.copy()
    for of in (features, category):
        assert of[id_of[one]].tolist() != of[id_of[other]].tolist()
        of[id_of[one]] = of[id_of[other]]
    student = student_of(world.folder / "student")
    expected = served(world, *student, "blend", Items(features, category))
    assert_close(score("student", rows)[0], expected)


def test_what_validation_and_test_have_alone_counts_as_unknown(tmp_path):
    """It has ids in the vocabularies, and training has met none of them."""
    rows = make_rows(2, requests=20, texts=True)
    rows[-1].of_request["user_id"] = "late"
    config = faulty_logs.config(write_log(tmp_path / "log", rows), tmp_path / "datasets")
    api.prepare(config)
    layout = faulty_logs.layout(config)
    log, own = unseen.open_unseen(layout, layout)
    dataset = datasets.dataset_of(config)
    new = unseen.read_unseen(log, own, layout, dataset, tmp_path / "read").counts["new"]
    in_train = rows[: 20 - round(0.4 * 20)]
    users = {row.of_request["user_id"] for row in in_train}
    known = {of["item_id"] for row in in_train for of in row.candidates}
    of_new = [len(row.candidates) for row in rows if row.of_request["user_id"] not in users]
    assert new["user"] == sum(of_new) >= len(rows[-1].candidates)
    number = sum(of["item_id"] not in known for row in rows for of in row.candidates)
    assert new["item"] == number > 0


def test_what_cannot_be_scored_is_absent_and_counted(world, score):
    rows = copy.deepcopy(world.tested)
    rows[0].of_request["user_id"] = None
    rows[1].candidates[1]["item_id"] = None
    rows[2].candidates.append(dict(rows[2].candidates[0]))
    lost = len(rows[0].candidates)
    found, lines = score("teacher", rows)
    expected = {
        (row.of_request["request_id"], of["item_id"]) for row in rows for of in row.candidates
    }
    absent = {(rows[0].of_request["request_id"], of["item_id"]) for of in rows[0].candidates}
    absent.add((rows[1].of_request["request_id"], None))
    assert found.keys() == expected - absent
    assert lines[1].endswith(
        f"scored + {lost + 2} rejected (missing_user {lost}, missing_item 1, duplicate_item 1)"
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_run_that_was_killed_resumes_at_the_first_file_that_is_missing(
    world, tmp_path, monkeypatch
):
    """Files are scored in their order, though pieces end elsewhere; a second run reads nothing."""
    monkeypatch.setattr(encode, "PIECE", 40)
    log = write_raw(tmp_path / "log", world.tested, files=4)
    part = log / "part-2.parquet"
    pq.write_table(pq.read_table(part).slice(0, 0), part)  # and one has no request
    config, workdir = config_for(world, "student", log), world.folder / "student"
    whole = contents(scoring.score_unseen(config, workdir, output=tmp_path / "whole")[0].directory)
    names = [f"{number:05d}-part-{number}.parquet" for number in range(4)]
    assert sorted(name for name in whole if name.endswith(".parquet")) == names
    assert not pq.read_metadata(tmp_path / "whole" / names[2]).num_rows
    written, table_of = [], scoring._Scorer._table

    class Killed(BaseException):
        pass

    def dying(scorer, part):
        written.append(part.path.name)
        if part.path.name == killed_at:
            raise Killed
        return table_of(scorer, part)

    monkeypatch.setattr(scoring._Scorer, "_table", dying)
    output, killed_at = tmp_path / "out", names[1]
    with pytest.raises(Killed):
        scoring.score_unseen(config, workdir, output=output)
    (work,) = output.glob(".scoring-*")
    assert not [*output.glob("*.parquet")]
    assert (work / names[0]).read_bytes() == whole[names[0]]
    written.clear()
    killed_at = ""
    first = scoring.score_unseen(config, workdir, output=output)
    assert {*written} == {*names[1:]}
    assert contents(output) == whole
    killed_at = names[0]
    assert scoring.score_unseen(config, workdir, output=output) == first


def test_a_log_may_lack_the_time_and_call_its_columns_otherwise(world, tmp_path):
    log = write_raw(tmp_path / "log", world.tested)
    config = config_for(world, "teacher", log)
    workdir = world.folder / "teacher"
    config.data.dir = str(world.folder / "datasets")
    before, _ = scoring.score_unseen(config, workdir)
    assert before.directory.parent == world.folder / "datasets" / "scored"
    file = log / "part-0.parquet"
    table = pq.read_table(file).drop_columns(["time"])
    pq.write_table(table.rename_columns({"age": "years"}), file)
    config.data.features.age.column = "years"
    config.parallel.devices = config.batch.requests = config.teacher.batch.requests = 64
    after, _ = scoring.score_unseen(config, workdir, output=tmp_path / "after")
    assert scores_in(before) == scores_in(after)


def test_without_a_member_the_best_of_a_sweep_on_validation_scores(world, tmp_path, score):
    workdir = world.folder / "sweep"
    table = results.read_csv(workdir / results.FILE)
    rows = table[(table["role"] == "student") & (table["split"] == "validation")]
    best = rows["member"][rows["passed_for_99"].astype(float).idxmin()]
    _, lines = score("sweep", world.tested)
    assert lines[0] == (
        f"ranker: member {best} of the sweep at {workdir} (the best of 2 on validation), by its "
        "probabilities 'user'"
    )
    config = config_for(world, "sweep", tmp_path / "log")
    named, lines = scoring.score_unseen(config, workdir, "none-seed1", tmp_path / "named")
    assert lines[0].startswith("ranker: member none-seed1 of the sweep")
    (cohort,) = (workdir / "cohorts").iterdir()
    members = sweep_members(workdirs.read_config(workdir))
    own = serve_and_parameters(open_job(world.config, members), cohort, "none-seed1")
    expected = served(world, *own, "user")
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


def test_a_student_scores_where_its_teacher_is_gone(world, score):
    (world.folder / "teacher").rename(world.folder / "elsewhere")
    try:
        score("student", world.tested)
    finally:
        (world.folder / "elsewhere").rename(world.folder / "teacher")


def fault_of(config: ConfigDict, workdir: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        scoring.score_unseen(config, workdir, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


OTHER_LOGS = [
    (
        lambda table: table.drop_columns(["age", "tags"]),
        "'age' (data.features.age), 'tags' (data.features.tags)",
    ),
    (
        lambda table: with_column(table, "item_id", range(len(table))),
        "a history holds item ids",
    ),
    # Hashed values have no vocabulary, and each would get some row.
    *(
        (
            lambda table, name=name, of=of: with_column(table, name, [of] * len(table)),
            f"column '{name}' (data.features.{name}) holds whole numbers, and in training it held "
            "texts; give it the type that it had",
        )
        for name, of in (("country", 1), ("spots", [0, 1]))
    ),
    (
        lambda table: with_column(table, "item_id", pa.nulls(len(table), pa.string())),
        "not one row of the log can be used",
    ),
]


def test_bad_input_is_one_line_and_leaves_nothing(world, tmp_path):
    log = write_raw(tmp_path / "log", world.tested)
    config, workdir = config_for(world, "sweep", log), world.folder / "sweep"
    out = {"output": tmp_path / "out"}
    assert "no run at" in fault_of(config, tmp_path, **out)
    message = fault_of(config, workdir, member="x", **out)
    assert message.endswith("has no member 'x'; it has: none-seed0, none-seed1")
    assert "leave --member out" in fault_of(config, world.folder / "student", member="x", **out)
    other = config.copy_and_resolve_references()
    other.data.features.age.kind = "category"
    assert "data.features.age; leave --config out" in fault_of(other, workdir, **out)
    other = config_for(world, "sweep", log, **{"data.dir": str(tmp_path)})
    assert "no dataset at" in fault_of(other, workdir, **out)
    assert "and one is of cascade; kd-ranker log-teacher" in fault_of(cascade("small"), workdir)
    file = log / "part-0.parquet"
    table = pq.read_table(file)
    for change, message in OTHER_LOGS:
        pq.write_table(change(table), file)
        assert message in fault_of(config, workdir, **out)
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
    # Nor is a finished log with a file that is gone.
    next(out.rglob("*.parquet")).unlink()
    assert ".parquet is missing; remove the folder" in fault_of(config, workdir, output=out)
