import functools

import numpy as np
import pytest
from scipy.special import softmax

from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation import saving
from kd_ranker.models.model import score
from kd_ranker.models.student import STUDENTS, MultiInterest, TwoTower
from tests.random_batches import (
    CATEGORY_SPEC,
    SPEC,
    STUDENT,
    logits_of,
    make_model,
    random_batch,
    random_items,
)


def student(history):
    config = STUDENT.copy_and_resolve_references()
    config.history = history
    return config


def dense(layer):
    return np.asarray(layer["kernel"][...]), np.asarray(layer["bias"][...])


def mlp(layers, inputs):
    for index in range(len(layers)):
        kernel, bias = dense(layers[index])
        inputs = inputs @ kernel + bias
        if index + 1 < len(layers):
            inputs = np.maximum(inputs, 0)
    return inputs


def category_means(table, spec, owner, ids):
    """The mean row of each feature, one value at a time.

    Which feature an id is of follows from the id itself, and not from its place.
    """
    means = []
    for start, category in zip(spec.category_starts, spec.categories, strict=True):
        if category.of == owner:
            rows = [table[i] for i in ids if start <= i < start + category.size]
            means.append(np.mean(rows, axis=0) if rows else np.zeros(table.shape[1]))
    return means


def embedding_tables(parameters, width):
    return {name: np.asarray(table)[:, :width] for name, table in parameters.tables.items()}


def history_means(parameters, batch, items, spec):
    """The mean of each request's events, one event at a time."""
    tables = embedding_tables(parameters, STUDENT.width)
    kernel = np.asarray(parameters.dense["history"]["features"]["kernel"][...])
    means = np.zeros((len(batch.user_id), STUDENT.width))
    for request, mask in enumerate(batch.history_mask):
        events = []
        for event in np.flatnonzero(mask):
            item_id = batch.history_id[request, event]
            cheap = items.features[item_id, : spec.cheap_item_features]
            known = np.concatenate([cheap, batch.history_features[request, event]])
            of_item = items.category[item_id]
            means_of_item = category_means(tables.get("category"), spec, "item", of_item)
            events.append(tables["item"][item_id] + known @ kernel + sum(means_of_item))
        if events:
            means[request] = np.mean(events, axis=0)
    return means


def users_and_items(parameters, batch, items, spec):
    """The inputs of the user tower, and the items, one request and one candidate at a time."""
    tables = embedding_tables(parameters, STUDENT.width)

    def means(owner, ids):
        return category_means(tables.get("category"), spec, owner, ids)

    users = [
        np.concatenate([tables["user"][user], features, context, *means("request", ids)])
        for user, features, context, ids in zip(
            batch.user_id, batch.user_features, batch.context, batch.request_category, strict=True
        )
    ]
    if "history" in parameters.dense:
        pooled = history_means(parameters, batch, items, spec)
        users = np.concatenate([users, pooled], axis=1)
    kernel, bias = dense(parameters.dense["item"]["features"])
    item = np.zeros((*batch.item_id.shape, STUDENT.width))
    for at in np.ndindex(batch.item_id.shape):
        item_id = batch.item_id[at]
        cheap = items.features[item_id, : spec.cheap_item_features]
        known = np.concatenate([cheap, batch.candidate_features[at]])
        categories = means("item", items.category[item_id])
        categories += means("candidate", batch.candidate_category[at])
        item[at] = tables["item"][item_id] + known @ kernel + bias + sum(categories)
    return np.array(users), item


def multi_interest(parameters, users, item):
    """The logits of one candidate, from the outputs of the user tower [E, D] and the item."""
    kernel, bias = dense(parameters.dense["heads"])
    match = users @ item
    return np.concatenate([softmax(match) @ users, item, match]) @ kernel + bias


def two_tower(parameters, users, item):
    """The logits of one candidate, from the outputs of the user tower [heads, D] and the item."""
    return users @ item / np.sqrt(STUDENT.width) + np.asarray(parameters.dense["offset"][...])


@pytest.mark.parametrize(
    ("module", "formula", "mode", "history", "spec"),
    [
        (MultiInterest, multi_interest, "none", "none", SPEC),
        (MultiInterest, multi_interest, "aux", "mean", CATEGORY_SPEC),
        (TwoTower, two_tower, "none", "mean", CATEGORY_SPEC),
    ],
)
def test_a_student_is_its_formula(module, formula, mode, history, spec):
    heads = MODES[mode].heads_per_task * len(SPEC.tasks)
    model, parameters = make_model(module, heads, student(history), spec=spec)
    batch = random_batch(0, spec=spec)
    items = random_items(spec=spec)
    batch.history_mask[0] = False
    users, item = users_and_items(parameters, batch, items, spec)
    users = mlp(parameters.dense["user"]["layers"], users)
    users = users.reshape(len(users), -1, STUDENT.width)

    logits = np.asarray(logits_of(model, parameters, batch, items))

    for request, candidate in np.ndindex(batch.item_id.shape):
        expected = formula(parameters, users[request], item[request, candidate])
        np.testing.assert_allclose(logits[request, candidate], expected, rtol=1e-7, atol=2e-5)


@pytest.mark.parametrize("name", STUDENTS)
def test_the_mean_of_the_history_is_paid_for_once_a_request(name):
    def flops(history, candidates):
        model, parameters = make_model(STUDENTS[name], 3, student(history))
        batch = random_batch(0, 2, candidates)
        return saving.flops(functools.partial(score, model), parameters, batch, random_items())

    added_to_few = flops("mean", 5) - flops("none", 5)
    added_to_many = flops("mean", 50) - flops("none", 50)
    assert added_to_few == pytest.approx(added_to_many, rel=0.02)
    assert added_to_few > 0
