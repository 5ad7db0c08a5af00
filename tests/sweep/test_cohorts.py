import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import cascade
from kd_ranker.batch import empty_batch
from kd_ranker.errors import UserError
from kd_ranker.sweep import cohorts
from kd_ranker.sweep.members import sweep_members
from kd_ranker.training import recipes
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.step import Frozen, make_step
from tests.random_batches import CATEGORY_SPEC, SPEC, random_items


def members_of(data_seeds=(), **sweep):
    config = cascade.get_config("small")
    config.sweep.update(sweep)
    config.sweep.axes.batch.seed = tuple(data_seeds)
    return sweep_members(config)


@given(size=st.integers(1, 12), seeds=st.integers(1, 3), data_seeds=st.integers(1, 3))
def test_every_member_is_in_one_cohort_of_its_order_and_none_is_too_large(size, seeds, data_seeds):
    members = members_of(range(data_seeds), seeds=tuple(range(seeds)))
    planned = cohorts.add_members([], members, size)
    assert sorted(name for cohort in planned for name in cohort) == sorted(members)
    for cohort in planned:
        assert len({members[name].batch.seed for name in cohort}) == 1
    for data_seed in range(data_seeds):
        sizes = [len(c) for c in planned if members[c[0]].batch.seed == data_seed]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-3 * seeds // size)


def test_what_is_added_leaves_the_cohorts_that_are_there_alone():
    before = cohorts.add_members([], members_of(weights=(1.0,)), 2)
    after = cohorts.add_members(before, members_of(weights=(1.0, 3.0)), 8)
    assert after[: len(before)] == before
    assert after[len(before) :] == [["aux-weight3.0-seed0", "shared-weight3.0-seed0"]]


def test_a_plan_is_read_as_it_was_written_and_belongs_to_its_teacher(tmp_path):
    assert cohorts.read_cohorts(tmp_path) == []
    cohorts.check_teacher(tmp_path, "any")
    cohorts.write_cohorts(tmp_path, [["a", "b"], ["c"]], "first")
    assert cohorts.read_cohorts(tmp_path) == [["a", "b"], ["c"]]
    cohorts.check_teacher(tmp_path, "first")
    with pytest.raises(UserError, match="under the teacher first, and now it is second"):
        cohorts.check_teacher(tmp_path, "second")


def test_the_config_says_how_many_train_together_or_else_the_memory_does(monkeypatch):
    config = cascade.get_config("small")
    config.sweep.group_size = 3
    assert cohorts.cohort_size(config, [config], SPEC) == 3
    config.sweep.group_size = 0
    wide = config.copy_and_resolve_references()
    wide.distill.mode = "aux"
    one = cohorts.member_bytes(wide, SPEC)
    assert one > cohorts.member_bytes(config, SPEC)
    pairwise = wide.copy_and_resolve_references()
    pairwise.distill.loss = "ranknet"
    with_pairs = cohorts.member_bytes(pairwise, SPEC)
    assert with_pairs > one
    monkeypatch.setattr(cohorts, "free_memory", lambda _: 8 * with_pairs)
    assert cohorts.cohort_size(config, [pairwise, wide, config], SPEC) == 4
    for free, fit in ((0, 1), (one, 1), (20 * one, 10), (20.5 * one, 10)):
        monkeypatch.setattr(cohorts, "free_memory", lambda _, free=free: free)
        assert cohorts.cohort_size(config, [config, wide], SPEC) == fit


def test_free_memory_is_that_of_the_machine_on_a_cpu():
    config = cascade.get_config("small")
    config.parallel.devices = 1
    whole = cohorts.free_memory(config)
    assert 10**6 < whole < 10**13
    config.parallel.devices = 4
    assert cohorts.free_memory(config) < whole / 3


@pytest.mark.parametrize(
    ("mode", "loss", "spec"),
    [
        ("aux", "bce", SPEC),
        ("shared", "bce", SPEC),
        ("shared", "lambda", SPEC),
        ("shared", "bce", CATEGORY_SPEC),
    ],
    ids=["aux", "shared", "shared-lambda", "shared-categories"],
)
def test_the_estimate_of_a_members_memory_covers_the_compiled_program(mode, loss, spec):
    """Against XLA's own account, at sizes where the arrays matter and not the overhead."""
    config = cascade.get_config("small")
    config.distill.update({"mode": mode, "loss": loss})
    config.student.update({"width": 32, "interests": 4, "hidden": (64,)})
    config.batch.update({"requests": 32, "candidates": 128})

    def program_bytes(members):
        groups = recipes.student_groups({str(m): config for m in range(members)}, spec)
        batch = jax.tree.map(np.asarray, empty_batch(spec, 32, 128))
        step = MAPPINGS["shard_map"](jax.devices()[:1]).map_step(
            make_step([group.recipe for group in groups])
        )
        arguments = (
            jax.eval_shape(lambda: tuple(group.init() for group in groups)),
            batch,
            tuple(group.numbers for group in groups),
            Frozen(random_items(spec=spec), None),
        )
        account = step.lower(*arguments).compile().memory_analysis()
        return account.temp_size_in_bytes + account.argument_size_in_bytes

    a_member = (program_bytes(6) - program_bytes(2)) / 4
    estimate = cohorts.member_bytes(config, spec)
    assert a_member < estimate < 8 * a_member
