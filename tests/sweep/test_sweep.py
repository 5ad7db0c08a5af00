import collections
import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from kd_ranker.config import schema
from kd_ranker.configs import cascade
from kd_ranker.evaluation import results
from kd_ranker.sweep.memory import CohortSize
from kd_ranker.sweep.sweep import common, open_sweep, sweep_members
from kd_ranker.training.recipes import shared_part

DATASET = {"dataset": "small/0123456789ab"}


def config_of(data_seeds=(), **sweep):
    config = cascade("small")
    config.sweep.update(sweep)
    config.sweep.axes.batch.seed = tuple(data_seeds)
    return config


def planned(folder, size, config):
    size = CohortSize(size) if isinstance(size, int) else size
    return open_sweep(config, folder, DATASET).planned(size)


@given(size=st.integers(1, 12), seeds=st.integers(1, 3), data_seeds=st.integers(1, 3))
def test_every_member_is_in_one_cohort_of_its_order_and_none_is_too_large(
    tmp_path_factory, size, seeds, data_seeds
):
    config = config_of(range(data_seeds), seeds=tuple(range(seeds)))
    sweep = planned(tmp_path_factory.mktemp("sweep"), size, config)
    assert sorted(name for cohort in sweep.plan for name in cohort) == sorted(sweep.members)
    for cohort in sweep.cohorts:
        assert len({member.batch.seed for member in cohort.values()}) == 1
    for data_seed in range(data_seeds):
        sizes = [
            len(cohort)
            for cohort in sweep.cohorts
            if next(iter(cohort.values())).batch.seed == data_seed
        ]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-3 * seeds // size)


@given(blocks=st.integers(1, 4), devices=st.integers(2, 8), seeds=st.integers(1, 9))
def test_a_device_holds_no_more_members_of_a_cohort_than_fit(
    tmp_path_factory, blocks, devices, seeds
):
    """Three groups, of one member a seed, each spread over all devices."""
    config = config_of(seeds=tuple(range(seeds)))
    sweep = planned(tmp_path_factory.mktemp("sweep"), CohortSize(blocks, devices), config)
    assert sorted(name for cohort in sweep.plan for name in cohort) == sorted(sweep.members)
    for cohort in sweep.cohorts:
        groups = collections.Counter(map(shared_part, cohort.values()))
        assert sum(-(-number // devices) for number in groups.values()) <= blocks
    # No more cohorts than that takes.
    assert len(sweep.plan) == -(-3 * -(-seeds // devices) // blocks)


def test_ways_on_the_same_batches_share_a_cohort(tmp_path):
    ways = ("distill.mode=none", "distill.mode=aux distill.loss=topk:stage")
    config = config_of((0, 1), ways=ways)
    sweep = planned(tmp_path, 9, config)
    assert sweep.plan == [
        ["none-seed0", "aux-topk:stage-weight1.0-seed0"],
        ["none-seed0-data1", "aux-topk:stage-weight1.0-seed0-data1"],
    ]
    config = config_of((0, 1), ways=(*ways, "distill.mode=shared"))
    grown = planned(tmp_path, 9, config)
    assert grown.plan[:2] == sweep.plan
    assert grown.plan[2:] == [["shared-weight1.0-seed0"], ["shared-weight1.0-seed0-data1"]]


def test_what_is_added_leaves_the_cohorts_that_are_there_alone(tmp_path):
    before = planned(tmp_path, 2, config_of(weights=(1.0,)))
    after = planned(tmp_path, 8, config_of(weights=(1.0, 3.0)))
    assert after.plan[: len(before.plan)] == before.plan
    assert after.plan[len(before.plan) :] == [["aux-weight3.0-seed0", "shared-weight3.0-seed0"]]


def test_a_plan_is_read_as_it_was_written(tmp_path):
    fresh = open_sweep(config_of(), tmp_path, DATASET)
    assert (fresh.plan, fresh.is_complete()) == ([], False)
    started = planned(tmp_path, 2, config_of())
    read = open_sweep(config_of(), tmp_path, DATASET)
    assert dataclasses.replace(read, members={}) == dataclasses.replace(started, members={})
    assert planned(tmp_path, 5, config_of()).plan == started.plan


def test_whole_repeats_are_cohorts_of_their_own_teachers(tmp_path):
    config = config_of(seeds=(0, 7), whole_repeats=True)
    config.teacher.workdir = "runs/teacher"
    sweep = planned(tmp_path, 9, config)
    for seed, cohort in zip((0, 7), sweep.cohorts, strict=True):
        assert len(cohort) == 3
        assert {of.teacher.workdir for of in cohort.values()} == {f"runs/teacher/seed{seed}"}
        assert {member.seed for member in cohort.values()} == {seed}
        assert common(cohort).batch.seed == common(cohort).teacher.batch.seed == seed


def test_what_a_cohort_has_in_common_lacks_the_keys_in_which_its_members_may_differ():
    config = config_of(weights=(1.0, 3.0))
    config.sweep.axes.train.steps = (20, 50)
    config.sweep.axes.teacher.stage = ("passed", "retrieved")
    config.lock()  # as the entry points do
    members = sweep_members(config)
    of_stage = {name: m for name, m in members.items() if m.teacher.stage == "passed"}
    shared = common(of_stage)
    assert shared.train.steps == 50
    assert shared.teacher.stage == "passed"
    for key in schema.sweepable():
        section, _, last = key.name.rpartition(".")
        there = last in (schema.value_of(shared, section) if section else shared)
        assert there == (key.sweep == "cohorts" or key.name == "train.steps"), key.name
    # The members keep all.
    assert next(iter(of_stage.values())).distill.mode == "none"


def test_an_axis_that_a_sweep_is_extended_by_is_known_of_those_that_it_had(tmp_path):
    """Else a setting would be two: one of the repeats before, and one of those after."""
    planned(tmp_path, 8, config_of(modes=("shared",)))
    config = config_of(modes=("shared",), seeds=(0, 1))
    config.sweep.axes.distill.affine = (True, False)
    sweep = planned(tmp_path, 8, config)
    assert list(map(len, sweep.plan)) == [1, 3]
    passed = {True: 20.0, False: 30.0}
    told = {"split": "validation", "role": "student", "serve": "user", "non_finite_step": None}
    for cohort, folder in zip(sweep.cohorts, sweep.folders, strict=True):
        rows = [
            {
                **results.made_of(of),
                **told,
                "member": name,
                "passed_for_99": passed[of.distill.affine],
            }
            for name, of in cohort.items()
        ]
        names = ["member", "passed_for_99", *told, *results.SETTING, *results.REPEAT]
        names += results.OTHER_KEYS  # those that a sweep varies later too
        folder.mkdir(parents=True)
        (folder / results.FILE).write_text(results.to_csv(rows, list(dict.fromkeys(names))))
    students = results.with_labels(sweep.validation())
    assert dict(zip(students["member"], students["distill.affine"], strict=True)) == {
        name: member.distill.affine for name, member in sweep.members.items()
    }
    assert students.groupby("setting")["repeat"].nunique().tolist() == [2, 2]
    assert len(results.chosen(sweep.validation())) == 4
