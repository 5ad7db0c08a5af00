"""The commands on the small cascade: what they leave, what they do again, what they refuse."""

import functools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

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
from kd_ranker.pipeline import datasets, measure, scores, scoring
from kd_ranker.pipeline import job as jobs
from kd_ranker.pipeline.job import open_job, open_teaching
from kd_ranker.pipeline.trained import load_teacher, open_ranker
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
    """Copies a workdir, so that a test may change it."""

    def copy(workdir):
        return shutil.copytree(workdir, tmp_path / "copies" / workdir.name)

    return copy


def table(workdir):
    return results.read_csv(workdir / results.FILE)


def rows_of(workdir, split, role="student"):
    """The rows of `results.csv` of a split and a role."""
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
        if path.endswith((".csv", ".parquet", "metrics.jsonl")):
            assert found[path] == content, path


def written_at(folder):
    """The time of each file; folders have another after they were held."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def run_of(world, name):
    """The workdir of a finished run; a test changes, and runs commands on, a copy alone."""
    if name == "sweep":
        return world.sweep()
    if name == "teacher":
        return world.teacher
    return world.student(name)


def start_again(world, name, workdir):
    """Starts a run of `run_of` again; returns False for a sweep that was complete."""
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
def test_train_writes_a_row_per_split_and_head(world, mode):
    workdir = world.student(mode)
    config = world.config(distill__mode=mode)
    heads = list(MODES[mode].serve)

    frame = table(workdir)

    assert list(frame.columns) == results.columns(config.tasks, open_job(config).report_at)
    assert frame["split"][frame["role"] == "teacher"].tolist() == ["validation", "test"]
    students = frame[frame["role"] == "student"]
    assert students["serve"].tolist() == heads * 2
    assert students["split"].tolist() == ["validation"] * len(heads) + ["test"] * len(heads)
    assert set(students["mode"]) == {mode}
    assert set(students["step"]) == {config.train.steps}
    assert len(request_files.read_requests(workdir).each) == 1 + len(heads)


@pytest.mark.parametrize("mode", MODES)
def test_train_measures_each_split_on_its_own_requests(world, mode):
    bce_on_validation = rows_of(world.student(mode), "validation")["user_bce/watch"]
    bce_on_test = rows_of(world.student(mode), "test")["user_bce/watch"]

    assert (bce_on_validation != bce_on_test.array).all()


@pytest.mark.parametrize("mode", MODES)
def test_train_writes_plausible_numbers(world, mode):
    frame = table(world.student(mode))
    students = frame[frame["role"] == "student"]
    is_distilled = mode != "none"

    assert students["user_bce/watch"].between(0, 2).all()
    assert students["cost_ratio"].between(0, 0.1).all()
    assert students["distill_loss"].notna().all() == is_distilled
    assert set(students["distill_weight"]) == {1.0 if is_distilled else 0.0}


@pytest.mark.parametrize("mode", MODES)
def test_train_leaves_config_checkpoint_and_events(world, mode):
    workdir = world.student(mode)
    config = world.config(distill__mode=mode)

    assert json.loads((workdir / "config.json").read_text()) == json.loads(config.to_json())
    assert (workdir / "checkpoints" / "20").is_dir()
    assert list(workdir.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("mode", MODES)
def test_train_logs_losses_and_evaluations_in_order(world, mode):
    lines = metrics(world.student(mode))

    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert [line["step"] for line in lines if "loss" in line] == [5, 10, 15, 20]
    assert [line["step"] for line in lines if "eval/user_bce/watch" in line] == [10]


def test_the_report_of_single_runs_has_what_that_of_a_sweep_has(world):
    """Intervals over requests, and a saving where there is a baseline."""
    (study,) = read_studies([world.student("none"), world.student("shared")])

    estimates = Estimates(study)

    assert len(study.teachers) == 1
    assert study.kept_requests
    assert estimates.gap("shared, weight 1", "none", "passed_for_99").covers == "requests"
    assert np.isfinite(estimates.cost_saved("shared, weight 1", 0.99).low)


@pytest.mark.parametrize("run", ["shared", "sweep"])
def test_a_finished_run_is_left_as_it_is(world, copy_of, run):
    workdir = copy_of(run_of(world, run))
    contents_before = files_of(workdir)
    times_before = written_at(workdir)

    assert not start_again(world, run, workdir)

    assert files_of(workdir) == contents_before
    is_untouched = written_at(workdir) == times_before
    assert is_untouched == (run == "sweep")


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
    live = tmp_path / "live"
    logged = tmp_path / "logged"
    for workdir in (live, logged):
        config = world.config(distill__mode=mode, teacher__source=workdir.name, **changes)
        api.train(config, workdir)

    live_parameters = student_parameters(live)
    jax.tree.map(
        lambda left, right: np.testing.assert_allclose(left, right, atol=2e-5),
        live_parameters,
        student_parameters(logged),
    )
    (stack,) = specs.student_stacks({"": config}, datasets.dataset_of(config).spec)
    initial = select_run(stack.init().parameters, 0)
    largest_changes = jax.tree.map(
        lambda after, before: float(np.abs(after - np.asarray(before)).max()),
        live_parameters,
        initial,
    )
    assert max(jax.tree.leaves(largest_changes)) > 0.02
    # The rows of the students: a teacher in a log has no rows of its own for ids.
    live_numbers = table(live).query("role == 'student'").select_dtypes("number")
    logged_numbers = table(logged).query("role == 'student'").select_dtypes("number")
    np.testing.assert_allclose(live_numbers, logged_numbers, rtol=1e-3)


def test_students_learn_from_their_teachers_scores_alone(world):
    config = world.config()
    directory = log_teacher(world)
    original = datasets.dataset_of(config)
    version = load_teacher(config).version

    dataset = datasets.dataset_under(config, original, version)

    assert f"-teacher-{version}" in directory.name
    assert dataset.spec.teacher_version == version
    # teacher.stage=retrieved: every candidate was scored.
    scores = pq.read_table(next(directory.glob("*-train.parquet"))).to_pandas()
    scores = scores.set_index(["request", "item"])
    assert set(scores["version"]) == {version}
    for request in read_requests(dataset, "train"):
        request_scores = scores.loc[[(request.request_id, item) for item in request.item_id]]
        columns = [f"probability_{task}" for task in dataset.spec.tasks]
        np.testing.assert_allclose(request_scores[columns], request.teacher_probability, rtol=1e-6)
    batch_config = BatchConfig(8, 32, 0.5, 1.0, seed=0)
    batch = unpack(*next(iter(training_batches(dataset, batch_config))))
    assert (np.asarray(batch.teacher_weight) == 1).all()
    # The requests of the log itself still have the scores that were logged with them.
    assert len(next(read_requests(original, "train")).teacher_probability) < 100


@pytest.fixture
def own_dataset_config(world, tmp_path, monkeypatch):
    """The config of a dataset that no other test scores, in parts of one batch: 4, 1 and 1."""
    dataset = datasets.dataset_of(world.config())
    copied = tmp_path / "requests" / dataset.directory.parent.name
    shutil.copytree(dataset.directory.parent, copied)
    monkeypatch.setattr(scoring, "_BATCHES", 1)
    config = world.config(data__dir=str(tmp_path))
    assert config.evaluation.requests == 16
    return config


def test_cohorts_of_two_stages_read_the_scores_of_each(own_dataset_config):
    config = own_dataset_config
    config.sweep.axes.teacher.stage = ("passed", "retrieved")
    for stage in config.sweep.axes.teacher.stage:
        config.teacher.stage = stage
        api.log_teacher(config)
    config.teacher.source = "logged"

    built = datasets.dataset_of(config)

    for run in sweep_runs(config).values():
        dataset = open_teaching(run, built).dataset
        assert f"-{run.teacher.stage}/" in dataset.provenance["scored"]


def test_finished_scores_are_not_computed_again(own_dataset_config, monkeypatch):
    directory = api.log_teacher(own_dataset_config).directory
    monkeypatch.setattr(scoring, "_BATCHES", 64)
    monkeypatch.setattr(scores.Scorer, "write", None)

    assert api.log_teacher(own_dataset_config).directory == directory


def test_other_value_weights_replace_all_but_the_columns(own_dataset_config, monkeypatch):
    config = own_dataset_config
    directory = api.log_teacher(config).directory
    before = files_of(directory)
    monkeypatch.setattr(scoring, "_BATCHES", 64)
    config.value_weights = tuple(2 * weight for weight in config.value_weights)

    assert api.log_teacher(config).directory == directory

    # Columns depend on neither the value weights nor the parts in which they are written.
    after = files_of(directory)
    columns = {name for name in before if name.startswith("teacher-")}
    assert len(columns) == 3
    unchanged = {name for name in after if after[name] == before[name]}
    assert unchanged == {*columns, scores.FILE}


def test_damaged_scores_are_refused(own_dataset_config, tmp_path):
    config = own_dataset_config
    column = api.log_teacher(config).directory / "teacher-test.npy"
    column.write_bytes(column.read_bytes()[:-1] + b"x")
    logged = config.copy_and_resolve_references()
    logged.teacher.source = "logged"

    assert "teacher-test.npy has changed; remove the folder" in fault_of(api.log_teacher, config)
    assert "teacher-test.npy has changed" in fault_of(api.train, logged, tmp_path / "student")


def test_another_teachers_scores_are_refused(own_dataset_config):
    config = own_dataset_config
    directory = api.log_teacher(config).directory
    version = load_teacher(config).version
    other = directory.with_name(directory.name.replace(version, "another"))
    directory.rename(other)

    fault = fault_of(datasets.dataset_under, config, datasets.dataset_of(config), "another")

    assert fault.startswith(
        f"{other} has the scores of teacher {version}, and the teacher is another; remove"
    )


class ExchangedTeacher(NamedTuple):
    """A teacher's workdir, and the workdir of another teacher that may take its place."""

    workdir: Path
    other: Path

    def put_other(self):
        shutil.rmtree(self.workdir)
        shutil.copytree(self.other, self.workdir)


@pytest.fixture
def exchanged(world, tmp_path):
    workdir = tmp_path / "exchanged"
    shutil.copytree(world.teacher, workdir)
    config = world.config(teacher__workdir="", seed=5)
    other = world.made("another_teacher", lambda folder: api.train_teacher(config, folder))
    return ExchangedTeacher(workdir, other)


@pytest.mark.parametrize("source", ["live", "logged"])
@pytest.mark.parametrize("command", [api.train, api.sweep])
def test_results_under_another_teacher_are_not_taken_for_these(
    own_dataset_config, tmp_path, exchanged, command, source
):
    config = own_dataset_config
    config.update_from_flattened_dict({
        "train.steps": 4, "train.eval_every": 0, "sweep.modes": ("none",),
        "teacher.workdir": str(exchanged.workdir), "teacher.source": source,
    })  # fmt: skip

    def prepare_teacher():
        if source == "logged":
            api.log_teacher(config)
        return load_teacher(config).version

    workdir = tmp_path / "run"
    first_version = prepare_teacher()
    command(config, workdir)
    before = (workdir / results.FILE).read_bytes()
    exchanged.put_other()
    second_version = prepare_teacher()

    fault = fault_of(command, config, workdir)

    assert first_version in fault
    assert second_version in fault
    assert "use another --workdir" in fault
    assert (workdir / results.FILE).read_bytes() == before


def test_a_complete_sweep_does_not_need_its_teacher(own_dataset_config, tmp_path, exchanged):
    config = own_dataset_config
    teacher = exchanged.workdir
    changes = {"train.steps": 4, "train.eval_every": 0, "teacher.workdir": str(teacher)}
    config.update_from_flattened_dict(changes)
    assert small.sweep(config, tmp_path / "run")

    shutil.rmtree(teacher)

    assert not small.sweep(config, tmp_path / "run")
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

    def needs_scores(name, mode, warm_start="", margin=0.0):
        """Trains a run, perhaps from another one; returns whether its row says so."""
        config = world.config()
        config.update_from_flattened_dict({
            "train.steps": 2, "train.eval_every": 0, "distill.affine": False, "distill.mode": mode,
            "train.warm_start": str(tmp_path / warm_start) if warm_start else "",
            "train.unshown_weight": 0.1 if margin else 0.0, "train.unshown_margin": margin,
        })  # fmt: skip
        api.train(config, tmp_path / name)
        (needed,) = rows_of(tmp_path / name, "test")["needs_scores"]
        return needed

    assert needs_scores("distilled", "shared")
    assert needs_scores("once", "none", warm_start="distilled")
    # A warm start needs neither the run before the last nor the last one's first place.
    shutil.rmtree(tmp_path / "distilled")
    (tmp_path / "once").rename(tmp_path / "moved")
    assert needs_scores("twice", "none", warm_start="moved")
    assert needs_scores("far", "none", margin=0.2)
    assert not needs_scores("plain", "none")
    assert not needs_scores("plain_again", "none", warm_start="plain")

    (study,) = read_studies([tmp_path / "moved"])
    assert study.baseline not in [*study.rows["setting"]]
    (study,) = read_studies([tmp_path / "plain_again"])
    assert not study.rows["needs_scores"].any()


def chosen_by_hand(workdir):
    """The (run, serve) of each mode's head with the least mean on validation."""
    chosen = []
    for _, mode_rows in rows_of(workdir, "validation").groupby("mode", sort=False):
        means = mode_rows.groupby("serve", sort=False)["passed_for_99"].mean()
        best_rows = mode_rows[mode_rows["serve"] == means.idxmin()]
        chosen += zip(best_rows["run"], best_rows["serve"], strict=True)
    return chosen


def test_a_sweeps_table_has_the_teacher_students_and_baselines(world, swept):
    config = world.config()

    frame = table(swept)

    baselines = ["reference"] * len(BASELINES)
    validation = ["teacher", *["student"] * 8, *baselines]
    test = ["teacher", *["student"] * 4, *baselines]
    assert list(frame.columns) == results.columns(config.tasks, open_job(config).report_at)
    assert frame["role"].tolist() == [*validation, *test]
    assert frame["split"].tolist() == ["validation"] * len(validation) + ["test"] * len(test)
    teacher_steps = frame.loc[frame["role"] == "teacher", "step"]
    assert teacher_steps.tolist() == [config.teacher.train.steps] * 2


def test_columns_are_at_the_numbers_passed_and_shown_too(world):
    config = world.config(funnel__report_at=(20,))
    passed, shown = config.funnel.passed, config.funnel.shown
    assert open_job(config).report_at.ks == sorted({shown, 20, passed})
    assert shown not in (20, passed)


def test_a_sweep_has_one_validation_row_per_run_and_head(swept):
    students = rows_of(swept, "validation")

    expected = [
        (mode, serve, seed)
        for mode in ("none", "aux")
        for seed in (0, 1)
        for serve in MODES[mode].serve
    ]
    assert list(students[["mode", "serve", "seed"]].itertuples(index=False, name=None)) == expected


def test_heads_that_do_not_rank_are_not_charged(swept):
    for _, seed_rows in rows_of(swept, "validation").groupby("seed"):
        flops = seed_rows.set_index(["mode", "serve"])["flops_per_candidate"]
        assert flops["aux", "user"] == flops["none", "user"]
        assert flops["aux", "teacher"] == flops["none", "user"]
        assert flops["aux", "blend"] > flops["none", "user"]


def test_a_sweeps_savings_are_against_the_best_list(world, swept):
    """The best ranker without scores is a list here, and a list costs nothing."""
    (teacher_flops,) = rows_of(swept, "validation", "teacher")["flops_per_candidate"]
    baselines = rows_of(swept, "validation", "reference").set_index("run")["passed_for_99"]
    passed_by_best = baselines[["incumbent", "popularity", "show_rate", "pass_rate"]].min()
    students = rows_of(swept, "validation")
    student_flops = world.config().funnel.retrieved * students["flops_per_candidate"]

    cost = student_flops + students["passed_for_99"] * teacher_flops

    saving = 1 - cost / (passed_by_best * teacher_flops)
    np.testing.assert_allclose(students["funnel_cost_saving"], saving, atol=1e-5)


def test_the_test_split_is_read_by_chosen_settings_alone(swept):
    tested = rows_of(swept, "test").set_index(["run", "serve"])

    assert sorted(tested.index) == sorted(chosen_by_hand(swept))
    baselines = {(name, "user") for name in BASELINES}
    kept = request_files.read_requests(swept / "cohorts" / "0" / "test").each
    assert kept.keys() == {*tested.index, ("teacher", "user"), *baselines}


def test_a_tested_run_has_the_numbers_of_a_pass_over_all_heads(world, swept):
    config = world.config(**SWEEP)
    tested = rows_of(swept, "test").set_index(["run", "serve"])
    job = open_job(config, sweep_runs(config))
    states, step = job.restored(swept / "cohorts" / "0")
    assert step == config.train.steps

    measured = measure.measure(job, "test", states)

    for row in measured.rows:
        ranker = (row["run"], row["serve"])
        if ranker not in tested.index:
            continue
        columns = [name for name in tested if isinstance(row.get(name), float)]
        assert len(columns) > 20
        np.testing.assert_allclose(
            tested.loc[ranker, columns].astype(float), [row[name] for name in columns],
            rtol=1e-5, atol=1e-7, equal_nan=True,
        )  # fmt: skip


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
        in_sweep = frame[(frame["mode"] == mode) & (frame["seed"] == 0)].set_index(keys)
        assert len(in_sweep) > len(MODES[mode].serve)
        columns = alone.select_dtypes("number").columns.difference([*SAVINGS, "run"])
        np.testing.assert_allclose(
            in_sweep[columns].astype(float), alone.loc[in_sweep.index, columns],
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
    validation = rows[rows["split"] == "validation"]
    test = rows[rows["split"] == "test"]
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
    in_flops = table(swept)
    in_own_costs = table(workdir)
    pd.testing.assert_frame_equal(
        in_flops.drop(columns=list(SAVINGS)), in_own_costs.drop(columns=list(SAVINGS))
    )
    saving_in_flops = in_flops.query("mode == 'aux'")["saving_over_none"]
    saving_in_own_costs = in_own_costs.query("mode == 'aux'")["saving_over_none"]
    assert not saving_in_flops.equals(saving_in_own_costs)
    assert not small.sweep(world.config(**SWEEP, **costs), workdir)


# One more setting: the mode none does not read the weight.
EXTENDED = SWEEP | {
    "sweep__modes": (),
    "sweep__runs": (
        {"distill.mode": "none", "distill.weight": 1.0},
        {"distill.mode": "aux", "distill.weight": 1.0},
        {"distill.mode": "aux", "distill.weight": 4.0},
    ),
    "sweep__extend": True,
}


def runs_on_test(workdir):
    return set(rows_of(workdir, "test")["run"])


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

    assert small.sweep(world.config(**EXTENDED), workdir)

    changed = before.items() - written_at(cohort).items()
    assert {path.parent.name for path, _ in changed} == {"test"}
    old = rows_of(swept, "validation").reset_index(drop=True)
    new = rows_of(workdir, "validation").reset_index(drop=True)
    assert set(new["run"]) - set(old["run"]) == {"aux-weight4.0-seed0", "aux-weight4.0-seed1"}
    compared = old.columns.difference(["passed_for_99", *SAVINGS])
    assert new[: len(old)][compared].equals(old[compared])
    assert table(workdir).query("role == 'student'")["funnel_cost_saving"].notna().all()
    # The better setting of mode aux is read on the test, in place of the one before.
    none = {"none-seed0", "none-seed1"}
    assert runs_on_test(swept) == none | {"aux-weight1.0-seed0", "aux-weight1.0-seed1"}
    assert runs_on_test(workdir) == none | {"aux-weight4.0-seed0", "aux-weight4.0-seed1"}
    # The same again has nothing to do, with and without `sweep.extend`.
    assert not small.sweep(world.config(**EXTENDED), workdir)
    assert not small.sweep(world.config(**EXTENDED | {"sweep__extend": False}), workdir)
    # One that died before its results were joined is not complete.
    complete = files_of(workdir)
    for name in (*TABLES, manifest.FILE):
        remove(workdir / name)
    assert small.sweep(world.config(**EXTENDED), workdir)
    assert files_of(workdir) == complete


PARTS = {
    "sweep__modes": ("none", "aux"),
    "sweep__cohort_size": 1,
    "train__steps": 4,
    "train__eval_every": 0,
}


def run_part(world, workdir, part, **changes):
    """Runs a part of a sweep; returns the lines that it shows."""
    lines = []
    config = world.config(**PARTS | changes, sweep__part=part)
    api.sweep(config, workdir, show=lines.append)
    return lines


def test_a_sweep_in_parts_is_the_one_that_ran_at_once(world, tmp_path):
    """Each part as a job of its own would do it, and in any order."""
    whole = tmp_path / "whole"
    workdir = tmp_path / "parts"
    api.sweep(world.config(**PARTS), whole)
    run = functools.partial(run_part, world, workdir)

    run("plan")
    run("1")
    run("0")
    assert run("join") == []

    assert (workdir / results.FILE).read_bytes() == (whole / results.FILE).read_bytes()
    for part in ("plan", "join", ""):
        assert "is complete; there is nothing to do" in run(part)[0]


def test_a_part_before_the_plan_is_refused(world, tmp_path):
    workdir = tmp_path / "parts"

    for part in ("0", "join"):
        fault = fault_of(run_part, world, workdir, part)
        assert fault.startswith(f"{workdir} has no cohort for 2 of the sweep's 2 runs; se")

    assert not workdir.exists()


def test_the_plan_of_a_sweep_names_its_cohorts(world, tmp_path):
    assert run_part(world, tmp_path, "plan") == ["cohorts: 2", "numbers: 0-1"]

    assert not (tmp_path / "cohorts").exists()
    fault = fault_of(run_part, world, tmp_path, "2")
    assert fault.endswith(
        f"sweep.part=2 is no cohort of the sweep in {tmp_path}; choose a number from 0 to 1"
    )
    fault = fault_of(run_part, world, tmp_path, "0", train__steps=5)
    assert "train.steps (4 there, 5 now)" in fault


def test_a_trained_cohort_is_left_and_a_missing_one_is_named(world, tmp_path):
    run_part(world, tmp_path, "plan")

    for _ in range(2):
        assert run_part(world, tmp_path, "1") == ["cohort 1 of 2 is trained"]

    lacking = f"{tmp_path} lacks 1 of its 2 cohorts: 0; train each by its number, as sweep.part=0"
    assert fault_of(run_part, world, tmp_path, "join") == lacking
    assert not (tmp_path / results.FILE).exists()


def test_a_cohort_that_trains_holds_itself_alone(world, tmp_path):
    run_part(world, tmp_path, "plan")
    first = tmp_path / "cohorts" / "0"

    with hold(first):
        assert run_part(world, tmp_path, "1")
        for part in ("0", "", "join"):
            assert fault_of(run_part, world, tmp_path, part).startswith(f"{first} is held by")
    with hold(tmp_path):
        assert fault_of(run_part, world, tmp_path, "join").startswith(f"{tmp_path} is held by")
        assert run_part(world, tmp_path, "0")

    assert not list(tmp_path.rglob(".lock"))


def test_a_sweep_resumes_on_fewer_devices_and_ends_the_same(world, swept, tmp_path):
    """Two stacks of two runs, on four devices: a mesh of two by two."""
    sweep = {**SWEEP, "train__eval_every": 10, "sweep__weights": (1.0,)}
    config = world.config(**sweep, parallel__devices=4)
    save = checkpoints.save

    def save_and_die(saved, step, states, *rest):
        save(saved, step, states, *rest)
        assert [len(state.non_finite_step) for state in states] == [2, 2]
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            api.sweep(config, tmp_path)
    config.parallel.update({"devices": 2, "runs": 2})
    api.sweep(config, tmp_path)

    keys = ["split", "run", "serve"]
    resumed = table(tmp_path).set_index(keys)
    expected = table(swept).set_index(keys)
    assert sorted(resumed.index) == sorted(expected.index)
    columns = expected.select_dtypes("number").columns
    np.testing.assert_allclose(
        resumed.loc[expected.index, columns], expected[columns],
        rtol=2e-3, atol=1e-6, equal_nan=True,
    )  # fmt: skip


def test_a_run_is_complete_though_all_longer_ones_diverged(world, tmp_path):
    steps = world.config().train.steps
    config = world.config(sweep__modes=("none",), train__checkpoint_every=steps + 1)
    config.sweep.runs = (
        {"train.steps": steps - 1},
        {"train.steps": steps, "optimizer.learning_rate": 1e30},
    )
    api.sweep(config, tmp_path)
    diverged = rows_of(tmp_path, "validation").set_index("run")["non_finite_step"].notna()
    (healthy,) = diverged.index[~diverged]

    ranker = open_ranker(tmp_path, healthy)

    assert ranker.config.train.steps == steps - 1


@pytest.mark.parametrize("rates", [(0.01, 1e30), (1e30,)])
def test_runs_that_diverge_are_marked_and_the_others_go_on(world, tmp_path, caplog, rates):
    axes = {"sweep__modes": ("shared",), "sweep__axes__optimizer__learning_rate": rates}
    config = world.config(**axes, train__log_every=1)

    api.sweep(config, tmp_path)

    frame = table(tmp_path)
    students = rows_of(tmp_path, "validation").set_index("run")
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
    # A repeat is the sweep with its three seeds, set by hand.
    seeds = {"seed": 2, "batch__seed": 2, "teacher__batch__seed": 2}
    teacher = tmp_path / "teacher"
    api.train_teacher(world.config(**seeds), teacher)
    by_hand = {**axes, **seeds, "teacher__workdir": str(teacher), "sweep__seeds": (2,)}
    alone = tmp_path / "alone"
    api.sweep(world.config(**by_hand), alone)

    whole = api.run(config, tmp_path / "whole").students.workdir

    for split in ("validation", "test"):
        students = rows_of(whole, split)
        assert students["seed"].tolist() == [0, 0, 2, 2]
        assert students["data_seed"].tolist() == [0, 0, 2, 2]
        for role in ("student", "teacher", "reference"):
            rows = rows_of(whole, split, role)
            assert set(rows["seed"]) == {0, 2}
            # The baseline is the best over all repeats, and may be another one in a single repeat.
            repeat = rows[rows["seed"] == 2].drop(columns="funnel_cost_saving")
            expected = rows_of(alone, split, role).drop(columns="funnel_cost_saving")
            pd.testing.assert_frame_equal(
                repeat.reset_index(drop=True), expected.reset_index(drop=True)
            )
    # Each is measured, and its requests are drawn anew, by its own teacher.
    (study,) = read_studies([whole])
    estimates = Estimates(study)
    for setting in study.chosen.values():
        assert estimates.of(setting, "passed_for_99").covers == "both"


@pytest.mark.long
def test_a_killed_sweep_ends_as_if_it_had_never_been_killed(world, tmp_path):
    """Killed while it saves, in its second cohort, and in the test of the first."""
    axes = {**SWEEP, "sweep__cohort_size": 3, "train__checkpoint_every": 5, "train__log_every": 5}
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
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


def test_a_student_is_made_again_from_its_last_whole_checkpoint(world, copy_of):
    whole = world.student("shared")
    workdir = copy_of(whole)
    damage(workdir / "checkpoints" / "20")
    remove(workdir / results.FILE)

    start_again(world, "shared", workdir)

    assert_same_results(workdir, whole)
    student_parameters(workdir)  # asserts that they are of the last step


@pytest.mark.parametrize(
    ("removed", "damaged"),
    [
        # Students that are lost before the test.
        (["cohorts/0/test", "manifest.json"], "cohorts/0/checkpoints/20"),
        (["cohorts/0/test/manifest.json"], "results.csv"),
        (["calibration.csv"], "cohorts/0/results.csv"),
        ([], "cohorts/0/test/results.csv"),
    ],
    ids=["students", "joined", "cohort", "test"],
)
def test_what_a_sweep_lost_is_made_again(world, swept, copy_of, removed, damaged):
    workdir = copy_of(swept)
    damage(workdir / damaged)
    for name in removed:
        remove(workdir / name)

    start_again(world, "sweep", workdir)

    assert_same_results(workdir, swept)
    assert not start_again(world, "sweep", workdir)


@pytest.mark.parametrize("file", ["results.csv", "cohorts/0/test/results.csv"])
def test_a_report_names_a_damaged_file_of_a_sweep(swept, copy_of, tmp_path, file):
    workdir = copy_of(swept)
    damage(workdir / file)

    fault = fault_of(api.report, workdir, output=tmp_path / "report")

    assert f"{workdir / file} has changed; start the command that made it again" in fault


def replace(path, old, new):
    """Changes a text in a file, once."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        (api.sweep, {"train__steps": 30, "sweep__weights": (1.0, 2.0)},
         "sweep.weights ([] there, [1.0, 2.0] now), train.steps (20 there, 30 now)"),
        (api.sweep, {"sweep__seeds": (0,), "sweep__extend": True},
         "none-seed1, which config.sweep does not name"),
        (api.train, {}, "belongs to a run of sweep"),
        (api.train_teacher, {}, "belongs to a run of sweep"),
    ],
)  # fmt: skip
def test_another_run_in_a_sweeps_workdir_is_refused(
    world, swept, copy_of, command, changes, message
):
    workdir = copy_of(swept)
    before = files_of(workdir / "cohorts")

    assert message in fault_of(command, world.config(**SWEEP | changes), workdir)

    assert files_of(workdir / "cohorts") == before


def test_a_cohort_under_another_plan_is_refused(world, swept, copy_of):
    workdir = copy_of(swept)
    replace(workdir / "cohorts.json", "seed0", "seed1")
    before = files_of(workdir / "cohorts")

    fault = fault_of(api.sweep, world.config(**SWEEP), workdir)

    assert "20 belongs to another run: config (" in fault
    assert files_of(workdir / "cohorts") == before


def fault_of_student(config, teacher):
    """The fault of training a student of a teacher; nothing is written."""
    config.teacher.workdir = str(teacher)
    api.prepare(config)
    student = teacher.parent / "student"
    fault = fault_of(api.train, config, student)
    assert not student.exists()
    return fault


def test_a_teacher_of_other_tasks_is_refused(world, copy_of):
    teacher = copy_of(world.teacher)
    config = world.config(tasks=("watch",), value_weights=(1.0,))

    fault = fault_of_student(config, teacher)

    assert "for watch; make one with: kd-ranker train-teacher" in fault


def test_a_teacher_with_a_changed_config_is_refused(world, copy_of):
    teacher = copy_of(world.teacher)
    replace(teacher / "config.json", '"seed": 0', '"seed": 5')

    assert "config.json has changed" in fault_of_student(world.config(), teacher)


def test_an_unfinished_teacher_is_refused(world, copy_of):
    teacher = copy_of(world.teacher)
    remove(teacher / "checkpoints" / "20")

    fault = fault_of_student(world.config(), teacher)

    assert "stopped at step 10 of 20; finish it with: kd-ranker train" in fault


def test_a_student_in_place_of_a_teacher_is_refused(world, copy_of):
    student = copy_of(world.student("none"))

    fault = fault_of_student(world.config(), student)

    assert "holds a student, not a teacher; make one" in fault


def log_teacher_into(config, _):
    """`api.log_teacher` with the arguments of the other commands."""
    return api.log_teacher(config)


@pytest.mark.parametrize("command", [api.train_teacher, api.train, api.sweep, log_teacher_into])
def test_a_missing_dataset_is_named_with_the_command(world, tmp_path, command):
    nowhere = str(tmp_path / "nowhere")

    fault = fault_of(command, world.config(data__dir=nowhere), tmp_path / "workdir")

    assert nowhere in fault
    assert "kd-ranker prepare" in fault
    assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize("command", [api.train, api.sweep, log_teacher_into])
def test_a_missing_teacher_is_named_with_the_command(world, tmp_path, command):
    nowhere = str(tmp_path / "nowhere")

    for workdir, message in (
        (nowhere, f"no run at {nowhere}"),
        ("", "teacher.workdir is empty"),
    ):
        fault = fault_of(command, world.config(teacher__workdir=workdir), tmp_path / "workdir")
        assert message in fault
        assert "kd-ranker train-teacher" in fault
    assert not (tmp_path / "workdir").exists()


def test_an_unscored_dataset_is_named_with_the_command(world, tmp_path, monkeypatch):
    def load_another(config):
        return load_teacher(config)._replace(version="another")

    monkeypatch.setattr(jobs, "load_teacher", load_another)

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
        (api.train, 1e30, 20, r"stopped being finite at step \d+: .*; try a"),
        # The loss was finite at the only step, and no later one would show it.
        (api.train_teacher, 1e39, 1, "the loss stopped being finite at step 1"),
    ],
)
def test_a_state_that_is_not_finite_is_never_saved(world, tmp_path, command, rate, steps, message):
    changes = {"train__steps": steps, "train__log_every": 1000, "train__checkpoint_every": 4}
    changes |= {"optimizer__learning_rate": rate, "optimizer__schedule": "constant"}
    teacher_changes = {f"teacher__{name}": value for name, value in changes.items()}

    with pytest.raises(UserError, match=message):
        command(world.config(**changes, **teacher_changes), tmp_path)

    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
