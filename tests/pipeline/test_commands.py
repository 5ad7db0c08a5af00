import json
import re
import shutil

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_ranker import api, manifest
from kd_ranker.batches.cutting import unpack
from kd_ranker.batches.training import BatchConfig, training_batches
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics import TARGET, ReportAt
from kd_ranker.evaluation.references import REFERENCES
from kd_ranker.evaluation.saving import SAVINGS
from kd_ranker.pipeline import cohorts, datasets, measure, runs, scoring, teachers
from kd_ranker.pipeline.job import Job, Opened
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.study import read_studies
from kd_ranker.requests.lock import hold
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS
from kd_ranker.sweep.members import sweep_members
from kd_ranker.training import checkpoints, recipes
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.state import select_member
from tests import small
from tests.faults import fault_of
from tests.small import SWEEP

# As many steps as elsewhere: the schedule is compiled in, and what is compiled is shared.
TABLES = (results.FILE, results.CURVES_FILE, results.CALIBRATION_FILE)


@pytest.fixture(scope="module")
def trained(world):
    """mode -> the workdir of a student; a test changes, and runs commands on, a copy alone."""
    return world.student


def table(workdir):
    return results.read_csv(workdir / results.FILE)


def rows_of(workdir, split, role="student"):
    """The rows of a sweep's results."""
    frame = table(workdir)
    return frame[(frame["split"] == split) & (frame["role"] == role)]


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def job_of(config):
    """The job of the config's teacher."""
    return Job(config, {}, Opened(config))


def student_parameters(workdir):
    config = workdirs.read_config(workdir)
    job = Opened(config).job({"": config})
    (group,) = job.groups
    abstract = (jax.eval_shape(group.init),)
    with checkpoints.open_in(workdir) as saved:
        (state,), step = checkpoints.restore(saved, abstract, None, job.made_of)
    assert step == config.train.steps
    return select_member(state.parameters, 0)


@pytest.mark.parametrize("mode", MODES)
def test_train_leaves_what_the_contract_says(world, trained, mode):
    workdir = trained(mode)
    config = world.config(distill__mode=mode)
    frame = table(workdir)
    assert list(frame.columns) == results.columns(config.tasks, job_of(config).report_at)
    assert frame["split"][frame["role"] == "teacher"].tolist() == ["validation", "test"]
    frame = frame[frame["role"] == "student"]
    assert frame["serve"].tolist() == list(MODES[mode].serve) * 2
    of_split = len(MODES[mode].serve)
    assert frame["split"].tolist() == ["validation"] * of_split + ["test"] * of_split
    # The twelve requests of a split are others than those of the other.
    assert (frame["user_bce/watch"][:of_split] != frame["user_bce/watch"][-of_split:].array).all()
    assert set(frame["mode"]) == {mode}
    assert set(frame["step"]) == {config.train.steps}
    assert frame["user_bce/watch"].between(0, 2).all()
    assert frame["cost_ratio"].between(0, 0.1).all()
    assert len(results.read_requests(workdir).each) == 1 + of_split
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


def test_the_report_of_single_runs_has_what_that_of_a_sweep_has(trained):
    """Curves and intervals over requests, and a saving where there is a baseline."""
    (study,) = read_studies([trained("none"), trained("shared")])
    assert len(study.teachers) == 1
    assert study.kept
    estimates = Estimates(study)
    assert estimates.gap("shared, weight 1", "none", "passed_for_99").covers == "requests"
    assert np.isfinite(estimates.saving("shared, weight 1", 0.99).low)
    for setting, mode in (("none", "none"), ("shared, weight 1", "shared")):
        curves = results.read_csv(trained(mode) / results.CURVES_FILE)
        of_student = curves[curves["member"].isna()].set_index("k")
        for name in ("survival", "value_captured", "true_value_captured"):
            drawn = estimates.curve(setting, name).set_index("k")
            assert len(drawn) > 40
            assert (drawn["low"] <= drawn["mean"]).all()
            shared = drawn.index.intersection(of_student.index)
            of_file = of_student.loc[shared, name]
            np.testing.assert_allclose(drawn.loc[shared, "mean"], of_file, rtol=1e-5)
    (alone,) = read_studies([trained("none")])
    assert len(Estimates(alone).curve("none", "survival"))


def test_a_finished_run_is_left_as_it_is(world, trained, tmp_path):
    workdir = tmp_path / "finished"
    shutil.copytree(trained("shared"), workdir)
    before = {
        path: path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    }
    api.train(world.config(distill__mode="shared"), workdir)
    assert {path: path.read_bytes() for path in before} == before


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
    (group,) = recipes.student_groups({"": config}, datasets.dataset_of(config).spec)
    start = select_member(group.init().parameters, 0)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), one, start)
    assert max(jax.tree.leaves(moved)) > 0.02
    # Of the students: a teacher in a log has no rows of its own for ids.
    tables = (table(workdir).query("role == 'student'") for workdir in (live, logged))
    one, other = (of.select_dtypes("number") for of in tables)
    np.testing.assert_allclose(one, other, rtol=1e-3)


def test_students_learn_from_the_scores_of_the_teacher_and_from_no_others(world):
    config = world.config()
    directory, original = log_teacher(world), datasets.dataset_of(config)
    version = teachers.load_teacher(config, original).version
    assert f"-teacher-{version}" in directory.name
    dataset = datasets.dataset_under(config, original, version)
    assert dataset.spec.teacher_version == version
    for split in SPLITS:
        requests = list(read_requests(dataset, split))
        assert {request.teacher_version for request in requests} == {version}
        # teacher.stage=retrieved: every candidate was scored.
        table = pa.concat_tables(map(pq.read_table, directory.glob(f"*-{split}.parquet")))
        assert set(table["version"].to_pylist()) == {version}
        names = [f"probability_{task}" for task in dataset.spec.tasks]
        columns = [table[name].to_pylist() for name in ("request", "item", *names, "value")]
        found = {(request, item): numbers for request, item, *numbers in zip(*columns, strict=True)}
        expected = {
            (request.request_id, item): probability
            for request in requests
            for item, probability in zip(request.item_id, request.teacher_probability, strict=True)
        }
        assert found.keys() == expected.keys()
        for key, probability in expected.items():
            value = probability @ np.array(config.value_weights)
            np.testing.assert_allclose(found[key], [*probability, value], rtol=1e-6)

    for resident in (False, True):
        sizes = BatchConfig(8, 32, 0.5, 1.0, seed=0)
        batch = unpack(*next(iter(training_batches(dataset, sizes, resident=resident))))
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


def files_in(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def columns_in(directory):
    return {path.name: path.read_bytes() for path in directory.glob("teacher-*.npy")}


def test_columns_do_not_depend_on_parts(apart, monkeypatch):
    directory = api.log_teacher(apart).directory
    columns = columns_in(directory)
    assert len(columns) == 3
    shutil.rmtree(directory)
    monkeypatch.setattr(scoring, "_BATCHES", 64)
    assert columns_in(api.log_teacher(apart).directory) == columns


def test_finished_scores_are_left_alone_and_checked(apart, tmp_path, monkeypatch):
    directory = api.log_teacher(apart).directory
    monkeypatch.setattr(scoring._Scorer, "write", None)
    assert api.log_teacher(apart).directory == directory
    content = (directory / "teacher-test.npy").read_bytes()
    (directory / "teacher-test.npy").write_bytes(content[:-1] + b"x")
    assert "teacher-test.npy has changed; remove the folder" in fault_of(api.log_teacher, apart)
    logged = apart.copy_and_resolve_references()
    logged.teacher.source = "logged"
    assert "teacher-test.npy has changed" in fault_of(api.train, logged, tmp_path / "student")


def test_scores_of_other_value_weights_are_replaced(apart):
    directory = api.log_teacher(apart).directory
    before = files_in(directory)
    apart.value_weights = tuple(2 * weight for weight in apart.value_weights)
    assert api.log_teacher(apart).directory == directory
    after = files_in(directory)
    changed = {name for name, content in after.items() if content != before[name]}
    assert changed == {"manifest.json", *(name for name in after if name.endswith(".parquet"))}


def test_scores_of_other_contents_of_the_dataset_are_refused(apart, tmp_path):
    folder = api.log_teacher(apart).directory
    content = json.loads((folder / manifest.FILE).read_text())
    content["made_of"]["dataset"] = "of other content"
    (folder / manifest.FILE).write_text(json.dumps(content))
    assert "holds something else" in fault_of(api.log_teacher, apart)
    apart.teacher.source = "logged"
    fault = fault_of(api.train, apart, tmp_path / "student")
    assert "has the scores of of other content, and the dataset is now" in fault
    assert "log_teacher" in fault


@pytest.fixture(scope="module")
def swept(world):
    return world.sweep()


def chosen_by_hand(workdir):
    """The (member, serve) of each mode's serving choice with the least mean on validation."""
    chosen = []
    for _, of_mode in rows_of(workdir, "validation").groupby("mode", sort=False):
        means = of_mode.groupby("serve", sort=False)["passed_for_99"].mean()
        of_best = of_mode[of_mode["serve"] == means.idxmin()]
        chosen += zip(of_best["member"], of_best["serve"], strict=True)
    return chosen


def test_a_sweep_has_one_row_a_model_and_serve_choice_on_validation(world, swept):
    frame, config = table(swept), world.config()
    assert list(frame.columns) == results.columns(config.tasks, job_of(config).report_at)
    referred = ["reference"] * len(REFERENCES)
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


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_saving_is_against_the_baseline_of_the_same_split_and_seed(world, swept, split):
    students, config = rows_of(swept, split), world.config()
    (teacher_flops,) = rows_of(swept, split, "teacher")["flops_per_candidate"]
    assert (students.loc[students["mode"] == "none", "saving_over_none"] == 0).all()
    cost = (
        config.funnel.retrieved * students["flops_per_candidate"]
        + students["passed_for_99"] * teacher_flops
    )
    for _, of_seed in students.groupby("seed"):
        assert of_seed["mode"].iloc[0] == "none"
        saving = 1 - cost[of_seed.index] / cost[of_seed.index[0]]
        np.testing.assert_allclose(of_seed["saving_over_none"], saving, atol=1e-5)
    # The best without scores is a list here, which costs nothing itself.
    references = rows_of(swept, "validation", "reference").set_index("member")["passed_for_99"]
    without = references[["incumbent", "popularity", "show_rate", "pass_rate"]]
    of_none = rows_of(swept, "validation").query("mode == 'none'")["passed_for_99"]
    assert without.min() < of_none.mean()
    on_test = rows_of(swept, split, "reference").set_index("member")["passed_for_99"]
    saving = 1 - cost / (on_test[without.idxmin()] * teacher_flops)
    np.testing.assert_allclose(students["funnel_cost_saving"], saving, atol=1e-5)


def test_heads_that_do_not_rank_are_not_charged(swept):
    for _, of_seed in rows_of(swept, "validation").groupby("seed"):
        flops = dict(zip(of_seed["serve"][1:], of_seed["flops_per_candidate"][1:], strict=True))
        of_none = of_seed["flops_per_candidate"].iloc[0]
        assert flops["user"] == flops["teacher"] == of_none < flops["blend"]


def test_the_test_is_read_by_chosen_settings_alone_as_each_member_measures_on_it(world, swept):
    config = world.config(**SWEEP)
    tested = rows_of(swept, "test").set_index(["member", "serve"])
    assert sorted(tested.index) == sorted(chosen_by_hand(swept))
    members = sweep_members(config)
    job = Opened(config).job(members)
    students, step = runs.trained_students(job, swept / "cohorts" / "0")
    assert step == config.train.steps
    # All serving choices, in a pass without references.
    every = measure.measure(job, "test", students)
    kept_of_sweep = results.read_requests(swept / "cohorts" / "0" / "test").each
    for row in every.rows:
        who = row["member"], row["serve"]
        if who not in tested.index:
            continue
        numbers = [name for name in tested if isinstance(row.get(name), float)]
        assert len(numbers) > 20
        np.testing.assert_allclose(
            tested.loc[who, numbers].astype(float), [row[name] for name in numbers],
            rtol=1e-5, atol=1e-7, equal_nan=True,
        )  # fmt: skip
        for name, of_each in every.each[who].curves.items():
            np.testing.assert_allclose(kept_of_sweep[who].curves[name], of_each, rtol=1e-5)
    assert kept_of_sweep.keys() == {*tested.index, ("teacher", "user"), *REFERENCE_NAMES}


REFERENCE_NAMES = {(name, "user") for name in REFERENCES}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_references_are_measured_as_what_they_know_allows(swept, split):
    references = rows_of(swept, split, "reference").set_index("member")
    assert list(references.index) == list(REFERENCES)
    assert references["passed_for_99"].between(10, 100).all()
    assert set(references["seed"]) == {0}  # of the teacher by whom they are measured
    for column in ("mode", "data_seed", "step", "flops_per_candidate", *SAVINGS):
        assert references[column].isna().all(), column
    # Whoever only orders foretells nothing.
    foretold = references["user_bce/watch"].notna()
    assert foretold[foretold].index.tolist() == ["oracle"]
    calibrated = results.read_csv(swept / results.CALIBRATION_FILE)["member"]
    assert {name for name in REFERENCES if name in set(calibrated)} == {"oracle"}
    # It knows the truth.
    students = rows_of(swept, split)
    name = "true_value_captured@30"
    assert references.loc["oracle", name] >= students[name].max()


def test_a_sweep_without_a_teacher_to_run_knows_neither_its_seed_nor_its_step(world, tmp_path):
    config = world.config(**SWEEP, teacher__source="logged", teacher__workdir="")
    config.update(sweep={"modes": ("none",), "seeds": (0,)})
    api.sweep(config, tmp_path)
    rows = (tmp_path / results.FILE).read_text().splitlines()[1:]
    of_test = [row for row in rows if row.startswith("cascade,test")]
    for teacher_row, student_row, split in ((*rows[:2], "validation"), (*of_test[:2], "test")):
        assert teacher_row.startswith(f"cascade,{split},teacher,,,,,,,,user,,,,")
        assert student_row.startswith(f"cascade,{split},student,none,,0,,0.01,bce,0,user,0,0,20,")


def test_a_member_of_a_sweep_is_the_student_that_train_makes(world, swept, trained):
    """Same seed, same order of the data: the same numbers up to rounding."""
    frame = table(swept)
    for mode in ("none", "aux"):
        keys = ["split", "serve"]
        alone = table(trained(mode)).query("role == 'student'").set_index(keys)
        of_sweep = frame[(frame["mode"] == mode) & (frame["seed"] == 0)].set_index(keys)
        assert len(of_sweep) > len(MODES[mode].serve)
        compared = alone.select_dtypes("number").columns
        compared = compared.difference([*SAVINGS, "member"])
        np.testing.assert_allclose(
            of_sweep[compared].astype(float), alone.loc[of_sweep.index, compared],
            rtol=2e-3, atol=1e-6,
        )  # fmt: skip


def test_a_sweep_leaves_curves_and_calibration_beside_its_results(world, swept):
    config, frame = world.config(), table(swept)
    frame = frame[frame["split"] == "test"].reset_index(drop=True)
    curves = results.read_csv(swept / results.CURVES_FILE)
    assert list(curves.columns) == results.curves_columns(config.tasks)
    members = list(frame[["member", "serve"]].itertuples(index=False, name=None))
    assert list(curves.groupby(["member", "serve"], sort=False).groups) == members
    at_passed = curves[curves["k"] == config.funnel.passed]
    for name in ("survival", "value_captured", "true_value_captured", "shown_recall"):
        np.testing.assert_allclose(
            at_passed[name], frame[f"{name}@{config.funnel.passed}"], rtol=1e-6
        )
    calibration = results.read_csv(swept / results.CALIBRATION_FILE)
    assert tuple(calibration.columns) == results.CALIBRATION_COLUMNS
    bins = calibration[calibration["task"] == "watch"].groupby(["member", "serve"], sort=False)
    predicted = bins.apply(lambda rows: (rows["weight"] * rows["predicted"]).sum())
    observed = bins.apply(lambda rows: (rows["weight"] * rows["observed"]).sum())
    of_frame = frame.set_index(["member", "serve"])["user_calibration/watch"].dropna()
    assert list(of_frame.index) == list(predicted.index)
    np.testing.assert_allclose(predicted / observed, of_frame, rtol=1e-4)


def copy_of(workdir, tmp_path):
    return shutil.copytree(workdir, tmp_path / workdir.name)


def test_a_complete_sweep_is_left_alone(world, swept, tmp_path):
    workdir = copy_of(swept, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert not small.sweep(world.config(**SWEEP), workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_sweep_of_another_config_is_refused_with_the_keys(world, swept, tmp_path):
    config = world.config(**SWEEP, train__steps=30, sweep__weights=(1.0, 2.0))
    fault = fault_of(api.sweep, config, copy_of(swept, tmp_path))
    assert "sweep.weights ([1.0] there, [1.0, 2.0] now), train.steps (20 there, 30 now)" in fault


def test_costs_of_ones_own_change_savings_alone_and_train_nothing(world, swept, tmp_path):
    workdir = copy_of(swept, tmp_path)
    costs = {"costs__teacher__candidate": 2.0, "costs__student__candidate": 0.5}

    def written():
        """The time of each file; folders have another after they were held."""
        files = (path for path in workdir.glob("cohorts/**/*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in files}

    cohorts = written()
    assert small.sweep(world.config(**SWEEP, **costs), workdir)
    assert written() == cohorts
    before, after = table(swept), table(workdir)
    columns = list(SAVINGS)
    pd.testing.assert_frame_equal(before.drop(columns=columns), after.drop(columns=columns))
    rows = rows_of(workdir, "validation")
    cost = 0.5 * world.config().funnel.retrieved + 2.0 * rows["passed_for_99"]
    for _, of_seed in rows.groupby("seed"):
        saving = 1 - cost[of_seed.index] / cost[of_seed.index[0]]
        np.testing.assert_allclose(of_seed["saving_over_none"], saving, atol=1e-5)
    assert not small.sweep(world.config(**SWEEP, **costs), workdir)


# One more way: the mode none does not read the weight.
MORE = SWEEP | {
    "sweep__ways": ("distill.mode=none,aux", "distill.mode=aux distill.weight=4.0"),
    "sweep__extend": True,
}


def with_results_on_validation(workdir, change):
    """Changes the rows of the first cohort, as if its members had been measured so."""
    cohort = workdir / "cohorts" / "0"
    frame = results.read_csv(cohort / results.FILE)
    change(frame)
    frame.to_csv(cohort / results.FILE, index=False)
    written = json.loads((cohort / manifest.FILE).read_text())
    manifest.write(cohort, written["made_of"], written["files"])
    (workdir / manifest.FILE).unlink()


@pytest.fixture(scope="module")
def extended(world, swept):
    """A sweep that is extended after its own `aux` was found to be bad on validation."""

    def be_bad(frame):
        frame.loc[frame["mode"] == "aux", "passed_for_99"] = 1000.0

    def extend(folder):
        shutil.copytree(swept, folder, dirs_exist_ok=True)
        with_results_on_validation(folder, be_bad)
        before = (folder / "cohorts" / "0" / results.FILE).stat().st_mtime_ns
        assert small.sweep(world.config(**MORE), folder)
        assert (folder / "cohorts" / "0" / results.FILE).stat().st_mtime_ns == before

    return world.made("extended", extend)


def test_a_sweep_that_is_extended_trains_the_new_members_alone(world, swept, extended, tmp_path):
    assert sorted(path.name for path in (extended / "cohorts").iterdir()) == ["0", "1"]
    old, new = (rows_of(workdir, "validation") for workdir in (swept, extended))
    assert set(new["member"]) - set(old["member"]) == {f"aux-weight4.0-seed{s}" for s in (0, 1)}
    compared = old.columns.difference(["passed_for_99", *SAVINGS])
    assert (
        new[: len(old)]
        .reset_index(drop=True)[compared]
        .equals(old.reset_index(drop=True)[compared])
    )
    assert (
        table(extended)
        .loc[lambda rows: rows["role"] == "student", "funnel_cost_saving"]
        .notna()
        .all()
    )
    workdir = copy_of(extended, tmp_path)
    # The same again has nothing to do, with and without the word.
    assert not small.sweep(world.config(**MORE), workdir)
    assert not small.sweep(world.config(**MORE | {"sweep__extend": False}), workdir)
    fewer = SWEEP | {"sweep__seeds": (0,), "sweep__extend": True}
    fault = fault_of(api.sweep, world.config(**fewer), workdir)
    assert "none-seed1, which config.sweep does not name" in fault


def test_a_better_setting_that_a_sweep_is_extended_by_is_the_one_read_on_the_test(swept, extended):
    before, after = (set(rows_of(workdir, "test")["member"]) for workdir in (swept, extended))
    none = {"none-seed0", "none-seed1"}
    assert before == none | {"aux-weight1.0-seed0", "aux-weight1.0-seed1"}
    assert after == none | {"aux-weight4.0-seed0", "aux-weight4.0-seed1"}
    # Each where it trained, with the references beside the first.
    members = [
        {name for name, _ in results.read_requests(extended / "cohorts" / cohort / "test").each}
        for cohort in "01"
    ]
    assert members[0] == none | {"teacher", *REFERENCES}
    assert members[1] == after - none | {"teacher"}
    for role in ("teacher", "reference"):
        one, other = (rows_of(workdir, "test", role) for workdir in (swept, extended))
        assert len(one) == len(other)
        columns = one.select_dtypes("number").columns
        np.testing.assert_allclose(one[columns], other[columns], rtol=1e-6, equal_nan=True)
    curves = results.read_csv(extended / results.CURVES_FILE)
    assert set(curves["member"]) == members[0] | members[1]


def test_another_choice_on_validation_is_another_one_read_on_the_test(world, swept, tmp_path):
    """Whatever the test says, and nothing is trained for it."""
    workdir = copy_of(swept, tmp_path)
    (serve,) = {serve for name, serve in chosen_by_hand(swept) if name.startswith("aux")}
    other = next(name for name in MODES["aux"].serve if name != serve)

    def be_best(frame):
        frame.loc[(frame["mode"] == "aux") & (frame["serve"] == other), "passed_for_99"] = 1.0

    with_results_on_validation(workdir, be_best)
    before = (workdir / "cohorts" / "0" / "metrics.jsonl").stat().st_mtime_ns
    assert small.sweep(world.config(**SWEEP), workdir)
    assert (workdir / "cohorts" / "0" / "metrics.jsonl").stat().st_mtime_ns == before
    tested = rows_of(workdir, "test")
    assert set(tested.loc[tested["mode"] == "aux", "serve"]) == {other}
    assert set(tested.loc[tested["mode"] == "none", "serve"]) == {"user"}


def test_students_whose_checkpoint_is_lost_before_the_test_are_made_again(world, swept, tmp_path):
    workdir = copy_of(swept, tmp_path)
    cohort = workdir / "cohorts" / "0"
    shutil.rmtree(cohort / "test")
    (workdir / manifest.FILE).unlink()
    damage(cohort / "checkpoints" / "20")
    assert small.sweep(world.config(**SWEEP), workdir)
    for name in TABLES:
        assert (workdir / name).read_bytes() == (swept / name).read_bytes()


PARTS = {
    "sweep__modes": ("none", "aux"),
    "sweep__group_size": 1,
    "train__steps": 4,
    "train__eval_every": 0,
}


def part_of(world, workdir, part):
    """The lines on that part of a sweep."""
    lines = []
    api.sweep(world.config(**PARTS, sweep__part=part), workdir, show=lines.append)
    return lines


def test_a_sweep_in_parts_is_the_one_that_ran_at_once(world, tmp_path):
    """Each part as a job of its own would do it, and in any order."""
    whole, workdir = tmp_path / "whole", tmp_path / "parts"
    api.sweep(world.config(**PARTS), whole)
    unplanned = f"{workdir} has no cohort for 2 of the sweep's 2 members; settle"
    for part in ("0", "join"):
        assert fault_of(part_of, world, workdir, part).startswith(unplanned)
    assert not workdir.exists()
    assert part_of(world, workdir, "plan") == ["cohorts: 2", "numbers: 0-1"]
    assert not (workdir / "cohorts").exists()
    fault = fault_of(part_of, world, workdir, "2")
    assert fault.endswith(f"the sweep in {workdir} has 2 cohorts, numbered from 0 to 1")
    longer = world.config(**PARTS | {"train__steps": 5}, sweep__part="0")
    fault = fault_of(api.sweep, longer, workdir)
    assert "train.steps (4 there, 5 now)" in fault
    for _ in range(2):
        assert part_of(world, workdir, "1") == ["cohort 1 of 2 is trained"]
    fault = fault_of(part_of, world, workdir, "join")
    assert (
        fault == f"{workdir} lacks 1 of its 2 cohorts: 0; train each by its number, as sweep.part=0"
    )
    assert not (workdir / results.FILE).exists()
    part_of(world, workdir, "0")
    assert part_of(world, workdir, "join") == []
    for file in (results.FILE, results.CURVES_FILE, results.CALIBRATION_FILE):
        assert (workdir / file).read_bytes() == (whole / file).read_bytes()
    for part in ("plan", "join", ""):
        assert "is complete; there is nothing to do" in part_of(world, workdir, part)[0]


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


def test_a_cohort_is_not_trained_under_another_teacher_than_was_planned(
    world, tmp_path, monkeypatch
):
    part_of(world, tmp_path, "plan")
    monkeypatch.setattr(Job, "teacher_version", "another")
    fault = fault_of(part_of, world, tmp_path, "0")
    assert fault.endswith("and now it is another; use another --workdir")
    assert fault_of(cohorts.train_cohort, tmp_path, 0) == f"cohort 0: {fault}"


def test_a_sweep_on_several_devices_ends_the_same_and_goes_on_on_fewer(world, swept, tmp_path):
    """Two groups of two members, on four devices: a mesh of two by two."""
    keys = ["split", "member", "serve"]
    sweep = {**SWEEP, "train__eval_every": 10, "sweep__weights": (1.0,)}
    config = world.config(**sweep, parallel__devices=4)
    saved = checkpoints.save

    class Killed(Exception):
        pass

    def killed_after_the_first(of, step, state, *rest):
        saved(of, step, state, *rest)
        assert [len(of_group.non_finite_step) for of_group in state] == [2, 2]
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", killed_after_the_first)
        with pytest.raises(Killed):
            api.sweep(config, tmp_path)
    config.parallel.update({"devices": 2, "members": 2})
    api.sweep(config, tmp_path)
    spread, whole = (table(workdir).set_index(keys) for workdir in (tmp_path, swept))
    assert sorted(spread.index) == sorted(whole.index)
    numbers = whole.select_dtypes("number").columns
    np.testing.assert_allclose(
        spread.loc[whole.index, numbers], whole[numbers], rtol=2e-3, atol=1e-6, equal_nan=True
    )


def test_a_member_that_diverges_is_marked_and_the_others_go_on(world, tmp_path, caplog):
    axes = {
        "sweep__modes": ("none", "shared"),
        "sweep__axes__optimizer__learning_rate": (0.01, 1e30),
    }
    api.sweep(world.config(**axes, train__log_every=1), tmp_path)
    frame = table(tmp_path)
    students = rows_of(tmp_path, "validation").set_index("member")
    diverged = students["learning_rate"] > 1
    assert (students["non_finite_step"].notna() == diverged).all()
    assert students.loc[~diverged, "passed_for_99"].notna().all()
    measured = [name for name in frame if "@" in name or "/" in name]
    assert students.loc[diverged, measured].isna().all(axis=None)
    # Nor is any of them chosen, so the test is read without them.
    assert set(rows_of(tmp_path, "test")["member"]) == set(students.index[~diverged])
    step = int(students.loc["shared-weight1.0-rate1e+30-seed0", "non_finite_step"])
    assert f"shared-weight1.0-rate1e+30-seed0 stopped being finite at step {step}" in caplog.text
    # Nothing is logged of it from then on.
    for line in metrics(tmp_path / "cohorts" / "0"):
        assert ("loss/shared-weight1.0-rate1e+30-seed0" in line) == (line["step"] < step)
        assert "loss/shared-weight1.0-seed0" in line


def test_a_cohort_that_diverges_whole_does_not_keep_the_others_from_training(world, tmp_path):
    axes = {"sweep__modes": ("none",), "sweep__axes__optimizer__learning_rate": (1e30, 0.01)}
    config = world.config(**axes, sweep__group_size=1, train__log_every=1)
    api.sweep(config, tmp_path)
    students = rows_of(tmp_path, "validation")
    assert students["non_finite_step"].notna().tolist() == [True, False]
    assert max(line["step"] for line in metrics(tmp_path / "cohorts" / "0")) < config.train.steps
    # It has no member that was chosen, so the test is not read for it.
    assert not (tmp_path / "cohorts" / "0" / "test").exists()
    assert rows_of(tmp_path, "test")["member"].tolist() == ["none-seed0"]
    assert rows_of(tmp_path, "test", "reference")["member"].tolist() == list(REFERENCES)
    assert not small.sweep(config, tmp_path)


def test_a_sweep_of_which_all_diverge_has_the_teacher_and_references_on_the_test(world, tmp_path):
    axes = {"sweep__modes": ("none",), "sweep__axes__optimizer__learning_rate": (1e30,)}
    config = world.config(**axes, train__log_every=1)
    assert small.sweep(config, tmp_path)
    frame = table(tmp_path)
    referred = ["reference"] * len(REFERENCES)
    assert frame["role"].tolist() == ["teacher", "student", *referred, "teacher", *referred]
    counts = frame["split"].value_counts().to_dict()
    assert counts == {"validation": 2 + len(REFERENCES), "test": 1 + len(REFERENCES)}
    assert frame[list(SAVINGS)].isna().all(axis=None)
    assert not small.sweep(config, tmp_path)


def test_an_extension_that_died_before_its_results_were_joined_is_not_complete(
    world, swept, extended, tmp_path
):
    workdir = copy_of(extended, tmp_path)
    for name in (*TABLES, manifest.FILE):
        shutil.copy(swept / name, workdir / name)
    before = files_of(workdir / "cohorts")
    assert small.sweep(world.config(**MORE), workdir)
    assert files_of(workdir / "cohorts") == before
    for name in TABLES:
        assert (workdir / name).read_bytes() == (extended / name).read_bytes()


def test_a_workdir_belongs_to_one_command(world, swept, trained, tmp_path):
    workdir = copy_of(swept, tmp_path)
    for command in (api.train, api.train_teacher):
        fault = fault_of(command, world.config(**SWEEP), workdir)
        assert f"{workdir} belongs to a run of sweep" in fault
    assert (workdir / results.FILE).read_bytes() == (swept / results.FILE).read_bytes()
    single = copy_of(trained("shared"), tmp_path)
    fault = fault_of(api.sweep, world.config(distill__mode="shared"), single)
    assert f"{single} belongs to a run of train;" in fault


def test_orders_of_data_are_cohorts_that_pair_with_their_own_baseline(world, tmp_path):
    axes = {"sweep__modes": ("none",), "sweep__axes__batch__seed": (0, 5)}
    api.sweep(world.config(**axes), tmp_path)
    for split in ("validation", "test"):
        students = rows_of(tmp_path, split)
        assert students["data_seed"].tolist() == [0, 5]
        assert (students["saving_over_none"] == 0).all()
        # Another order is another student.
        assert students["user_bce/watch"].nunique() == 2
    # One batch after another: a cohort an order, and each has its part of the test.
    assert len([*tmp_path.glob("cohorts/*/test")]) == 2


@pytest.mark.long
def test_a_whole_repeat_has_a_teacher_and_an_order_of_its_own(world, tmp_path):
    changes = {
        "sweep__modes": ("none", "shared"), "sweep__seeds": (0, 2), "sweep__whole_repeats": True,
        "teacher__workdir": "",
    }  # fmt: skip
    made = api.run(world.config(**changes), tmp_path / "whole")
    test, validation = (rows_of(made.students.workdir, split) for split in ("test", "validation"))
    for students in (test, validation):
        assert students["seed"].tolist() == students["data_seed"].tolist() == [0, 0, 2, 2]
    # A repeat is that of its three seeds, set by hand.
    alone = {"seed": 2, "batch__seed": 2, "teacher__batch__seed": 2}
    teacher = tmp_path / "teacher"
    api.train_teacher(world.config(**alone), teacher)
    by_hand = {**alone, "teacher__workdir": str(teacher), "sweep__modes": ("none", "shared")}
    api.sweep(world.config(**by_hand, sweep__seeds=(2,)), tmp_path / "alone")
    for split, of_whole in (("validation", validation), ("test", test)):
        of_seed = of_whole[of_whole["seed"] == 2].reset_index(drop=True)
        expected = rows_of(tmp_path / "alone", split).reset_index(drop=True)
        pd.testing.assert_frame_equal(of_seed, expected)
    for role in ("teacher", "reference"):
        rows = rows_of(made.students.workdir, "test", role)
        expected = rows_of(tmp_path / "alone", "test", role).reset_index(drop=True)
        assert set(rows["seed"]) == {0, 2}
        pd.testing.assert_frame_equal(rows[rows["seed"] == 2].reset_index(drop=True), expected)
    # Each is measured, and its requests are drawn anew, by its own teacher.
    (study,) = read_studies([made.students.workdir])
    estimates = Estimates(study)
    for setting in study.chosen.values():
        assert estimates.of(setting, "passed_for_99").covers == "both"


def files_of(workdir):
    return {
        path: path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    }


def change_members(workdir):
    path = workdir / "cohorts.json"
    path.write_text(path.read_text().replace("seed0", "seed1", 1))


def change_teacher(workdir):
    path = workdir / "cohorts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teachers": ["elsewhere"]}))
    (workdir / results.FILE).unlink()


def forget_config(workdir):
    for name in ("config.json", "environment.json"):
        (workdir / name).unlink()


@pytest.mark.parametrize(
    ("change", "changes", "message"),
    [
        (lambda workdir: (workdir / "cohorts.json").write_text("{"), {}, "cohorts.json is damaged"),
        (
            lambda workdir: (workdir / "cohorts.json").unlink(),
            {"sweep__seeds": (2, 3), "sweep__extend": True},
            "cohorts contains students, but cohorts.json, which lists them, is missing",
        ),
        (change_members, {}, "20 contains a model of other sizes than the config: config ("),
        (change_teacher, {}, "holds a sweep under the teacher elsewhere"),
        (forget_config, {"optimizer__warmup_steps": 3}, "20 belongs to another run: config ("),
    ],
)
def test_a_sweep_of_other_members_teacher_or_config_is_refused_and_stays(
    world, swept, tmp_path, change, changes, message
):
    workdir = copy_of(swept, tmp_path)
    change(workdir)
    before = files_of(workdir / "cohorts")
    assert message in fault_of(api.sweep, world.config(**SWEEP | changes), workdir)
    assert files_of(workdir / "cohorts") == before


@pytest.mark.parametrize("of", ["", "cohorts/0", "cohorts/0/test"])
def test_a_changed_table_of_a_finished_sweep_is_named_and_made_again(world, swept, tmp_path, of):
    workdir = copy_of(swept, tmp_path)
    path, unmarked = workdir / of / results.FILE, workdir / "cohorts" / "0" / "test"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0.", b"1.", 1))
    if of != "cohorts/0":  # of which a report reads nothing
        fault = fault_of(api.report, workdir, output=tmp_path / "report")
        assert f"{path} has changed; start the command that made it again" in fault
    (unmarked / manifest.FILE).unlink()
    (workdir / results.CALIBRATION_FILE).unlink()
    assert small.sweep(world.config(**SWEEP), workdir)
    for name in (*TABLES, manifest.FILE):
        assert (workdir / name).read_bytes() == (swept / name).read_bytes()
    for folder in (path.parent, unmarked):
        assert (folder / results.FILE).read_bytes() == (
            swept / folder.relative_to(workdir) / results.FILE
        ).read_bytes()
    assert not small.sweep(world.config(**SWEEP), workdir)


def test_a_report_finds_tables_of_another_cohort_and_another_config(swept, tmp_path):
    workdir = copy_of(swept, tmp_path)
    cohort = workdir / "cohorts" / "0" / "test"
    written = json.loads((cohort / manifest.FILE).read_text())
    table = (cohort / results.FILE).read_bytes()
    (cohort / results.FILE).write_bytes(table.replace(b"0.", b"1.", 1))
    manifest.write(cohort, written["made_of"], written["files"])
    fault = fault_of(api.report, workdir, output=tmp_path / "report")
    assert f"{workdir}/cohorts/0/test/{manifest.FILE} has changed; start the command" in fault
    (cohort / results.FILE).write_bytes(table)
    manifest.write(cohort, written["made_of"], written["files"])
    config = workdir / "config.json"
    config.write_text(config.read_text().replace('"passed": 30', '"passed": 40'))
    fault = fault_of(api.report, workdir, output=tmp_path / "report")
    assert f"{config} has changed; start the command" in fault


def test_a_teacher_of_another_config_than_lies_beside_it_is_refused(world, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(world.teacher, teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"seed": 5}))
    fault = fault_of(api.train, world.config(teacher__workdir=str(teacher)), tmp_path / "w")
    assert "20 belongs to another run: config (" in fault


@pytest.mark.long
def test_a_killed_sweep_ends_as_if_it_had_never_been_killed(world, tmp_path):
    """Killed while it saves, in its second cohort, and in the test of the first."""
    axes = {**SWEEP, "sweep__group_size": 3, "train__checkpoint_every": 5, "train__log_every": 5}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    api.sweep(world.config(**axes), whole)
    flags = world.flags(killed, **axes)
    for moment, name, at in (("saving", "0", 20), ("logging", "1", 15), ("writing", "test", 2)):
        small.run_and_kill("experiments.sweep", moment, name, at, flags)
        assert not (killed / results.FILE).exists()
    test = killed / "cohorts" / "0" / "test"
    assert [path.name for path in test.iterdir()] == [results.REQUESTS_FILE]
    measured = [killed / "cohorts" / cohort / results.FILE for cohort in "01"]
    before = [path.stat().st_mtime_ns for path in measured]
    assert small.sweep(world.config(**axes), killed)
    assert [path.stat().st_mtime_ns for path in measured] == before
    there, expected = (
        {path.relative_to(folder): content for path, content in files_of(folder).items()}
        for folder in (killed, whole)
    )
    for path, content in expected.items():
        if path.suffix in (".csv", ".parquet", ".jsonl"):
            assert there[path] == content, path


def damage(checkpoint):
    for file in (checkpoint / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)


def test_a_run_with_a_damaged_checkpoint_ends_with_the_same_results(world, trained, tmp_path):
    whole, workdir = trained("shared"), tmp_path / "damaged"
    shutil.copytree(whole, workdir)
    (workdir / results.FILE).unlink()
    damage(workdir / "checkpoints" / "20")
    api.train(world.config(distill__mode="shared"), workdir)
    for name in (results.FILE, "metrics.jsonl"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()
    student_parameters(workdir)  # of the last step


@pytest.mark.parametrize("command", ["train_teacher", "train", "sweep", "log_teacher"])
def test_without_a_dataset_each_command_names_the_one_that_makes_it(world, tmp_path, command):
    workdir = tmp_path / "workdir"
    arguments = () if command == "log_teacher" else (workdir,)
    config = world.config(data__dir=str(tmp_path / "nowhere"))
    fault = fault_of(getattr(api, command), config, *arguments)
    assert str(tmp_path / "nowhere") in fault
    assert "python -m experiments.prepare_data" in fault
    assert not workdir.exists()


@pytest.mark.parametrize("command", [api.train, api.sweep])
@pytest.mark.parametrize("source", ["live", "logged"])
def test_without_a_teacher_a_student_names_the_command_that_makes_it(
    world, tmp_path, command, source
):
    missing = {str(tmp_path / "missing"): f"no teacher at {tmp_path / 'missing'}"}
    if source == "live":
        missing[""] = "teacher.workdir is empty"
    for teacher, message in missing.items():
        config = world.config(teacher__workdir=teacher, teacher__source=source)
        fault = fault_of(command, config, tmp_path / "workdir")
        assert fault.startswith(message)
        assert "python -m experiments.train_teacher" in fault


def test_an_unfinished_teacher_says_how_far_it_is(world, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(world.teacher, teacher)
    shutil.rmtree(teacher / "checkpoints" / "20")
    fault = fault_of(api.train, world.config(teacher__workdir=str(teacher)), tmp_path / "w")
    assert "stopped at step 10 of 20; finish it with: python -m experiments.train_teacher" in fault


def test_a_student_is_no_teacher_and_keeps_its_checkpoints(world, trained, tmp_path):
    workdir = trained("none")
    config = world.config(teacher__workdir=str(workdir))
    assert "contains a model of other sizes" in fault_of(api.train, config, tmp_path / "w")
    assert (workdir / "checkpoints" / "20").is_dir()


def test_a_teacher_of_other_tasks_is_named_with_its_tasks(world, tmp_path):
    config = world.config(tasks=("watch",), value_weights=(1.0,))
    api.prepare(config)
    fault = fault_of(api.train, config, tmp_path / "w")
    assert re.search("trained on .* for watch, like, share, not on .* for watch;", fault)


def test_a_dataset_that_the_teacher_has_not_scored_names_the_command(world, tmp_path, monkeypatch):
    version = "another"
    load = teachers.load_teacher
    monkeypatch.setattr(
        teachers, "load_teacher", lambda *arguments: load(*arguments)._replace(version=version)
    )
    fault = fault_of(api.train, world.config(teacher__source="logged"), tmp_path / "w")
    assert "teacher-another" in fault
    assert "python -m experiments.log_teacher" in fault


def test_data_that_is_there_is_left_alone(world):
    directory = api.prepare(world.config()).directory
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert api.prepare(world.config()).directory == directory
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_costs_are_those_of_the_teacher_that_was_trained(world):
    """Not of one that the student's own flags would describe."""
    config = world.config(teacher__width=64)
    flops = measure.teacher_flops(Opened(config).job({"": config}))
    assert flops == measure.teacher_flops(job_of(world.config()))
    assert flops != measure.teacher_flops(job_of(config))


def test_a_run_on_several_devices_evaluates_on_its_way(world, trained, tmp_path):
    """The results are those of one device, up to rounding, as those of a sweep by `shard_map`."""
    config = world.config(parallel__devices=4, parallel__mapping="pmap", train__eval_every=5)
    api.train(config, tmp_path)
    assert any("eval/passed_for_99" in line for line in metrics(tmp_path))
    single = table(trained("shared"))
    for column in ("user_bce/watch", "teacher_kl/watch", "alignment_ratio"):
        np.testing.assert_allclose(table(tmp_path)[column], single[column], rtol=1e-3)


def test_a_state_that_is_not_finite_is_never_saved(world, tmp_path):
    config = world.config(
        optimizer__learning_rate=1e30, train__log_every=1000, train__checkpoint_every=4
    )
    with pytest.raises(UserError, match=r"loss stopped being finite at step \d+; try a"):
        api.train(config, tmp_path)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


@pytest.mark.parametrize("command", [api.train, api.train_teacher])
def test_a_last_update_that_is_not_finite_is_never_saved(world, tmp_path, command):
    """The loss was finite at the only step, and no later one would tell."""
    short = {}
    for prefix in ("", "teacher__"):
        short |= {f"{prefix}train__steps": 1, f"{prefix}optimizer__schedule": "constant"}
        short |= {f"{prefix}optimizer__learning_rate": 1e39}
    fault = fault_of(command, world.config(**short), tmp_path)
    assert "the loss stopped being finite at step 1" in fault
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


def test_the_funnels_own_k_and_the_criterions_target_are_always_reported(world):
    config = world.config(funnel__report_at=(10,), funnel__targets=(0.9,))
    assert job_of(config).report_at == ReportAt([10, config.funnel.passed], [0.9, TARGET])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("validation_requests", "data.validation_requests=0 must be greater than 0"),
        ("test_requests", "no requests for its split 'test'"),
    ],
)
def test_a_split_without_requests_is_one_line(world, tmp_path, key, message):
    config = world.config(**{f"data__{key}": 0}, data__dir=str(tmp_path))
    with pytest.raises(UserError, match=message):
        api.prepare(config)
    assert not [*tmp_path.glob("requests/*/*.*.*")]
