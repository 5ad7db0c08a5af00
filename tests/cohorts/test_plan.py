import collections
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_ranker.cohorts.plan import open_sweep
from kd_ranker.config import schema
from kd_ranker.config.runs import common, list_runs, sweep_runs
from kd_ranker.evaluation import results, setting_names
from tests.faults import fault_of
from tests.sweeps import config_of

DATASET = {"dataset": "small/0123456789ab"}


def value_in(runs, key):
    return [schema.value_of(run, key) for run in runs.values()]


def planned(folder, size, config):
    return open_sweep(config, folder, DATASET).planned(size)


@given(size=st.integers(1, 12), seeds=st.integers(1, 3), data_seeds=st.integers(1, 3))
def test_every_run_is_in_one_cohort_and_none_is_too_large(
    tmp_path_factory, size, seeds, data_seeds
):
    config = config_of({"batch.seed": tuple(range(data_seeds))}, seeds=tuple(range(seeds)))
    sweep = planned(tmp_path_factory.mktemp("sweep"), size, config)
    assert sorted(name for cohort in sweep.plan for name in cohort) == sorted(sweep.runs)
    sizes = collections.defaultdict(list)
    for cohort in sweep.cohorts:
        (data_seed,) = {*value_in(cohort, "batch.seed")}
        sizes[data_seed].append(len(cohort))
    assert len(sizes) == data_seeds
    for of_seed in sizes.values():
        assert max(of_seed) <= size
        assert max(of_seed) - min(of_seed) <= 1
        assert len(of_seed) == -(-3 * seeds // size)


def test_runs_on_the_same_batches_share_a_cohort(tmp_path):
    listed = [{"distill.mode": "none"}, {"distill.mode": "aux", "distill.loss": "topk:stage"}]
    config = config_of({"batch.seed": (0, 1)}, runs=list_runs(listed))
    sweep = planned(tmp_path, 9, config)
    assert sweep.plan == [
        ["none-seed0", "aux-topk:stage-weight1.0-seed0"],
        ["none-seed0-data1", "aux-topk:stage-weight1.0-seed0-data1"],
    ]
    config = config_of(
        {"batch.seed": (0, 1)}, runs=list_runs([*listed, {"distill.mode": "shared"}])
    )
    grown = planned(tmp_path, 9, config)
    assert grown.plan[:2] == sweep.plan
    assert grown.plan[2:] == [["shared-weight1.0-seed0"], ["shared-weight1.0-seed0-data1"]]


def test_a_plan_is_read_as_it_was_written(tmp_path):
    fresh = open_sweep(config_of(), tmp_path, DATASET)
    assert (fresh.plan, fresh.is_complete()) == ([], False)
    started = planned(tmp_path, 2, config_of())
    read = open_sweep(config_of(), tmp_path, DATASET)
    assert dataclasses.replace(read, runs={}) == dataclasses.replace(started, runs={})
    assert planned(tmp_path, 5, config_of()).plan == started.plan


@pytest.mark.parametrize(
    "plan", ["{}", '{"cohorts": 5}', '{"cohorts": ["a"]}', '{"cohorts": [[]]}']
)
def test_a_damaged_plan_is_one_line(tmp_path, plan):
    (tmp_path / "cohorts.json").write_text(plan)
    fault = fault_of(open_sweep, config_of(), tmp_path, DATASET)
    assert fault.startswith(f"{tmp_path / 'cohorts.json'} is damaged: ")


def test_whole_repeats_are_cohorts_of_their_own_teachers(tmp_path):
    config = config_of(seeds=(0, 7), whole_repeats=True)
    config.teacher.workdir = "runs/teacher"
    sweep = planned(tmp_path, 9, config)
    for seed, cohort in zip((0, 7), sweep.cohorts, strict=True):
        assert len(cohort) == 3
        assert {*value_in(cohort, "teacher.workdir")} == {f"runs/teacher/seed{seed}"}
        assert {*value_in(cohort, "seed")} == {seed}
        assert common(cohort).batch.seed == common(cohort).teacher.batch.seed == seed


def test_a_cohorts_common_config_lacks_what_runs_may_vary():
    axes = {"train.steps": (20, 50), "teacher.stage": ("passed", "retrieved")}
    config = config_of(axes, weights=(1.0, 3.0))
    config.lock()  # as the entry points do
    runs = sweep_runs(config).items()
    of_stage = {name: run for name, run in runs if run.teacher.stage == "passed"}
    shared = common(of_stage)
    assert (shared.train.steps, shared.teacher.stage) == (50, "passed")
    for key in schema.sweepable():
        section, _, last = key.name.rpartition(".")
        is_common = last in (schema.value_of(shared, section) if section else shared)
        assert is_common == (key.sweep == "cohorts" or key.name == "train.steps"), key.name
    # The runs keep all.
    assert next(iter(of_stage.values())).distill.mode == "none"


def test_a_new_axis_has_its_default_in_the_older_runs(tmp_path):
    """Else a setting would be two: one of the repeats before, and one of those after."""
    planned(tmp_path, 8, config_of(modes=("shared",)))
    axes = {"distill.affine": (True, False)}
    sweep = planned(tmp_path, 8, config_of(axes, modes=("shared",), seeds=(0, 1)))
    assert list(map(len, sweep.plan)) == [1, 3]
    passed = {True: 20.0, False: 30.0}
    told = {"split": "validation", "role": "student", "serve": "user", "non_finite_step": None}
    names = ["run", "passed_for_99", *told, *setting_names.SETTING, *setting_names.REPEAT]
    names += setting_names.OTHER_KEYS  # those that a sweep varies later too
    for cohort, folder in zip(sweep.cohorts, sweep.folders, strict=True):
        rows = [
            setting_names.setting_of(run)
            | told
            | {"run": name, "passed_for_99": passed[run.distill.affine]}
            for name, run in cohort.items()
        ]
        folder.mkdir(parents=True)
        (folder / results.FILE).write_text(results.to_csv(rows, list(dict.fromkeys(names))))
    students = setting_names.with_labels(sweep.validation())
    affine = [sweep.runs[name].distill.affine for name in students["run"]]
    assert students["distill.affine"].tolist() == affine
    assert students.groupby("setting")["repeat"].nunique().tolist() == [2, 2]
    assert len(setting_names.chosen(sweep.validation())) == 4
