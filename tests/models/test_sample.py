"""The student `multi_interest` in its three modes against the method's published sample.

The sample's formulas in NumPy, a row (a user and an item) at a time: the sum over rows and heads of
the binary cross entropy, and central differences of it in place of gradients.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from kd_ranker.batch import Stage, empty_batch
from kd_ranker.distillation.losses import DEFAULT_NUMBERS
from kd_ranker.distillation.modes import MODES
from kd_ranker.embedding.row_optimizers import ROW_OPTIMIZERS
from kd_ranker.models.model import Parameters, build_model, score
from kd_ranker.models.student import MultiInterest
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.recipes import OPTIMIZERS
from kd_ranker.training.state import (
    Frozen,
    Hyperparameters,
    OptimizerNumbers,
    Recipe,
    Term,
    init_state,
    stack_members,
)
from kd_ranker.training.step import make_step
from tests.random_batches import SPEC as ANY_SPEC
from tests.random_batches import random_items

USERS, ITEMS, TASKS, FEATURES, HIDDEN, WIDTH, INTERESTS = 4, 6, 2, 5, 3, 4, 3
CANDIDATES = 3
ROWS = USERS * CANDIDATES
SPEC = dataclasses.replace(
    ANY_SPEC, tasks=("watch", "like"), num_users=USERS, num_items=ITEMS, user_features=FEATURES
)
CONFIG = ConfigDict(
    {
        "width": WIDTH,
        "interests": INTERESTS,
        "hidden": (HIDDEN,),
        "history": "none",
        "table_scale": 0.3,
        "user_rows": 0,
        "item_rows": 0,
        "category_rows": 0,
        "compute_dtype": "float32",
    }
)
GENERATOR = np.random.default_rng(0)
LABEL = GENERATOR.integers(0, 2, (USERS, CANDIDATES, TASKS)).astype(np.float32)
TAUGHT = GENERATOR.random((USERS, CANDIDATES, TASKS), dtype=np.float32)
# What the sample lacks is 0: context, and features of candidates. A user's row is 0 below.
BATCH = empty_batch(SPEC, USERS, CANDIDATES).replace(
    user_id=np.arange(USERS, dtype=np.int32),
    user_features=GENERATOR.normal(size=(USERS, FEATURES)).astype(np.float32),
    item_id=GENERATOR.integers(0, ITEMS, (USERS, CANDIDATES)).astype(np.int32),
    stage=np.full((USERS, CANDIDATES), Stage.SHOWN, np.int8),
    user_label=LABEL,
    label_weight=np.ones((USERS, CANDIDATES), np.float32),
    teacher_probability=TAUGHT,
    teacher_weight=np.ones((USERS, CANDIDATES, TASKS), np.float32),
)
ITEMS_OF_SPEC = random_items(spec=SPEC)


def cross_entropy(logit, label):
    """−y log σ(z) − (1 − y) log(1 − σ(z))."""
    return np.logaddexp(0, logit) - label * logit


def sample_logits(of, user_features, item_id):
    """The logits of a row, whatever they are for."""
    hidden = np.maximum(user_features @ of["w1"] + of["b1"], 0)
    interests = (hidden @ of["w2"] + of["b2"]).reshape(INTERESTS, WIDTH)
    item = of["items"][item_id]
    match = interests @ item
    attention = np.exp(match) / np.exp(match).sum()
    joined = np.concatenate([attention @ interests, item, match])
    return joined @ of["w3"] + of["b3"]


def sample_loss(mode, of):
    """The sum over rows and heads."""
    total = 0.0
    for user in range(USERS):
        for candidate in range(CANDIDATES):
            logits = sample_logits(
                of, BATCH.user_features[user].astype(float), BATCH.item_id[user, candidate]
            )
            label, taught = LABEL[user, candidate], TAUGHT[user, candidate].astype(float)
            if mode == "none":
                seen, wanted = logits, label
            elif mode == "aux":
                seen, wanted = logits, np.concatenate([label, taught])
            else:
                transformed = of["scale"] * logits + of["offset"]
                seen, wanted = np.concatenate([logits, transformed]), np.append(label, taught)
            total += cross_entropy(seen, wanted).sum()
    return total


def central_differences(function, of, step=1e-5):
    """The gradient of a function of arrays by name, one number at a time."""
    gradients = {}
    for name, array in of.items():
        gradients[name] = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            sides = []
            for sign in (1, -1):
                moved = array.copy()
                moved[place] += sign * step
                sides.append(function(of | {name: moved}))
            gradients[name][place] = (sides[0] - sides[1]) / (2 * step)
    return gradients


def by_name(dense, tables, transform):
    """The student's parameters, or their gradients, under the names that the sample gives them."""
    layers = dense["user"]["layers"]
    arrays = {
        # The first rows of the kernel meet the user's row, the last ones the context.
        "w1": layers[0]["kernel"][...][WIDTH : WIDTH + FEATURES],
        "b1": layers[0]["bias"][...],
        "w2": layers[1]["kernel"][...],
        "b2": layers[1]["bias"][...],
        "items": tables["item"][:ITEMS, :WIDTH],
        "w3": dense["heads"]["kernel"][...],
        "b3": dense["heads"]["bias"][...],
        **transform,
    }
    return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


def student(mode):
    """A student that has what the sample has, with no bias of 0 and a transform that does some."""
    heads = MODES[mode].heads_per_task * TASKS
    model, init = build_model(MultiInterest, SPEC, heads, CONFIG)
    parameters = init(jax.random.key(1), 0)
    generator = np.random.default_rng(1)
    dense = jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape) / 2, jnp.float32),
        parameters.dense,
    )
    of_item = dense["item"]["features"]
    for name in ("kernel", "bias"):
        of_item[name][...] = jnp.zeros_like(of_item[name][...])
    item = jnp.asarray(generator.normal(size=(ITEMS + 1, WIDTH + 1)), jnp.float32)
    item = item.at[:, WIDTH].set(1)  # as if training had met it
    tables = {"user": jnp.zeros_like(parameters.tables["user"]), "item": item}
    transform = MODES[mode].init_transform(TASKS, True)
    if transform:
        transform = {"scale": jnp.array([0.7, 1.4]), "offset": jnp.array([-0.5, 0.3])}
    recipe = Recipe(
        model=model,
        mode=MODES[mode],
        terms=(Term("bce", "logged"),) if MODES[mode].teacher_logits else (),
        optimizer=OPTIMIZERS["sgd"](),
        row_optimizer=ROW_OPTIMIZERS["sgd"],
        schedule=lambda step, steps: jnp.ones_like(steps),
    )
    return recipe, Parameters(dense, tables), transform


@pytest.mark.parametrize("mode", MODES)
def test_logits_loss_and_gradients_are_those_of_the_sample(mode):
    recipe, parameters, transform = student(mode)
    of = by_name(parameters.dense, parameters.tables, transform)
    expected = [
        [sample_logits(of, features, item_id) for item_id in item_ids]
        for features, item_ids in zip(BATCH.user_features, BATCH.item_id, strict=True)
    ]
    logits = score(recipe.model, parameters, BATCH, ITEMS_OF_SPEC)
    np.testing.assert_allclose(logits, expected, atol=1e-5)

    # A step of plain descent at a rate of 1 goes down by the gradient.
    numbers = Hyperparameters(
        user_weight=1.0,
        distill_weight=1.0,
        term_weights=(1.0,),
        loss=DEFAULT_NUMBERS,
        optimizer=OptimizerNumbers(1.0, 1.0, 0.0, 0.0),
        steps=10.0,
        unshown_weight=0.0,
    )
    numbers = stack_members([jax.tree.map(jnp.float32, numbers)])
    state = init_state(recipe, stack_members([parameters]), TASKS, True)
    state = state.replace(transform=stack_members([transform]))
    device = MAPPINGS["shard_map"](jax.devices()[:1])
    step = device.map_step(make_step([recipe]))
    (after,), (losses,) = step(
        device.place((state,)),
        device.shard(BATCH),
        (numbers,),
        device.place(Frozen(ITEMS_OF_SPEC, None)),
    )
    # The project's losses are means over rows and over tasks, the sample's are sums.
    summed = ROWS * TASKS
    np.testing.assert_allclose(losses["loss"][0] * summed, sample_loss(mode, of), rtol=1e-6)
    first = jax.tree.map(lambda leaf: leaf[0], (after.parameters, after.transform))
    moved = by_name(first[0].dense, first[0].tables, first[1])
    gradients = central_differences(lambda of: sample_loss(mode, of), of)
    assert moved.keys() == gradients.keys()
    for name, gradient in gradients.items():
        found = (of[name] - moved[name]) * summed
        np.testing.assert_allclose(found, gradient, atol=2e-5, err_msg=name)
        assert np.abs(gradient).max() > 0.05
