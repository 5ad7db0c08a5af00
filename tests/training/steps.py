"""Configs, train_specs, stacks of runs, and the steps that they take on random batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from kd_ranker.batch import Stage
from kd_ranker.configs import cascade
from kd_ranker.distillation.losses import LossNumbers
from kd_ranker.distillation.modes import MODES
from kd_ranker.distillation.terms import Term
from kd_ranker.embedding.row_optimizers import ROW_OPTIMIZERS
from kd_ranker.models.student import MultiInterest
from kd_ranker.models.teacher import FinalRanker
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.optimizers import OPTIMIZERS
from kd_ranker.training.state import (
    Constants,
    Hyperparameters,
    LiveTeacher,
    OptimizerHyperparameters,
    TrainSpec,
    init_state,
    select_run,
    stack_runs,
)
from kd_ranker.training.step import make_step, one_step
from tests.random_batches import SPEC, STUDENT, TEACHER, make_model, model_and_init, random_items


def config_of(**changes):
    """The small cascade's config; `train__steps=3` changes `train.steps`."""
    config = cascade("small")
    config.student.update({"width": 8, "interests": 2, "hidden": (16,)})
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return config


@functools.cache
def world_of(spec):
    """A live teacher, and the constants arrays that a step reads."""
    model, parameters = make_model(FinalRanker, len(spec.tasks), TEACHER, seed=1, spec=spec)
    return LiveTeacher(model, Stage.RETRIEVED), Constants(random_items(spec=spec), parameters)


def model_of(mode, spec, student, slots=0):
    heads = MODES[mode].heads_per_task * len(spec.tasks)
    return model_and_init(student, heads, FrozenConfigDict(STUDENT), spec, slots)


@functools.cache
def train_spec_of(mode, optimizer, spec, student=MultiInterest):
    return TrainSpec(
        model=model_of(mode, spec, student)[0],
        mode=MODES[mode],
        optimizer=OPTIMIZERS[optimizer](),
        row_optimizer=ROW_OPTIMIZERS[optimizer],
        schedule=lambda step, steps: jnp.ones_like(steps),
    )


PROGRAMS = {}


def program_of(train_specs, teacher, mapping, devices):
    """One mapped step for all tests that want it: it compiles once for each number of runs."""
    key = (*map(id, train_specs), id(teacher), mapping, devices)
    if key not in PROGRAMS:
        spread = MAPPINGS[mapping](jax.devices()[:devices])
        PROGRAMS[key] = spread, spread.map_step(one_step(make_step(train_specs, teacher)))
    return PROGRAMS[key]


def make_train_spec(mode="shared", optimizer="adam", seeds=(0,), spec=SPEC, student=MultiInterest):
    """A train_spec, and the state of a stack with one run per seed."""
    train_spec = train_spec_of(mode, optimizer, spec, student)
    return train_spec, state_of(mode, optimizer, spec, student, tuple(seeds))


@functools.cache
def state_of(mode, optimizer, spec, student, seeds):
    train_spec = train_spec_of(mode, optimizer, spec, student)
    _, init = model_of(mode, spec, student, train_spec.row_optimizer.slots(STUDENT.width))
    parameters_of_runs = [init(jax.random.key(seed)) for seed in seeds]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *parameters_of_runs)

    def initial_state(parameters):
        return init_state(train_spec, parameters, len(spec.tasks), True)

    return jax.jit(initial_state)(stacked)  # in one program, not one per array


def hyperparameters(temperature=1.0, top_k=2.0, **changes):
    numbers = {
        "user_weight": 1.0,
        "distill_weight": 0.7,
        "terms": (Term("bce"),),
        "learning_rate": 0.01,
        "table_learning_rate": 0.02,
        "weight_decay": 0.1,
        "table_weight_decay": 0.1,
        "steps": 1000,
        "unshown_weight": 0.0,
        "unshown_margin": 0.0,
    } | changes
    optimizer = OptimizerHyperparameters(
        *(numbers.pop(name) for name in OptimizerHyperparameters._fields)
    )
    loss_numbers = LossNumbers(temperature, top_k)
    return jax.tree.map(
        jnp.float32, Hyperparameters(loss_numbers=loss_numbers, optimizer=optimizer, **numbers)
    )


def run_stacks(
    train_specs, states, batches, numbers, mapping="pmap", devices=1, live=False, spec=SPEC
):
    """The states after a step on each batch, and the losses of the last, per stack"""
    if live:
        teacher, constants = world_of(spec)
    else:
        teacher = None
        constants = Constants(random_items(spec=spec), None)
    spread, step = program_of(tuple(train_specs), teacher, mapping, devices)
    states = spread.place(tuple(states))
    constants = spread.place(constants)
    for batch in batches:
        states, losses = step(states, spread.shard(batch), tuple(numbers), constants)
    return jax.tree.map(np.asarray, spread.unreplicate((states, losses)))


def train(train_spec, state, batches, numbers=None, **how):
    """`run_stacks` of one stack of one run, without the axis of runs."""
    numbers = stack_runs([numbers or hyperparameters()])
    (state,), (losses,) = run_stacks([train_spec], [state], batches, [numbers], **how)
    return run_of(state), select_run(losses, 0)


def run_of(state, run=0):
    """A run's state without the axis of runs, and without fields of no meaning."""
    own = select_run(state.replace(step=None, unknown_ids=None, owners=None), run)
    return own.replace(step=state.step, unknown_ids=state.unknown_ids)


def lowered(train_spec, state, batch, constants, teacher=None, devices=1):
    """The program of a step that measures nothing, before XLA compiles it."""
    step = make_step([train_spec], teacher)

    def take(*arguments):
        (stack,) = step.take(*arguments)
        return (stack.state,), (stack.losses,)

    mapped = MAPPINGS["shard_map"](jax.devices()[:devices]).map_step(take)
    numbers = stack_runs([hyperparameters()] * len(state.non_finite_step))
    return mapped.lower((state,), batch, (numbers,), constants)


def learned(state):
    """What training changes in a state."""
    return state.parameters, state.transform, state.optimizer_state


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(one, other, atol):
    def assert_leaves_close(leaf, other_leaf):
        np.testing.assert_allclose(leaf, other_leaf, atol=atol, rtol=0)

    jax.tree.map(assert_leaves_close, one, other)
