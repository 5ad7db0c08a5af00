"""Each value that is not finite, planted at one place, and the name that it gets.

A step is taken by the compiled program on one device or on eight that share tables. Then it is
named from the state that the program kept, and again from the files, outside of jit.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_ranker.debug import take_again
from kd_ranker.distillation.losses import DEFAULT_NUMBERS, LOSSES, USER_LOSSES, Loss, bce
from kd_ranker.models.model import Parameters
from kd_ranker.training import kept_steps, specs
from kd_ranker.training.divergence import report_diverged
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.program import (
    abstract_states,
    initial_states,
    make_program,
    states_on_host,
    step_for,
)
from kd_ranker.training.state import Constants
from kd_ranker.training.step import one_step
from tests.random_batches import SPEC, random_batch, random_items
from tests.training.steps import assert_equal, config_of

NAN = float("nan")
STEP = 3


def _bad_value(logits, probability, weight, numbers=DEFAULT_NUMBERS):
    numerator, denominator = bce(logits, probability, weight, numbers)
    return numerator * jnp.log(-jnp.ones(())), denominator


def _bad_gradient(logits, probability, weight, numbers=DEFAULT_NUMBERS):
    numerator, denominator = bce(logits, probability, weight, numbers)
    return numerator + 0 * jnp.sqrt(0 * logits).sum(axis=(0, 1)), denominator


@pytest.fixture(autouse=True)
def bad_losses(monkeypatch):
    monkeypatch.setitem(LOSSES, "bad_value", Loss(_bad_value))
    monkeypatch.setitem(LOSSES, "bad_gradient", Loss(_bad_gradient))
    monkeypatch.setitem(USER_LOSSES, "bad_user", {"bce": bce, "bad": _bad_value})


def place_of_candidate(batch, stage=1):
    """The first candidate of at least this stage."""
    return tuple(np.argwhere(batch.stage >= stage)[0].tolist())


class Plant:
    """A place for a value that is not finite, and what is to be said of it."""

    def __init__(self, expected, plant=None, overflows=False, **config):
        self.expected = expected
        self.overflows = overflows  # to an infinite value, which need not become a NaN
        self.plant = plant or (lambda batch, items, state: None)
        self.config = config


def user_feature(batch, items, state):
    batch.user_features[2, 1] = NAN


def context(batch, items, state):
    batch.context[5, 0] = np.inf


def candidate_feature(batch, items, state):
    batch.candidate_features[(*place_of_candidate(batch), 1)] = NAN


def item_feature(batch, items, state):
    items.features[batch.item_id[place_of_candidate(batch)], 0] = NAN


def label(batch, items, state):
    batch.user_label[(*place_of_candidate(batch, stage=3), 1)] = NAN


def label_weight(batch, items, state):
    batch.label_weight[place_of_candidate(batch, stage=3)] = np.inf


def teacher_score(batch, items, state):
    batch.teacher_weight[0, 0, 2] = 1
    batch.teacher_probability[0, 0, 2] = NAN


def row(table, value=NAN):
    def plant(batch, items, state):
        id_of = {"user": batch.user_id[0], "item": batch.item_id[place_of_candidate(batch)]}
        state.parameters.tables[table][id_of[table], 0] = value

    return plant


def parameter(name, value=NAN):
    def plant(batch, items, state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.parameters.dense):
            if name in jax.tree_util.keystr(path, simple=True, separator="."):
                leaf[...] = value
                return
        raise AssertionError(name)

    return plant


def transform(name):
    def plant(batch, items, state):
        state.transform[name][1] = NAN

    return plant


PLANTS = {
    "user feature": Plant("the feature user_features at request 2, column 1", user_feature),
    "context": Plant("the feature context at request 5, column 0", context),
    "candidate feature": Plant("the feature candidate_features at request", candidate_feature),
    "item feature": Plant("the feature item_features at request", item_feature),
    "label": Plant("the user label at request", label),
    "label weight": Plant("the label weight at request", label_weight),
    "teacher": Plant(
        "the teacher's probability at request 0, candidate 0, task share", teacher_score
    ),
    "row of a user": Plant("the row of the table user at request 0, id", row("user")),
    "row of an item": Plant("the row of the table item at request", row("item")),
    "infinite row": Plant("the row of the table item at request", row("item", np.inf)),
    "kernel": Plant("the dense parameter user.layers.0.kernel", parameter("user.layers.0.kernel")),
    "bias": Plant("the dense parameter heads.bias", parameter("heads.bias")),
    "scale": Plant("the transform's scale", transform("scale")),
    "offset": Plant("the transform's offset", transform("offset")),
    # Finite values, of which a product is not.
    "large row": Plant("the user logits at request", row("item", 3e38)),
    "large kernel": Plant("the user logits at request 0", parameter("heads.kernel", 3e38)),
    "term": Plant(
        "the term bad_value of the distillation loss", distill__loss="bce + 0.5 * bad_value"
    ),
    "only term": Plant("the distillation loss", distill__loss="bad_value"),
    "term of stages": Plant(
        "the term bad_value:stage of the distillation loss", distill__loss="bce + bad_value:stage"
    ),
    "user term": Plant("the term bad of the user loss", train__user_loss="bad_user"),
    "gradient": Plant("the gradient of the dense parameter", distill__loss="bad_gradient"),
    "weight": Plant("the loss", distill__weight=3e38, distill__loss="bce + 1e30 * mse_logit"),
}


@functools.cache
def program_of(devices, changes):
    """The program of a run with these changes of its config, and of a healthy one; first states."""
    sharded = MAPPINGS["shard_map"](jax.devices()[:devices], sharded=devices > 1)
    runs = {
        "healthy": config_of(distill__mode="shared"),
        "bad": config_of(distill__mode="shared", **dict(changes)),
    }
    constants = Constants(random_items(), None)
    program = make_program(specs.student_stacks(runs, SPEC), None, None, constants, sharded)
    step = one_step(step_for(program.stacks, None, program.devices))
    program = program._replace(take=sharded.map_step(step, abstract_states(program.filled)))
    return program, states_on_host(program, initial_states(program))


def step_with(plant, program, first):
    """Take a step of a program with a planted value.

    Return the program with its items, the batch, and the states before and after on the host and on
    the devices.
    """
    batch = random_batch(0)
    items = jax.tree.map(np.array, random_items())
    before = [jax.tree.map(np.array, state) for state in first]
    before = [dataclasses.replace(state, step=np.int32(STEP - 1)) for state in before]
    plant.plant(batch, items, bad_run(program, before))
    items_on_devices = program.devices.place(Constants(items, None)).items
    items_on_devices = items_on_devices.replace(row_sharding=program.devices.row_sharding)
    program = program._replace(constants=Constants(items_on_devices, None))
    after, _ = program.take(
        program.devices.place(tuple(before)),
        program.devices.shard(batch),
        program.hyperparameters,
        program.constants,
    )
    return program, batch, items, before, after


def bad_run(program, states):
    """What the bad run has learned, as views of the states on the host."""
    stack, state = next(
        (stack, state)
        for stack, state in zip(program.stacks, states, strict=True)
        if "bad" in stack.names
    )
    index = stack.names.index("bad")

    def view(leaf):
        return leaf[index]

    return Run(
        stack,
        jax.tree.map(view, state.parameters),
        jax.tree.map(view, state.transform),
        jax.tree.map(view, state.optimizer_state),
    )


class Run(NamedTuple):
    stack: specs.Stack
    parameters: Parameters
    transform: dict
    optimizer_state: Any


SOME = {"item feature", "large kernel", "term of stages", "gradient", "row of an item"}
CASES = [
    pytest.param(devices, plant, id=f"{name}, {devices} devices", marks=marks)
    for name, plant in PLANTS.items()
    for devices in (1, 8)
    for marks in ([pytest.mark.long] if devices == 8 and name not in SOME else [],)
]


@pytest.mark.parametrize(("devices", "plant"), CASES)
def test_a_value_is_named_kept_and_found_again(devices, plant, monkeypatch, tmp_path, caplog):
    program, first = program_of(devices, tuple(plant.config.items()))
    program, batch, items, before, after = step_with(plant, program, first)
    monkeypatch.setattr(kept_steps, "_batch_of_step", lambda program, step: batch)

    steps = report_diverged(program, after, tmp_path, before=())

    assert steps["bad"] == STEP
    assert f"the first value that is not is {plant.expected}" in caplog.text
    # The run keeps what it was before that step.
    kept = bad_run(program, jax.tree.map(np.asarray, states_on_host(program, after)))
    assert_equal(kept[1:], bad_run(program, before)[1:])

    inputs = kept_steps.read(tmp_path, STEP, "bad", kept.stack)
    again = take_again(kept.stack, "bad", inputs, items)

    assert again.first.startswith(plant.expected)
    assert again.error is not None or plant.overflows


def test_without_a_new_run_that_diverged_no_state_is_copied(monkeypatch, tmp_path):
    program, first = program_of(1, ())
    states = program.devices.place(first)
    monkeypatch.delattr(kept_steps, "states_on_host")

    assert report_diverged(program, states, tmp_path, before=()) == {}


def test_a_step_that_cannot_be_kept_ends_no_run(monkeypatch, tmp_path, caplog):
    program, first = program_of(1, ())
    program, batch, _, _, after = step_with(PLANTS["kernel"], program, first)
    monkeypatch.setattr(kept_steps, "_batch_of_step", lambda program, step: batch)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(kept_steps, "write_atomically", fail)

    assert report_diverged(program, after, tmp_path, before=()) == {"bad": STEP}
    assert (
        "step 3; that step could not be kept (OSError: no space left); try a smaller learning "
        "rate. The others continue" in caplog.text
    )


def test_a_run_that_resumes_keeps_what_was_found_before(monkeypatch, tmp_path, caplog):
    program, first = program_of(1, ())
    program, batch, _, _, after = step_with(PLANTS["kernel"], program, first)
    monkeypatch.setattr(kept_steps, "_batch_of_step", lambda program, step: batch)
    report_diverged(program, after, tmp_path, before=())
    found = caplog.text.splitlines()[-1]
    monkeypatch.delattr(kept_steps, "first_non_finite")

    report_diverged(program, after, tmp_path, before=())

    assert caplog.text.splitlines()[-1] == found
