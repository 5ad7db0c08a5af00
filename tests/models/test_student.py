import numpy as np
import pytest
from scipy.special import softmax

from kd_ranker.distillation.modes import MODES
from kd_ranker.models.model import score
from kd_ranker.models.student import STUDENTS, MultiInterest, TwoTower
from tests.random_batches import SPEC, SPECS, STUDENT, make_model, random_batch, random_items

over_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def dense(layer):
    return np.asarray(layer["kernel"][...]), np.asarray(layer["bias"][...])


def mlp(layers, inputs):
    for index in range(len(layers)):
        kernel, bias = dense(layers[index])
        inputs = inputs @ kernel + bias
        if index + 1 < len(layers):
            inputs = np.maximum(inputs, 0)
    return inputs


def category_means(table, spec, of, ids):
    """The mean row of each feature, one value at a time.

    Which feature an id is of follows from the id itself, and not from its place.
    """
    means = []
    for start, category in zip(spec.category_starts, spec.categories, strict=True):
        if category.of == of:
            rows = [table[i] for i in ids if start <= i < start + category.size]
            means.append(np.mean(rows, axis=0) if rows else np.zeros(table.shape[1]))
    return means


def embedding_tables(parameters, width):
    return {name: np.asarray(table)[:, :width] for name, table in parameters.tables.items()}


def users_and_items(parameters, batch, items, spec):
    """The inputs of both towers, one request and one candidate at a time."""
    tables = embedding_tables(parameters, STUDENT.width)
    categories = tables.get("category", np.zeros((0, STUDENT.width)))
    users = np.stack(
        [
            np.concatenate(
                [
                    tables["user"][user],
                    features,
                    context,
                    *category_means(categories, spec, "request", ids),
                ]
            )
            for user, features, context, ids in zip(
                batch.user_id,
                batch.user_features,
                batch.context,
                batch.request_category,
                strict=True,
            )
        ]
    )
    kernel, bias = dense(parameters.dense["item"]["features"])
    item = np.zeros((*batch.item_id.shape, STUDENT.width))
    for request in range(batch.item_id.shape[0]):
        for candidate in range(batch.item_id.shape[1]):
            item_id = batch.item_id[request, candidate]
            cheap = items.features[item_id, : spec.cheap_item_features]
            known = np.concatenate([cheap, batch.candidate_features[request, candidate]])
            item[request, candidate] = tables["item"][item_id] + known @ kernel + bias
            own = batch.candidate_category[request, candidate]
            for mean in (
                *category_means(categories, spec, "item", items.category[item_id]),
                *category_means(categories, spec, "candidate", own),
            ):
                item[request, candidate] += mean
    return users, item


@over_specs
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("requests", "candidates"), [(4, 5), (1, 1)])
def test_multi_interest_is_the_formula(mode, requests, candidates, spec):
    heads = MODES[mode].heads_per_task * len(SPEC.tasks)
    model, parameters = make_model(MultiInterest, heads, STUDENT, spec=spec)
    batch, items = random_batch(0, requests, candidates, spec), random_items(spec=spec)
    users, item = users_and_items(parameters, batch, items, spec)
    users = mlp(parameters.dense["user"]["layers"], users).reshape(
        requests, STUDENT.interests, STUDENT.width
    )
    kernel, bias = dense(parameters.dense["heads"])
    expected = np.zeros((requests, candidates, heads))
    for request in range(requests):
        for candidate in range(candidates):
            match = users[request] @ item[request, candidate]
            combined = softmax(match) @ users[request]
            joined = np.concatenate([combined, item[request, candidate], match])
            expected[request, candidate] = joined @ kernel + bias

    logits = score(model, parameters, batch, items)
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@over_specs
def test_two_tower_is_the_formula(spec):
    heads = len(SPEC.tasks)
    model, parameters = make_model(TwoTower, heads, STUDENT, spec=spec)
    batch, items = random_batch(0, spec=spec), random_items(spec=spec)
    users, item = users_and_items(parameters, batch, items, spec)
    users = mlp(parameters.dense["user"]["layers"], users).reshape(-1, heads, STUDENT.width)
    offset = np.asarray(parameters.dense["offset"][...])
    expected = np.stack(
        [item[r] @ users[r].T / np.sqrt(STUDENT.width) + offset for r in range(len(users))]
    )
    np.testing.assert_allclose(score(model, parameters, batch, items), expected, atol=2e-5)


@over_specs
@pytest.mark.parametrize("name", STUDENTS)
def test_a_candidate_is_scored_alike_in_any_company(name, spec):
    """No candidate's logits depend on the others: the order and the number do not matter."""
    model, parameters = make_model(STUDENTS[name], 3, STUDENT, spec=spec)
    batch, items = random_batch(0, spec=spec), random_items(spec=spec)
    order = np.array([3, 0, 4])
    fewer = batch.replace(
        item_id=batch.item_id[:, order],
        candidate_features=batch.candidate_features[:, order],
        candidate_category=batch.candidate_category[:, order],
        stage=batch.stage[:, order],
    )
    np.testing.assert_allclose(
        score(model, parameters, fewer, items),
        score(model, parameters, batch, items)[:, order],
        atol=1e-6,
    )
