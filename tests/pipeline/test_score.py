"""Scores of a log that training has never seen, and of a dataset that was made of a log."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from kd_ranker import api, main
from kd_ranker.batch import Items
from kd_ranker.configs import cascade
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.evaluation.evaluate import Ranker, Served, make_serve
from kd_ranker.pipeline import datasets, scores, scoring
from kd_ranker.pipeline.job import open_job
from kd_ranker.pipeline.trained import TrainedRanker
from kd_ranker.pipeline.trainees import open_trainees
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS
from kd_ranker.requests.row_files import columns_of
from kd_ranker.serving import check
from kd_ranker.sources.logs import encode
from kd_ranker.sources.logs.vocabulary import read_requests_of, read_vocabulary
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.state import select_run
from tests.batches.packing_by_hand import full_batch
from tests.faults import fault_of
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


def scores_in(scored: scores.Scored) -> Scores:
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
    """What serves a student, and its parameters in the newest checkpoint."""
    config = workdirs.read_config(workdir)
    job = open_job(config, {"": config})
    (state,), _ = job.restored(workdir)
    (stack,) = job.trainees.stacks
    parameters = select_run(state.parameters, 0)
    return make_serve(stack.train_spec.model, stack.train_spec.mode), parameters


def served(world: World, serve: Any, parameters: Any, name: str, items: Any = None) -> Scores:
    """What a ranker says of the test requests as the dataset has them, one by one."""
    dataset = datasets.dataset_of(world.config)
    scores: Scores = {}
    name_of = {id_: value for value, id_ in ids_in(dataset, "item").items()}
    ids = read_requests_of(dataset.directory, "test")["request"].to_pylist()
    for id_, request in zip(ids, read_requests(dataset, "test"), strict=True):
        names = [name_of[item] for item in request.item_id.tolist()]
        batch = full_batch(columns_of([request], dataset.spec), len(names))
        result = serve(parameters, batch, items or dataset.items)
        (probability,) = np.asarray(result.probability[name])
        for item, item_probability in zip(names, probability, strict=True):
            value = float(item_probability @ np.array(world.config.value_weights))
            scores[id_, item] = [*item_probability.tolist(), value]
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

    found = scores_in(scored)
    logged = scores_in(api.log_teacher(world.config))
    assert len(found) == sum(len(row.candidates) for row in world.tested)
    assert_close(found, {key: logged[key] for key in found})
    assert len(logged) == sum(len(row.candidates) for row in world.rows)


def test_export_scoring_and_evaluation_agree_on_raw_rows(world, tmp_path, score):
    """A server that knows the folder alone makes the inputs from the columns of the log."""
    workdir = world.folder / "student"
    folder = tmp_path / "export"
    api.export(workdir, folder, formats=("jax",))
    server = Server(folder)
    programs = check.open_programs(folder, "jax")
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
            key = (row.of_request["request_id"], candidate["item_id"])
            found[key] = [*answers["probability"][place, number], answers["value"][place, number]]
    assert_close(found, served(world, *student_of(workdir), "blend"))
    assert_close(found, score("student", world.tested)[0])


def test_new_ids_get_the_reserved_row_and_are_counted(world, score):
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
        reserved = tables[name][size, :width]
        tables[name] = np.array(tables[name])
        tables[name][ids, :width] = reserved
    expected = served(world, serve, parameters.replace(tables=tables), "blend")
    with_own_rows = served(world, serve, parameters, "blend")
    changed = [key for key, numbers in with_own_rows.items() if numbers != expected[key]]
    assert len(changed) > 10
    renamed = {}
    for (request, item), numbers in expected.items():
        renamed[request, "new" if item == ITEM else item] = numbers
    assert_close(found, renamed)
    by_user = 0
    by_item = 0
    for row in rows:
        if row.of_request["user_id"].startswith("new"):
            by_user += len(row.candidates)
        by_item += sum(candidate["item_id"] == "new" for candidate in row.candidates)
    number = len(found)
    assert by_user
    assert by_item
    assert lines[1:] == [
        f"candidates: {number} in the log = {number} scored + 0 rejected",
        f"unknown to training: {by_user} candidates ({by_user / number:.1%}) by their user, "
        f"{by_item} candidates ({by_item / number:.1%}) by their item",
    ]


def test_a_known_item_has_the_features_that_the_log_gives_it(world, score):
    rows = copy.deepcopy(world.tested)
    candidates = [candidate for row in rows for candidate in row.candidates]
    last = {candidate["item_id"]: candidate for candidate in candidates}
    names = ("author", "duration", "quality", "tags")
    changes = {name: last["item-6"][name] for name in names}
    for candidate in candidates:
        if candidate["item_id"] == "item-5":
            candidate.update(changes)
    dataset = datasets.dataset_of(world.config)
    id_of = ids_in(dataset, "item")
    changed = id_of["item-5"]
    like = id_of["item-6"]
    features = dataset.items.features.copy()
    category = dataset.items.category.copy()
    for array in (features, category):
        assert array[changed].tolist() != array[like].tolist()
        array[changed] = array[like]
    student = student_of(world.folder / "student")

    found, _ = score("student", rows)

    assert_close(found, served(world, *student, "blend", Items(features, category)))


def test_what_cannot_be_scored_is_absent_and_counted(world, score):
    rows = copy.deepcopy(world.tested)
    rows[0].of_request["user_id"] = None
    rows[1].candidates[1]["item_id"] = None
    rows[2].candidates.append(dict(rows[2].candidates[0]))
    lost = len(rows[0].candidates)

    found, lines = score("teacher", rows)

    expected = set()
    for row in rows[1:]:
        request = row.of_request["request_id"]
        expected |= {(request, candidate["item_id"]) for candidate in row.candidates}
    expected.remove((rows[1].of_request["request_id"], None))
    assert found.keys() == expected
    assert lines[1].endswith(
        f"scored + {lost + 2} rejected (missing_user {lost}, missing_item 1, duplicate_item 1)"
    )


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_a_killed_run_resumes_at_the_first_missing_file(world, tmp_path, monkeypatch):
    """Files are scored in their order, though pieces end elsewhere; a second run reads nothing."""
    monkeypatch.setattr(encode, "PIECE", 40)
    log = write_raw(tmp_path / "log", world.tested, files=4)
    part = log / "part-2.parquet"
    pq.write_table(pq.read_table(part).slice(0, 0), part)  # and one has no request
    config = config_for(world, "student", log)
    workdir = world.folder / "student"
    scored, _ = scoring.score_unseen(config, workdir, output=tmp_path / "whole")
    whole = contents(scored.directory)
    names = [f"{number:05d}-part-{number}.parquet" for number in range(4)]
    assert sorted(name for name in whole if name.endswith(".parquet")) == names
    assert not pq.read_metadata(tmp_path / "whole" / names[2]).num_rows
    written = []
    table_of = scores.Scorer.score

    def dying(scorer, part):
        written.append(part.path.name)
        if part.path.name == killed_at:
            raise KeyboardInterrupt
        return table_of(scorer, part)

    monkeypatch.setattr(scores.Scorer, "score", dying)
    output = tmp_path / "out"
    killed_at = names[1]
    with pytest.raises(KeyboardInterrupt):
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


def test_without_a_run_the_best_of_a_sweep_on_validation_scores(world, tmp_path, score):
    workdir = world.folder / "sweep"
    table = results.read_csv(workdir / results.FILE)
    rows = table[(table["role"] == "student") & (table["split"] == "validation")]
    best = rows["run"][rows["passed_for_99"].astype(float).idxmin()]
    _, lines = score("sweep", world.tested)
    assert lines[0] == (
        f"ranker: run {best} of the sweep at {workdir} (the best of 2 on validation), by its "
        "probabilities 'user'"
    )
    config = config_for(world, "sweep", tmp_path / "log")
    _, lines = scoring.score_unseen(config, workdir, "none-seed1", tmp_path / "named")
    assert lines[0].startswith("ranker: run none-seed1 of the sweep")


def test_a_student_scores_where_its_teacher_is_gone(world, score):
    (world.folder / "teacher").rename(world.folder / "elsewhere")
    try:
        score("student", world.tested)
    finally:
        (world.folder / "elsewhere").rename(world.folder / "teacher")


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


# How a column of the log is replaced (None: it lacks it), or a key of the config, and the message.
REFUSED = [
    ({"age": None, "tags": None}, {}, "'age' (data.features.age), 'tags' (data.features.tags)"),
    ({"item_id": range}, {}, "a history holds item ids"),
    # Hashed values have no vocabulary, and each would get some row.
    ({"country": lambda number: [1] * number}, {},
     "column 'country' (data.features.country) holds whole numbers, and in training it held texts"),
    ({"spots": lambda number: [[0, 1]] * number}, {}, "(data.features.spots) holds whole numbers"),
    ({"item_id": lambda number: pa.nulls(number, pa.string())}, {}, "not one row of the log"),
    ({}, {"data.features.age.kind": "category"}, "data.features.age; leave --config out"),
    ({}, {"data.dir": "nowhere"}, "no dataset at"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "keys", "message"), REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(world, tmp_path, columns, keys, message):
    log = write_raw(tmp_path / "log", world.tested)
    file = log / "part-0.parquet"
    table = pq.read_table(file)
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.remove_column(place)
        if values:
            table = table.add_column(place, name, pa.array(values(len(table))))
    pq.write_table(table, file)
    config, workdir = config_for(world, "sweep", log, **keys), world.folder / "sweep"
    assert message in fault_of(scoring.score_unseen, config, workdir, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("workdir", "run", "message"),
    [
        ("", "", "no run at"),
        ("sweep", "x", "has no run 'x'; name one of: none-seed0, none-seed1"),
        ("student", "x", "and --run=x is for a sweep; leave it out"),
    ],
)
def test_a_ranker_that_there_is_not_is_one_line(world, tmp_path, workdir, run, message):
    workdir, log = world.folder / workdir, write_raw(tmp_path / "log", world.tested)
    assert message in fault_of(api.score, workdir, log, tmp_path / "out", run)
    assert not (tmp_path / "out").exists()


def test_requests_that_are_no_log_are_for_log_teacher(world):
    fault = fault_of(scoring.score_unseen, cascade("small"), world.folder / "sweep")
    assert "and one is of cascade; kd-ranker log-teacher" in fault


def test_a_folder_with_something_else_is_not_written_to(world, tmp_path):
    log = write_raw(tmp_path / "log", world.tested)
    out = tmp_path / "out"

    def fault(workdir: str, output: Path = out) -> str:
        config = config_for(world, workdir, log)
        return fault_of(scoring.score_unseen, config, world.folder / workdir, output=output)

    out.mkdir()
    (out / "mine.txt").write_text("")
    assert "give another folder with --out" in fault("teacher")
    assert "is inside the log" in fault("teacher", log / "scored")
    (out / "mine.txt").unlink()
    config = config_for(world, "teacher", log)
    scoring.score_unseen(config, world.folder / "teacher", output=out)
    assert "give another folder with --out" in fault("student")
    # Nor is a finished log with a file that is gone.
    next(out.rglob("*.parquet")).unlink()
    assert ".parquet is missing; remove the folder" in fault("teacher")


VERSION = "0123456789ab"


def stub_teacher(config: Any) -> TrainedRanker:
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
    fields = ("stub", open_trainees(config), "", "user", None, ranker, VERSION, {})
    return TrainedRanker(*fields)  # type: ignore[arg-type]


@pytest.fixture
def stubbed(monkeypatch):
    monkeypatch.setattr(scoring, "load_teacher", stub_teacher)


def test_scores_of_a_select_are_one_file(tmp_path, stubbed):
    log = write_log(tmp_path / "log", make_rows(3, requests=40), files=3)
    config = faulty_logs.config(log, tmp_path / "datasets")
    select = faulty_logs.config("", tmp_path / "datasets", sql=f"SELECT * FROM '{log}/*.parquet'")

    def scored_files(config: ConfigDict) -> list[Path]:
        config.evaluation.requests = 8
        api.prepare(config)
        return sorted(api.log_teacher(config).directory.glob("*.parquet"))

    def sorted_rows(files: list[Path]) -> pa.Table:
        table = pa.concat_tables(map(pq.read_table, files))
        return table.sort_by([("request", "ascending"), ("item", "ascending")])

    files_of_log = scored_files(config)
    files_of_select = scored_files(select)

    assert [path.name for path in files_of_select] == ["00000-data.parquet"]
    assert sorted_rows(files_of_log).equals(sorted_rows(files_of_select))


@pytest.mark.parametrize("by_request", [False, True])
@pytest.mark.parametrize("stage", ["shown", "passed", "retrieved"])
def test_scores_of_a_log_join_its_rows_by_request_and_item(tmp_path, stubbed, by_request, stage):
    rows = make_rows(3, requests=40, faults=0.05, texts=True)
    log = write_log(tmp_path / "log", rows, by_request, files=3, shuffle=5)
    config = faulty_logs.config(log, tmp_path / "datasets")
    config.data.rows = "request" if by_request else "candidate"
    config.evaluation.requests, config.teacher.stage = 8, stage
    api.prepare(config)
    directory = api.log_teacher(config).directory
    assert directory == datasets.scores_folder(config, VERSION)
    # The files of the log, and each request in one of those that have its rows.
    files = sorted(file.name for file in Path(log).iterdir())
    named = [f"{number:05d}-{file}" for number, file in enumerate(files)]
    assert sorted(path.name for path in directory.glob("*.parquet")) == named
    requests = {file: {*pq.read_table(log / file)["request_id"].to_pylist()} for file in files}
    scored = [{*pq.read_table(directory / name)["request"].to_pylist()} for name in named]
    for scored_requests, file in zip(scored, files, strict=True):
        assert scored_requests <= requests[file]
    assert len(set().union(*scored)) == sum(map(len, scored))
    source = f"'{log}/*.parquet'"
    if by_request:
        source = f"(SELECT request_id, unnest(item_id) AS item_id FROM {source})"
    joined = duckdb.sql(
        f"SELECT DISTINCT request_id, item_id, probability_watch, probability_like "
        f"FROM {source} AS log "
        f"JOIN '{directory}/*.parquet' AS scores ON request = request_id AND item = item_id"
    ).fetchall()
    # Of a request whose rows have several times, the dataset knows the earliest, a full minute.
    name = {}
    for row in rows:
        if isinstance(time := row.of_request["time"], int):
            name[time - (time - 1_000_000) % 60] = row.of_request["request_id"]
    dataset = datasets.dataset_of(config)
    table = read_vocabulary(dataset.directory, "item").to_pydict()
    items = dict(zip(table["id"], table["value"], strict=True))
    expected = {}
    for split in SPLITS:
        for request in read_requests(datasets.dataset_under(config, dataset, VERSION), split):
            reached = {
                "shown": len(request.user_label),
                "passed": request.num_passed,
                "retrieved": len(request.item_id),
            }
            # Rankers are measured on all candidates.
            number = reached[stage if split == "train" else "retrieved"]
            assert len(request.teacher_probability) == number
            for item, probability in zip(
                request.item_id, request.teacher_probability, strict=False
            ):
                expected[name[request.time], items[item]] = probability
    assert len(expected) > 100
    found = {(request, item): probability for request, item, *probability in joined}
    assert len(found) == len(joined)
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal([found[key] for key in expected], [*expected.values()])
    assert len({tuple(probability) for probability in found.values()}) > 0.9 * len(found)


def test_the_select_of_a_run_is_executed_only_if_trusted(world, tmp_path, monkeypatch, capsys):
    """A workdir may come from someone else, and its SELECT can read any file of this machine."""
    run = tmp_path / "run"
    run.mkdir()
    config = workdirs.read_config(world.folder / "student")
    config.data.path, config.data.sql = "", "SELECT * FROM '/home/me/private.csv'"
    (run / workdirs.CONFIG_FILE).write_text(config.to_json())
    read: list[str] = []

    def score_unseen(config: ConfigDict, *_: Any) -> tuple[scores.Scored, list[str]]:
        read.append(config.data.sql)
        return scores.Scored(world.folder), []

    monkeypatch.setattr(scoring, "score_unseen", score_unseen)
    monkeypatch.setattr(scores.Scored, "__str__", lambda _: "")
    message = (
        rf"the run at {run} reads its log by data\.sql.*private\.csv.* add --trust, or trust=Tr"
    )
    with pytest.raises(UserError, match=message):
        api.score(run, "")

    def command(*flags: str) -> None:
        arguments = [f"--workdir={run}", *flags]
        main.run_command(main.COMMANDS["score"], "kd-ranker score", arguments)

    with pytest.raises(SystemExit):
        command()
    assert "add --trust" in capsys.readouterr().err
    assert not read
    api.score(run, "", trust=True)
    command("--trust")
    own = "SELECT 1"
    command(f"--config.data.sql={own}")
    api.score(run, "", config=config)  # a config of the program
    assert read == [config.data.sql, config.data.sql, own, config.data.sql]
