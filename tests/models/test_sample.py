"""The student `multi_interest` in its three modes against the method's published sample.

The sample's formulas in NumPy over rows (a user and an item): the sum over rows and heads of the
binary cross entropy, and central differences of it in place of gradients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from kd_ranker.batch import Stage
from kd_ranker.distillation.modes import MODES
from kd_ranker.models.model import Parameters
from tests.random_batches import SPEC as ANY_SPEC
from tests.random_batches import STUDENT, logits_of, random_batch, random_items
from tests.training.steps import hyperparameters, make_train_spec, run_of, train

SPEC = dataclasses.replace(ANY_SPEC, tasks=("watch", "like"), num_users=4, num_items=6)
USERS, CANDIDATES, TASKS, FEATURES = 4, 3, len(SPEC.tasks), SPEC.user_features
WIDTH, INTERESTS = STUDENT.width, STUDENT.interests
ROWS = USERS * CANDIDATES
# The sample has no context, no features of candidates, and no weights. A user's row is 0 below.
ANY_BATCH = random_batch(0, USERS, CANDIDATES, SPEC)
BATCH = ANY_BATCH.replace(
    context=np.zeros_like(ANY_BATCH.context),
    candidate_features=np.zeros_like(ANY_BATCH.candidate_features),
    stage=np.full_like(ANY_BATCH.stage, Stage.SHOWN),
    label_weight=np.ones_like(ANY_BATCH.label_weight),
    teacher_weight=np.ones_like(ANY_BATCH.teacher_weight),
)
LABEL = BATCH.user_label.reshape(ROWS, TASKS).astype(float)
TAUGHT = BATCH.teacher_probability.reshape(ROWS, TASKS).astype(float)


def cross_entropy(logit, label):
    """−y log σ(z) − (1 − y) log(1 − σ(z))."""
    return np.logaddexp(0, logit) - label * logit


def sample_logits(arrays):
    """The logits [rows, heads], whatever they are for."""
    features = np.repeat(BATCH.user_features.astype(float), CANDIDATES, axis=0)
    hidden = np.maximum(features @ arrays["w1"] + arrays["b1"], 0)
    interests = (hidden @ arrays["w2"] + arrays["b2"]).reshape(ROWS, INTERESTS, WIDTH)
    item = arrays["items"][BATCH.item_id.ravel()]
    match = np.einsum("riw,rw->ri", interests, item)
    combined = np.einsum("ri,riw->rw", softmax(match, axis=1), interests)
    return np.concatenate([combined, item, match], axis=1) @ arrays["w3"] + arrays["b3"]


def sample_loss(mode, arrays):
    """The sum over rows and heads."""
    logits = sample_logits(arrays)
    if mode == "none":
        return cross_entropy(logits, LABEL).sum()
    if mode == "shared":
        transformed = arrays["scale"] * logits + arrays["offset"]
        logits = np.concatenate([logits, transformed], axis=1)
    return cross_entropy(logits, np.concatenate([LABEL, TAUGHT], axis=1)).sum()


def central_differences(function, arrays, step=1e-5):
    """The gradient of a function of arrays by name, one number at a time."""
    gradients = {name: np.zeros_like(array) for name, array in arrays.items()}

    def moved(name, place, distance):
        array = arrays[name].copy()
        array[place] += distance
        return function(arrays | {name: array})

    for name, gradient in gradients.items():
        for place in np.ndindex(gradient.shape):
            difference = moved(name, place, step) - moved(name, place, -step)
            gradient[place] = difference / (2 * step)
    return gradients


def by_name(state):
    """A student's parameters, or their gradients, under the names that the sample gives them."""
    dense = state.parameters.dense
    layers = dense["user"]["layers"]
    arrays = {
        # The first rows of the kernel meet the user's row, the last ones the context.
        "w1": layers[0]["kernel"][...][WIDTH : WIDTH + FEATURES],
        "b1": layers[0]["bias"][...],
        "w2": layers[1]["kernel"][...],
        "b2": layers[1]["bias"][...],
        "items": state.parameters.tables["item"][: SPEC.num_items, :WIDTH],
        "w3": dense["heads"]["kernel"][...],
        "b3": dense["heads"]["bias"][...],
        **state.transform,
    }
    return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


def student(mode):
    """A student that has what the sample has, with no bias of 0 and a transform that does some."""
    train_spec, state = make_train_spec(mode, "sgd", spec=SPEC)
    generator = np.random.default_rng(1)
    dense, item = jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape) / 2, jnp.float32),
        (state.parameters.dense, state.parameters.tables["item"]),
    )
    item_layer = dense["item"]["features"]
    for name in ("kernel", "bias"):
        item_layer[name][...] = jnp.zeros_like(item_layer[name][...])
    item = item.at[..., WIDTH].set(1)  # as if training had met it
    tables = {"user": jnp.zeros_like(state.parameters.tables["user"]), "item": item}
    if state.transform:
        transform = {"scale": jnp.array([[0.7, 1.4]]), "offset": jnp.array([[-0.5, 0.3]])}
        state = state.replace(transform=transform)
    return train_spec, state.replace(parameters=Parameters(dense, tables))


@pytest.mark.parametrize("mode", MODES)
def test_logits_loss_and_gradients_are_those_of_the_sample(mode):
    train_spec, state = student(mode)
    before = run_of(state)
    arrays = by_name(before)
    logits = logits_of(train_spec.model, before.parameters, BATCH, random_items(spec=SPEC))
    np.testing.assert_allclose(logits.reshape(ROWS, -1), sample_logits(arrays), atol=1e-5)

    # A step of plain descent at a rate of 1 goes down by the gradient.
    rates = dict(learning_rate=1, table_learning_rate=1, weight_decay=0, table_weight_decay=0)
    numbers = hyperparameters(distill_weight=1, **rates)
    after, losses = train(train_spec, state, [BATCH], numbers, spec=SPEC)
    # The project's losses are means over rows and over tasks, the sample's are sums.
    summed = ROWS * TASKS
    np.testing.assert_allclose(losses["loss"] * summed, sample_loss(mode, arrays), rtol=1e-6)
    moved = by_name(after)
    gradients = central_differences(functools.partial(sample_loss, mode), arrays)
    assert moved.keys() == gradients.keys()
    for name, gradient in gradients.items():
        found = (arrays[name] - moved[name]) * summed
        np.testing.assert_allclose(found, gradient, atol=5e-5, err_msg=name)
        assert np.abs(gradient).max() > 0.05
