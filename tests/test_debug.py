"""A step that is kept when a run stops being finite, and taken once more from its files."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import kd_ranker as kd
from kd_ranker import api
from kd_ranker.batches.cutting import unpack
from kd_ranker.distillation.losses import DEFAULT_NUMBERS, LOSSES, Loss, bce
from kd_ranker.errors import UserError
from kd_ranker.pipeline import job
from kd_ranker.pipeline.job import open_job
from kd_ranker.pipeline.trained import load_teacher
from kd_ranker.pipeline.training import prepare_program
from kd_ranker.training import kept_steps


def _logarithm_of_small_ones(logits, probability, weight, numbers=DEFAULT_NUMBERS):
    """A loss with a mistake: it is not finite for batches with a probability near 0."""
    numerator, denominator = bce(logits, probability, weight, numbers)
    least = np.inf if weight.size == 0 else jax.numpy.where(weight > 0, probability, 1).min()
    return numerator + jax.numpy.log(jax.numpy.where(least < 2e-3, -1.0, 1.0)), denominator


@pytest.fixture
def mistake(monkeypatch):
    monkeypatch.setitem(LOSSES, "mistake", Loss(_logarithm_of_small_ones))


def test_a_run_that_diverges_is_kept_and_replayed(world, tmp_path):
    config = world.config(train__steps=20, optimizer__learning_rate=1e30, train__log_every=100)
    with pytest.raises(UserError) as raised:
        api.train(config, tmp_path)
    message = str(raised.value)
    step = int(re.search(r"at step (\d+)", message).group(1))

    again = kd.debug.replay(tmp_path, step)

    assert again.first
    assert f"is {again.first}; try a smaller learning rate" in message
    assert f"in nan/step_{step}, for kd.debug.replay" in message
    assert again.inputs.step == step


def test_a_member_of_a_sweep_is_replayed_at_the_line_of_its_loss(world, tmp_path, mistake):
    config = world.config(
        sweep__modes=("none", "shared"), distill__loss="bce + mistake", train__steps=30
    )
    api.sweep(config, tmp_path)

    again = kd.debug.replay(tmp_path)

    assert again.first == "the term mistake of the distillation loss"
    assert "jax.numpy.log(" in str(again)
    weights = again.inputs.batch.teacher_weight
    assert again.inputs.batch.teacher_probability[weights > 0].min() < 2e-3


def test_a_live_teacher_that_is_not_finite_is_named(world, tmp_path, monkeypatch):
    def broken(config):
        teacher = load_teacher(config)
        parameters = teacher.ranker.parameters
        dense = jax.tree.map(lambda leaf: leaf.at[...].set(np.nan), parameters.dense)
        ranker = teacher.ranker._replace(parameters=dataclasses.replace(parameters, dense=dense))
        return teacher._replace(ranker=ranker)

    monkeypatch.setattr(job, "load_teacher", broken)
    with pytest.raises(UserError, match=r"the teacher's probability at request .*mend the teacher"):
        api.train(world.config(distill__mode="aux", train__steps=4), tmp_path)
    again = kd.debug.replay(tmp_path)
    assert again.first.startswith("the teacher's probability at request")


def test_a_step_that_no_run_keeps_is_one_line(world, tmp_path):
    with pytest.raises(UserError, match="keeps no step: none of its runs"):
        kd.debug.replay(world.student("none"), 3)


@pytest.mark.parametrize(
    "parallel",
    [{"devices": 1}, {"devices": 4}, {"devices": 4, "mapping": "shard_map", "tables": "sharded"}],
    ids=str,
)
def test_the_batch_of_a_step_is_made_again(world, parallel):
    changes = {f"parallel__{key}": value for key, value in parallel.items()}
    config = world.config(**changes)
    program = prepare_program(open_job(config, {"": config}))
    one = prepare_program(open_job(world.config(), {"": world.config()}))
    for _ in range(70):  # over the border of a block
        packed, span = one.batches.take(1)
    expected = jax.device_get(jax.jit(unpack)(one.devices.whole_batch(packed), span.start))
    program.batches.take(3)
    position = program.batches.get_state()

    batch = kept_steps._batch_of_step(program, 70)

    for field in dataclasses.fields(batch):
        np.testing.assert_array_equal(getattr(batch, field.name), getattr(expected, field.name))
    assert program.batches.get_state() == position
