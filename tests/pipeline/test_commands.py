"""The commands on the small cascade: what they leave, what they do again, what they refuse."""

import functools
import json
import shutil

import jax
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from kd_ranker import api, manifest
from kd_ranker.batches.cutting import unpack
from kd_ranker.batches.training import BatchConfig, training_batches
from kd_ranker.config.runs import sweep_runs
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import UserError
from kd_ranker.evaluation import request_files, results
from kd_ranker.evaluation.baselines import BASELINES
from kd_ranker.evaluation.saving import SAVINGS
from kd_ranker.pipeline import datasets, measure, scoring
from kd_ranker.pipeline import job as jobs
from kd_ranker.pipeline.job import load_teacher, open_job, open_ranker
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.study import read_studies
from kd_ranker.requests.lock import hold
from kd_ranker.requests.records import read_requests
from kd_ranker.training import checkpoints, specs
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.state import select_run
from tests import small
from tests.faults import fault_of
from tests.small import SWEEP

TABLES = (results.FILE, results.CURVES_FILE, results.CALIBRATION_FILE)


@pytest.fixture(scope="module")
def swept(world):
    return world.sweep()


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a workdir, to be changed."""
    return lambda workdir: shutil.copytree(workdir, tmp_path / "copies" / workdir.name)


def table(workdir):
    return results.read_csv(workdir / results.FILE)


def rows_of(workdir, split, role="student"):
    """The rows of a sweep's results."""
    frame = table(workdir)
    return frame[(frame["split"] == split) & (frame["role"] == role)]


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def files_of(workdir):
    """The content of its files, without those that are written anew each time."""
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    }


def assert_same_results(workdir, expected):
    """Their tables, metrics and contributions of requests are the same bytes."""
    found = files_of(workdir)
    for path, content in files_of(expected).items():
        if path.endswith((".csv", ".parquet", ".jsonl")):
            assert found[path] == content, path


def written_at(folder):
    """The time of each file; folders have another after they were held."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def run_of(world, name):
    """The workdir of a finished run; a test changes, and runs commands on, a copy alone."""
    known = {"sweep": world.sweep, "teacher": lambda: world.teacher}
    return known.get(name, lambda: world.student(name))()


def start_again(world, name, workdir):
    """Starts a run of `run_of` again; False of a sweep that was complete."""
    if name == "sweep":
        return small.sweep(world.config(**SWEEP), workdir)
    return bool(api.train(world.config(distill__mode=name), workdir).results.empty)


def student_parameters(workdir):
    config = workdirs.read_config(workdir)
    job = open_job(config, {"": config})
    (state,), step = job.restored(workdir)
    assert step == config.train.steps
    return select_run(state.parameters, 0)


@pytest.mark.parametrize("mode", MODES)
def test_train_leaves_what_the_contract_says(world, mode):
    workdir, config = world.student(mode), world.config(distill__mode=mode)
    frame, serves = table(workdir), list(MODES[mode].serve)
    assert list(frame.columns) == results.columns(config.tasks, open_job(config).report_at)
    assert frame["split"][frame["role"] == "teacher"].tolist() == ["validation", "test"]
    frame = frame[frame["role"] == "student"]
    assert frame["serve"].tolist() == serves * 2
    splits = [split for split in ("validation", "test") for _ in serves]
    assert frame["split"].tolist() == splits
    # The twelve requests of a split are others than those of the other.
    first, last = (frame["user_bce/watch"][frame["split"] == of] for of in ("validation", "test"))
    assert (first != last.array).all()
    assert (set(frame["mode"]), set(frame["step"])) == ({mode}, {config.train.steps})
    assert frame["user_bce/watch"].between(0, 2).all()
    assert frame["cost_ratio"].between(0, 0.1).all()
    assert len(request_files.read_requests(workdir).each) == 1 + len(serves)
    distilled = mode != "none"
    assert frame["distill_loss"].notna().all() == distilled
    assert set(frame["distill_weight"]) == {1.0 if distilled else 0.0}

    assert json.loads((workdir / "config.json").read_text()) == json.loads(config.to_json())
    assert (workdir / "checkpoints" / "20").is_dir()
    assert list(workdir.glob("events.out.tfevents.*"))
    lines = metrics(workdir)
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert [line["step"] for line in lines if "loss" in line] == [5, 10, 15, 20]
    assert [line["step"] for line in lines if "eval/user_bce/watch" in line] == [10]


def test_the_report_of_single_runs_has_what_that_of_a_sweep_has(world):
    """Intervals over requests, and a saving where there is a baseline."""
    (study,) = read_studies([world.student("none"), world.student("shared")])
    assert (len(study.teachers), bool(study.kept)) == (1, True)
    estimates = Estimates(study)
    assert estimates.gap("shared, weight 1", "none", "passed_for_99").covers == "requests"
    assert np.isfinite(estimates.saving("shared, weight 1", 0.99).low)


@pytest.mark.parametrize("run", ["shared", "sweep"])
def test_a_finished_run_is_left_as_it_is(world, copy_of, run):
    workdir = copy_of(run_of(world, run))
    before, at = files_of(workdir), written_at(workdir)
    assert not start_again(world, run, workdir)
    assert files_of(workdir) == before
    assert (written_at(workdir) == at) == (run == "sweep")


def log_teacher(world):
    """Two workers that write the same scores at once would be in each other's way."""
    with world.locked("log_teacher"):
        return api.log_teacher(world.config()).directory


@pytest.mark.parametrize("mode", [pytest.param("aux", marks=pytest.mark.long), "shared"])
def test_a_logged_teacher_gives_the_student_of_the_live_one(world, tmp_path, mode):
    log_teacher(world)
    # Adam would take the sign of a gradient that is zero but for rounding for a direction.
    descent = {"name": "sgd", "table_name": "sgd", "learning_rate": 0.3, "table_learning_rate": 3.0}
    changes = {f"optimizer__{key}": value for key, value in descent.items()}
    live, logged = tmp_path / "live", tmp_path / "logged"
    for workdir in (live, logged):
        config = world.config(distill__mode=mode, teacher__source=workdir.name, **changes)
        api.train(config, workdir)
    one, other = student_parameters(live), student_parameters(logged)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, other)
    (group,) = specs.student_stacks({"": config}, datasets.dataset_of(config).spec)
    start = select_run(group.init().parameters, 0)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), one, start)
    assert max(jax.tree.leaves(moved)) > 0.02
    # Of the students: a teacher in a log has no rows of its own for ids.
    tables = (table(workdir).query("role == 'student'") for workdir in (live, logged))
    one, other = (of.select_dtypes("number") for of in tables)
    np.testing.assert_allclose(one, other, rtol=1e-3)


def test_students_learn_from_their_teachers_scores_alone(world):
    config = world.config()
    directory, original = log_teacher(world), datasets.dataset_of(config)
    version = load_teacher(config).version
    assert f"-teacher-{version}" in directory.name
    dataset = datasets.dataset_under(config, original, version)
    assert dataset.spec.teacher_version == version
    # teacher.stage=retrieved: every candidate was scored.
    scores = pq.read_table(next(directory.glob("*-train.parquet"))).to_pandas()
    scores = scores.set_index(["request", "item"])
    assert set(scores["version"]) == {version}
    for request in read_requests(dataset, "train"):
        own = scores.loc[[(request.request_id, item) for item in request.item_id]]
        names = [f"probability_{task}" for task in dataset.spec.tasks]
        np.testing.assert_allclose(own[names], request.teacher_probability, rtol=1e-6)
    sizes = BatchConfig(8, 32, 0.5, 1.0, seed=0)
    batch = unpack(*next(iter(training_batches(dataset, sizes))))
    assert (np.asarray(batch.teacher_weight) == 1).all()
    # Requests of the log itself have those that the log had.
    assert len(next(read_requests(original, "train")).teacher_probability) < 100


@pytest.fixture
def apart(world, tmp_path, monkeypatch):
    """The config of a dataset that no other test scores, in parts of one batch: 4, 1 and 1."""
    dataset = datasets.dataset_of(world.config())
    copied = tmp_path / "requests" / dataset.directory.parent.name
    shutil.copytree(dataset.directory.parent, copied)
    monkeypatch.setattr(scoring, "_BATCHES", 1)
    config = world.config(data__dir=str(tmp_path))
    assert config.evaluation.requests == 16
    return config


def test_cohorts_of_two_stages_read_the_scores_of_each(apart):
    apart.sweep.axes.teacher.stage = ("passed", "retrieved")
    for stage in apart.sweep.axes.teacher.stage:
        apart.teacher.stage = stage
        api.log_teacher(apart)
    apart.teacher.source = "logged"
    runs = sweep_runs(apart)
    job = open_job(apart)
    read = [job.of({name: run}).dataset for name, run in runs.items()]
    for run, dataset in zip(runs.values(), read, strict=True):
        assert f"-{run.teacher.stage}/" in dataset.provenance["scored"]


def test_finished_scores_are_left_alone_checked_and_replaced(apart, tmp_path, monkeypatch):
    directory = api.log_teacher(apart).directory
    before = files_of(directory)
    monkeypatch.setattr(scoring, "_BATCHES", 64)
    with monkeypatch.context() as patch:
        patch.setattr(scoring._Scorer, "write", None)
        assert api.log_teacher(apart).directory == directory
    # Scores of other value weights replace these; columns depend on neither these nor on parts.
    apart.value_weights = tuple(2 * weight for weight in apart.value_weights)
    assert api.log_teacher(apart).directory == directory
    after = files_of(directory)
    columns = {name for name in before if name.startswith("teacher-")}
    assert len(columns) == 3
    assert {name for name in after if after[name] == before[name]} == {*columns, scoring.FILE}
    logged = apart.copy_and_resolve_references()
    logged.teacher.source = "logged"
    (directory / "teacher-test.npy").write_bytes(after["teacher-test.npy"][:-1] + b"x")
    assert "teacher-test.npy has changed; remove the folder" in fault_of(api.log_teacher, apart)
    assert "teacher-test.npy has changed" in fault_of(api.train, logged, tmp_path / "student")


def test_another_teachers_scores_are_refused(apart):
    directory, version = api.log_teacher(apart).directory, load_teacher(apart).version
    other = directory.with_name(directory.name.replace(version, "another"))
    directory.rename(other)
    fault = fault_of(datasets.dataset_under, apart, datasets.dataset_of(apart), "another")
    found = f"{other} has the scores of teacher {version}, and the teacher is another; remove"
    assert fault.startswith(found)


@pytest.fixture
def exchange(world, tmp_path):
    """A teacher's workdir, and a function that puts another teacher there."""
    workdir = tmp_path / "exchanged"
    shutil.copytree(world.teacher, workdir)
    config = world.config(teacher__workdir="", seed=5)
    other = world.made("another_teacher", lambda folder: api.train_teacher(config, folder))
    return workdir, lambda: shutil.copytree(other, workdir)


@pytest.mark.parametrize("source", ["live", "logged"])
@pytest.mark.parametrize("command", [api.train, api.sweep])
def test_results_under_another_teacher_are_not_taken_for_these(
    apart, tmp_path, exchange, command, source
):
    teacher, put_other = exchange
    changes = {"train.steps": 4, "train.eval_every": 0, "sweep.modes": ("none",)}
    apart.update_from_flattened_dict(
        changes | {"teacher.workdir": str(teacher), "teacher.source": source}
    )
    workdir, versions = tmp_path / "run", []
    for last in (False, True):
        versions.append(load_teacher(apart).version)
        if source == "logged":
            api.log_teacher(apart)
        if last:
            break
        command(apart, workdir)
        shutil.rmtree(teacher)
        put_other()
    before = (workdir / results.FILE).read_bytes()
    fault = fault_of(command, apart, workdir)
    assert all(version in fault for version in versions)
    assert "use another --workdir" in fault
    assert (workdir / results.FILE).read_bytes() == before


def test_a_complete_sweep_does_not_need_its_teacher(apart, tmp_path, exchange):
    teacher, _ = exchange
    changes = {"train.steps": 4, "train.eval_every": 0, "teacher.workdir": str(teacher)}
    apart.update_from_flattened_dict(changes)
    assert small.sweep(apart, tmp_path / "run")
    shutil.rmtree(teacher)
    assert not small.sweep(apart, tmp_path / "run")
    assert read_studies([tmp_path / "run"])
    assert open_ranker(tmp_path / "run")


def test_a_missing_or_foreign_environment_is_not_known(world, copy_of):
    workdir = copy_of(world.student("none"))
    file = workdir / workdirs.ENVIRONMENT_FILE

    def environment():
        (study,) = read_studies([workdir])
        return study.environments[str(workdir)]

    assert environment().values["command"] == "train"
    file.write_text(file.read_text().replace('"jax": "', '"jax": "9'))
    assert environment() == (
        {},
        f"Not known: the {file.name} in {workdir} is not that of this run.",
    )
    file.unlink()
    assert environment() == ({}, f"Not known: {workdir} holds no {file.name}.")
    # Nothing else depends on it.
    assert manifest.has_provenance(workdir)


def test_a_student_warm_started_from_scores_needs_scores(world, tmp_path):
    """Else it could be the baseline without scores."""
    steps = {"train.steps": 2, "train.eval_every": 0, "distill.affine": False}
    # A run, its mode, and the one that it starts from, perhaps moved meanwhile.
    runs = [
        ("distilled", "shared", ""),
        ("once", "none", "distilled"),
        ("twice", "none", "moved"),
        ("plain", "none", ""),
        ("plain_again", "none", "plain"),
    ]
    needs_scores = {}
    for name, mode, before in runs:
        config = world.config()
        config.update_from_flattened_dict({**steps, "distill.mode": mode})
        config.train.warm_start = str(tmp_path / before) if before else ""
        api.train(config, tmp_path / name)
        students = rows_of(tmp_path / name, "test")
        (needs_scores[name],) = students["needs_scores"]
        if name == "once":
            shutil.rmtree(tmp_path / "distilled")
            (tmp_path / name).rename(tmp_path / "moved")
    expected = {"distilled": True, "once": True, "twice": True}
    assert needs_scores == expected | {"plain": False, "plain_again": False}
    (study,) = read_studies([tmp_path / "moved"])
    assert study.baseline not in [*study.rows["setting"]]
    (study,) = read_studies([tmp_path / "plain_again"])
    assert not study.rows["needs_scores"].any()


def chosen_by_hand(workdir):
    """The (run, serve) of each mode's head with the least mean on validation."""
    chosen = []
    for _, of_mode in rows_of(workdir, "validation").groupby("mode", sort=False):
        means = of_mode.groupby("serve", sort=False)["passed_for_99"].mean()
        of_best = of_mode[of_mode["serve"] == means.idxmin()]
        chosen += zip(of_best["run"], of_best["serve"], strict=True)
    return chosen


def test_a_sweep_has_one_validation_row_per_run_and_head(world, swept):
    frame, config = table(swept), world.config()
    assert list(frame.columns) == results.columns(config.tasks, open_job(config).report_at)
    referred = ["reference"] * len(BASELINES)
    of_splits = [["teacher", *["student"] * number, *referred] for number in (8, 4)]
    assert frame["role"].tolist() == [role for of in of_splits for role in of]
    splits = zip(("validation", "test"), of_splits, strict=True)
    assert frame["split"].tolist() == [split for split, of in splits for _ in of]
    teachers_steps = frame.loc[frame["role"] == "teacher", "step"]
    assert teachers_steps.tolist() == [config.teacher.train.steps] * 2
    students = rows_of(swept, "validation")
    expected = [
        (mode, serve, seed)
        for mode in ("none", "aux")
        for seed in (0, 1)
        for serve in MODES[mode].serve
    ]
    assert list(students[["mode", "serve", "seed"]].itertuples(index=False, name=None)) == expected
    # Heads that do not rank are not charged; the best without scores, a list, costs nothing.
    (teacher_flops,) = rows_of(swept, "validation", "teacher")["flops_per_candidate"]
    references = rows_of(swept, "validation", "reference").set_index("run")["passed_for_99"]
    without = references[["incumbent", "popularity", "show_rate", "pass_rate"]].min()
    for _, of_seed in students.groupby("seed"):
        row = of_seed.set_index(["mode", "serve"])
        flops, of_none = row["flops_per_candidate"], row["flops_per_candidate"]["none", "user"]
        assert flops["aux", "user"] == flops["aux", "teacher"] == of_none < flops["aux", "blend"]
        cost = config.funnel.retrieved * flops + row["passed_for_99"] * teacher_flops
        saving = 1 - cost / (without * teacher_flops)
        np.testing.assert_allclose(row["funnel_cost_saving"], saving, atol=1e-5)


def test_the_test_split_is_read_by_chosen_settings_alone(world, swept):
    config = world.config(**SWEEP)
    tested = rows_of(swept, "test").set_index(["run", "serve"])
    assert sorted(tested.index) == sorted(chosen_by_hand(swept))
    job = open_job(config, sweep_runs(config))
    states, step = job.restored(swept / "cohorts" / "0")
    assert step == config.train.steps
    # All heads, in a pass without references.
    every = measure.measure(job, "test", states)
    kept_of_sweep = request_files.read_requests(swept / "cohorts" / "0" / "test").each
    for row in every.rows:
        who = row["run"], row["serve"]
        if who not in tested.index:
            continue
        numbers = [name for name in tested if isinstance(row.get(name), float)]
        assert len(numbers) > 20
        np.testing.assert_allclose(
            tested.loc[who, numbers].astype(float), [row[name] for name in numbers],
            rtol=1e-5, atol=1e-7, equal_nan=True,
        )  # fmt: skip
    referred = {(name, "user") for name in BASELINES}
    assert kept_of_sweep.keys() == {*tested.index, ("teacher", "user"), *referred}


def test_references_are_measured_as_what_they_know_allows(swept):
    for split in ("validation", "test"):
        references = rows_of(swept, split, "reference").set_index("run")
        assert list(references.index) == list(BASELINES)
        assert set(references["seed"]) == {0}  # of the teacher that orders by them
        # Only the oracle predicts, and it knows the truth.
        assert references["user_bce/watch"].dropna().index.tolist() == ["oracle"]
        name = "true_value_captured@30"
        assert references.loc["oracle", name] >= rows_of(swept, split)[name].max()


def test_a_logged_teacher_without_workdir_has_no_seed_or_step(world, tmp_path):
    config = world.config(**SWEEP, teacher__source="logged", teacher__workdir="")
    config.update(sweep={"modes": ("none",), "seeds": (0,)})
    api.sweep(config, tmp_path)
    frame = table(tmp_path).set_index("role")
    assert frame.loc["teacher", ["seed", "step"]].isna().all(axis=None)
    assert (frame.loc["student", ["seed", "step"]] == [0, 20]).all(axis=None)


def test_a_run_of_a_sweep_is_the_student_that_train_makes(world, swept):
    """Same seed, same order of the data: the same numbers up to rounding."""
    frame = table(swept)
    for mode in ("none", "aux"):
        keys = ["split", "serve"]
        alone = table(world.student(mode)).query("role == 'student'").set_index(keys)
        of_sweep = frame[(frame["mode"] == mode) & (frame["seed"] == 0)].set_index(keys)
        assert len(of_sweep) > len(MODES[mode].serve)
        compared = alone.select_dtypes("number").columns.difference([*SAVINGS, "run"])
        np.testing.assert_allclose(
            of_sweep[compared].astype(float), alone.loc[of_sweep.index, compared],
            rtol=2e-3, atol=1e-6,
        )  # fmt: skip


def test_rivals_need_no_training_and_are_chosen_on_validation(world, swept, copy_of):
    workdir = copy_of(swept)
    rivals = {"sweep__rivals": ("trees", "ease")}
    checkpoints = sorted(workdir.rglob("checkpoints/*"))

    assert small.sweep(world.config(**SWEEP, **rivals), workdir)

    assert sorted(workdir.rglob("checkpoints/*")) == checkpoints
    rows = results.read_csv(workdir / results.FILE)
    rows = rows[(rows["role"] == "reference") & ~rows["run"].isin(BASELINES)]
    validation, test = (rows[rows["split"] == split] for split in ("validation", "test"))
    for family, settings in validation.groupby(validation["run"].str.partition(":")[0]):
        best = settings.loc[settings["passed_for_99"].idxmin()]
        (tested,) = test.loc[test["run"].str.startswith(family), "run"]
        assert tested == best["run"], family
    # Trees on labels and on stages, with item rates and without them, and four of EASE. A live
    # teacher logs no scores.
    assert len(validation) == 2 * 2 + 4
    assert len(test) == 3
    assert not rows["needs_scores"].any()
    assert (rows["flops_per_candidate"] > 0).all()
    assert not small.sweep(world.config(**SWEEP, **rivals), workdir)


def test_an_inapplicable_rival_ends_a_sweep_before_training(world, tmp_path):
    config = world.config(**SWEEP, sweep__rivals=("fusion",))

    with pytest.raises(UserError, match="'fusion', which does not apply"):
        small.sweep(config, tmp_path / "sweep")

    assert not list(tmp_path.rglob("checkpoints"))


def test_own_costs_change_savings_alone_and_train_nothing(world, swept, copy_of):
    workdir = copy_of(swept)
    costs = {"costs__teacher__candidate": 2.0, "costs__student__candidate": 0.5}
    before = written_at(workdir / "cohorts")
    assert small.sweep(world.config(**SWEEP, **costs), workdir)
    assert written_at(workdir / "cohorts") == before
    one, other = (table(of).drop(columns=list(SAVINGS)) for of in (swept, workdir))
    pd.testing.assert_frame_equal(one, other)
    ends = (table(of).query("mode == 'aux'")["saving_over_none"] for of in (swept, workdir))
    assert not next(ends).equals(next(ends))
    assert not small.sweep(world.config(**SWEEP, **costs), workdir)


# One more setting: the mode none does not read the weight.
MORE = SWEEP | {
    "sweep__modes": (),
    "sweep__runs": tuple(
        {"distill.mode": mode, "distill.weight": weight}
        for mode, weight in (("none", 1.0), ("aux", 1.0), ("aux", 4.0))
    ),
    "sweep__extend": True,
}


def test_an_extended_sweep_trains_the_new_runs_alone(world, swept, copy_of):
    workdir = copy_of(swept)
    cohort = workdir / "cohorts" / "0"
    # As if its own `aux` had been found to be bad on validation.
    frame = results.read_csv(cohort / results.FILE)
    frame.loc[frame["mode"] == "aux", "passed_for_99"] = 1000.0
    frame.to_csv(cohort / results.FILE, index=False)
    written = manifest.read(cohort, "")
    manifest.write(cohort, written["provenance"], written["files"])
    before = written_at(cohort)
    assert small.sweep(world.config(**MORE), workdir)
    changed = before.items() - written_at(cohort).items()
    assert {path.parent.name for path, _ in changed} == {"test"}
    old, new = (rows_of(of, "validation").reset_index(drop=True) for of in (swept, workdir))
    assert set(new["run"]) - set(old["run"]) == {f"aux-weight4.0-seed{s}" for s in (0, 1)}
    compared = old.columns.difference(["passed_for_99", *SAVINGS])
    assert new[: len(old)][compared].equals(old[compared])
    assert table(workdir).query("role == 'student'")["funnel_cost_saving"].notna().all()
    for of, weight in ((swept, 1.0), (workdir, 4.0)):
        tested = {
            f"{name}-seed{seed}" for name in ("none", f"aux-weight{weight}") for seed in (0, 1)
        }
        assert set(rows_of(of, "test")["run"]) == tested
    # The same again has nothing to do, with and without the word.
    assert not small.sweep(world.config(**MORE), workdir)
    assert not small.sweep(world.config(**MORE | {"sweep__extend": False}), workdir)
    # One that died before its results were joined is not complete.
    complete = files_of(workdir)
    for name in (*TABLES, manifest.FILE):
        remove(workdir / name)
    assert small.sweep(world.config(**MORE), workdir)
    assert files_of(workdir) == complete


PARTS = {
    "sweep__modes": ("none", "aux"),
    "sweep__cohort_size": 1,
    "train__steps": 4,
    "train__eval_every": 0,
}


def part_of(world, workdir, part, **changes):
    """The lines on that part of a sweep."""
    lines = []
    config = world.config(**PARTS | changes, sweep__part=part)
    api.sweep(config, workdir, show=lines.append)
    return lines


def test_a_sweep_in_parts_is_the_one_that_ran_at_once(world, tmp_path):
    """Each part as a job of its own would do it, and in any order."""
    whole, workdir = tmp_path / "whole", tmp_path / "parts"
    api.sweep(world.config(**PARTS), whole)
    part = functools.partial(part_of, world, workdir)
    fault = functools.partial(fault_of, part)
    for name in ("0", "join"):
        assert fault(name).startswith(f"{workdir} has no cohort for 2 of the sweep's 2 runs; se")
    assert not workdir.exists()
    assert part("plan") == ["cohorts: 2", "numbers: 0-1"]
    assert not (workdir / "cohorts").exists()
    assert fault("2").endswith(f"the sweep in {workdir} has 2 cohorts, numbered from 0 to 1")
    assert "train.steps (4 there, 5 now)" in fault("0", train__steps=5)
    for _ in range(2):
        assert part("1") == ["cohort 1 of 2 is trained"]
    lacking = f"{workdir} lacks 1 of its 2 cohorts: 0; train each by its number, as sweep.part=0"
    assert fault("join") == lacking
    assert not (workdir / results.FILE).exists()
    part("0")
    assert part("join") == []
    assert (workdir / results.FILE).read_bytes() == (whole / results.FILE).read_bytes()
    for name in ("plan", "join", ""):
        assert "is complete; there is nothing to do" in part(name)[0]


def test_a_cohort_that_trains_holds_itself_alone(world, tmp_path):
    part_of(world, tmp_path, "plan")
    first = tmp_path / "cohorts" / "0"
    with hold(first):
        assert part_of(world, tmp_path, "1")
        for part in ("0", "", "join"):
            assert fault_of(part_of, world, tmp_path, part).startswith(f"{first} is held by")
    with hold(tmp_path):
        assert fault_of(part_of, world, tmp_path, "join").startswith(f"{tmp_path} is held by")
        assert part_of(world, tmp_path, "0")
    assert not list(tmp_path.rglob(".lock"))


def test_a_sweep_resumes_on_fewer_devices_and_ends_the_same(world, swept, tmp_path):
    """Two groups of two runs, on four devices: a mesh of two by two."""
    keys = ["split", "run", "serve"]
    sweep = {**SWEEP, "train__eval_every": 10, "sweep__weights": (1.0,)}
    config = world.config(**sweep, parallel__devices=4)
    saved = checkpoints.save

    def save_and_die(of, step, state, *rest):
        saved(of, step, state, *rest)
        assert [len(of_group.non_finite_step) for of_group in state] == [2, 2]
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            api.sweep(config, tmp_path)
    config.parallel.update({"devices": 2, "runs": 2})
    api.sweep(config, tmp_path)
    spread, whole = (table(workdir).set_index(keys) for workdir in (tmp_path, swept))
    assert sorted(spread.index) == sorted(whole.index)
    numbers = whole.select_dtypes("number").columns
    np.testing.assert_allclose(
        spread.loc[whole.index, numbers], whole[numbers], rtol=2e-3, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("rates", [(0.01, 1e30), (1e30,)])
def test_runs_that_diverge_are_marked_and_the_others_go_on(world, tmp_path, caplog, rates):
    axes = {"sweep__modes": ("shared",), "sweep__axes__optimizer__learning_rate": rates}
    config = world.config(**axes, train__log_every=1)
    api.sweep(config, tmp_path)
    frame, students = table(tmp_path), rows_of(tmp_path, "validation").set_index("run")
    diverged = students["learning_rate"] > 1
    assert (students["non_finite_step"].notna() == diverged).all()
    assert students.loc[~diverged, "passed_for_99"].notna().all()
    measured = [name for name in frame if "@" in name or "/" in name]
    assert students.loc[diverged, measured].isna().all(axis=None)
    # The test is read for the others, the teacher and the references.
    assert set(rows_of(tmp_path, "test")["run"]) == set(students.index[~diverged])
    assert rows_of(tmp_path, "test", "reference")["run"].tolist() == list(BASELINES)
    (name,) = students.index[diverged]
    step = int(students.loc[name, "non_finite_step"])
    assert f"{name} stopped being finite at step {step}" in caplog.text
    # Nothing is logged of it from then on, and training ends where no other is left.
    for line in metrics(tmp_path / "cohorts" / "0"):
        assert (f"loss/{name}" in line) == (line["step"] < step)
    if len(rates) == 1:
        assert line["step"] < config.train.steps
    assert not small.sweep(config, tmp_path)


@pytest.mark.long
def test_a_whole_repeat_has_a_teacher_and_an_order_of_its_own(world, tmp_path):
    axes = {"sweep__modes": ("none", "shared"), "sweep__seeds": (0, 2)}
    config = world.config(**axes, sweep__whole_repeats=True, teacher__workdir="")
    made = api.run(config, tmp_path / "whole").students.workdir
    # A repeat is that of its three seeds, set by hand.
    alone = {"seed": 2, "batch__seed": 2, "teacher__batch__seed": 2}
    teacher = tmp_path / "teacher"
    api.train_teacher(world.config(**alone), teacher)
    by_hand = {**axes, **alone, "teacher__workdir": str(teacher), "sweep__seeds": (2,)}
    api.sweep(world.config(**by_hand), tmp_path / "alone")
    for split in ("validation", "test"):
        students = rows_of(made, split)
        assert students["seed"].tolist() == students["data_seed"].tolist() == [0, 0, 2, 2]
        for role in ("student", "teacher", "reference"):
            rows = rows_of(made, split, role)
            assert set(rows["seed"]) == {0, 2}
            expected = rows_of(tmp_path / "alone", split, role).reset_index(drop=True)
            found = rows[rows["seed"] == 2].reset_index(drop=True)
            # Its baseline is the best over all repeats: of one repeat, a list may be.
            of_all = ["funnel_cost_saving"]
            pd.testing.assert_frame_equal(found.drop(columns=of_all), expected.drop(columns=of_all))
    # Each is measured, and its requests are drawn anew, by its own teacher.
    (study,) = read_studies([made])
    estimates = Estimates(study)
    for setting in study.chosen.values():
        assert estimates.of(setting, "passed_for_99").covers == "both"


@pytest.mark.long
def test_a_killed_sweep_ends_as_if_it_had_never_been_killed(world, tmp_path):
    """Killed while it saves, in its second cohort, and in the test of the first."""
    axes = {**SWEEP, "sweep__cohort_size": 3, "train__checkpoint_every": 5, "train__log_every": 5}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    api.sweep(world.config(**axes), whole)
    flags = world.flags(killed, **axes)
    for moment, name, at in (("saving", "0", 20), ("logging", "1", 15), ("writing", "test", 2)):
        small.run_and_kill("experiments.sweep", moment, name, at, flags)
        assert not (killed / results.FILE).exists()
    assert small.sweep(world.config(**axes), killed)
    assert_same_results(killed, whole)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def damage(path):
    """Changes a number in a table, or a byte in each file of a checkpoint."""
    if path.is_file():
        path.write_bytes(path.read_bytes().replace(b"0.", b"1.", 1))
    for file in (path / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)


# A run, what is removed and what is damaged in it, and the file of that which `report` names.
MADE_AGAIN = {
    "student": ("shared", ["results.csv"], "checkpoints/20", ""),
    # Students that are lost before the test.
    "students": ("sweep", ["cohorts/0/test", "manifest.json"], "cohorts/0/checkpoints/20", ""),
    "joined": ("sweep", ["cohorts/0/test/manifest.json"], "results.csv", "results.csv"),
    "cohort": ("sweep", ["calibration.csv"], "cohorts/0/results.csv", ""),
    "test": ("sweep", [], *["cohorts/0/test/results.csv"] * 2),
}


@pytest.mark.parametrize(
    ("run", "removed", "damaged", "named"), MADE_AGAIN.values(), ids=MADE_AGAIN
)
def test_what_is_lost_or_damaged_is_made_again(
    world, copy_of, tmp_path, run, removed, damaged, named
):
    whole = run_of(world, run)
    workdir = copy_of(whole)
    damage(workdir / damaged)
    if named:
        fault = fault_of(api.report, workdir, output=tmp_path / "report")
        assert f"{workdir / named} has changed; start the command that made it again" in fault
    for name in removed:
        remove(workdir / name)
    start_again(world, run, workdir)
    assert_same_results(workdir, whole)
    if run == "sweep":
        assert not start_again(world, run, workdir)
    else:
        student_parameters(workdir)  # of the last step


def replace(name, old, new):
    """Changes a text in a file of a workdir."""

    def change(workdir):
        text = (workdir / name).read_text()
        assert old in text
        (workdir / name).write_text(text.replace(old, new, 1))

    return change


def nothing(workdir):
    pass


def train_student_of(config, teacher):
    """Trains a student beside its teacher."""
    config.teacher.workdir = str(teacher)
    api.prepare(config)
    api.train(config, teacher.parent / "student")


# A finished run, what is changed in it, a command that gets its workdir, keys, and the message.
REFUSED = [
    ("sweep", replace("cohorts.json", "seed0", "seed1"), api.sweep, SWEEP,
     "20 belongs to another run: config ("),
    ("sweep", nothing, api.sweep, SWEEP | {"train__steps": 30, "sweep__weights": (1.0, 2.0)},
     "sweep.weights ([] there, [1.0, 2.0] now), train.steps (20 there, 30 now)"),
    ("sweep", nothing, api.sweep, SWEEP | {"sweep__seeds": (0,), "sweep__extend": True},
     "none-seed1, which config.sweep does not name"),
    ("sweep", nothing, api.train, SWEEP, "belongs to a run of sweep"),
    ("sweep", nothing, api.train_teacher, SWEEP, "belongs to a run of sweep"),
    ("teacher", nothing, train_student_of, {"tasks": ("watch",), "value_weights": (1.0,)},
     "for watch; make one with: kd-ranker train-teacher"),
    ("teacher", replace("config.json", '"seed": 0', '"seed": 5'), train_student_of, {},
     "config.json has changed"),
    ("none", nothing, train_student_of, {}, "holds a student, not a teacher; make one"),
    ("teacher", lambda workdir: remove(workdir / "checkpoints" / "20"), train_student_of, {},
     "stopped at step 10 of 20; finish it with: kd-ranker train"),
]  # fmt: skip


@pytest.mark.parametrize(("run", "change", "command", "keys", "message"), REFUSED)
def test_a_run_that_is_not_the_configs_is_refused_and_stays(
    world, copy_of, run, change, command, keys, message
):
    change(workdir := copy_of(run_of(world, run)))
    before = files_of(workdir / "cohorts")
    assert message in fault_of(command, world.config(**keys), workdir)
    assert files_of(workdir / "cohorts") == before
    assert not (workdir.parent / "student").exists()


@pytest.mark.parametrize("command", [api.train_teacher, api.train, api.sweep, api.log_teacher])
def test_a_missing_input_is_named_with_the_command_to_make_it(world, tmp_path, command):
    workdir, nowhere = tmp_path / "workdir", str(tmp_path / "nowhere")
    cases = [("data__dir", nowhere, nowhere, "prepare")]
    if command is not api.train_teacher:
        cases.append(("teacher__workdir", nowhere, f"no run at {nowhere}", "train-teacher"))
        cases.append(("teacher__workdir", "", "teacher.workdir is empty", "train-teacher"))
    for key, value, message, maker in cases:
        arguments = () if command is api.log_teacher else (workdir,)
        fault = fault_of(command, world.config(**{key: value}), *arguments)
        assert message in fault
        assert f"kd-ranker {maker}" in fault
    assert not workdir.exists()


def test_an_unscored_dataset_is_named_with_the_command(world, tmp_path, monkeypatch):
    another = lambda *of: load_teacher(*of)._replace(version="another")  # noqa: E731
    monkeypatch.setattr(jobs, "load_teacher", another)
    fault = fault_of(api.train, world.config(teacher__source="logged"), tmp_path / "w")
    assert "teacher-another" in fault
    assert "kd-ranker log-teacher" in fault


def test_costs_are_those_of_the_teacher_that_was_trained(world):
    """Not of one that the student's own flags would describe."""
    config = world.config(teacher__width=64)
    flops = measure.teacher_flops(open_job(config, {"": config}))
    assert flops == measure.teacher_flops(open_job(world.config()))
    assert flops != measure.teacher_flops(open_job(config))


@pytest.mark.parametrize(
    ("command", "rate", "steps", "message"),
    [
        (api.train, 1e30, 20, r"loss stopped being finite at step \d+; try a"),
        # The loss was finite at the only step, and no later one would show it.
        (api.train_teacher, 1e39, 1, "the loss stopped being finite at step 1"),
    ],
)
def test_a_state_that_is_not_finite_is_never_saved(world, tmp_path, command, rate, steps, message):
    changes = {"train__steps": steps, "train__log_every": 1000, "train__checkpoint_every": 4}
    changes |= {"optimizer__learning_rate": rate, "optimizer__schedule": "constant"}
    of_teacher = {f"teacher__{name}": value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        command(world.config(**changes, **of_teacher), tmp_path)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
