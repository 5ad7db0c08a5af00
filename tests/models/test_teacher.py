import numpy as np
from scipy.special import softmax

from kd_ranker.models.teacher import FinalRanker
from tests.models.test_student import category_means, dense, embedding_tables
from tests.random_batches import (
    CATEGORY_SPEC,
    TEACHER,
    logits_of,
    make_model,
    random_batch,
    random_items,
)

HEADS = len(CATEGORY_SPEC.tasks)


def test_final_ranker_is_the_formula():
    """One candidate at a time, with loops in place of the split and batched products."""
    spec = CATEGORY_SPEC
    model, parameters = make_model(FinalRanker, HEADS, TEACHER, spec=spec)
    batch, items = random_batch(0, spec=spec), random_items(spec=spec)
    layers, tables = parameters.dense, embedding_tables(parameters, TEACHER.width)

    def encoded(layer, item, own, *more):
        """The row of an item and its categories, plus a map of known features; and these."""
        known = np.concatenate([items.features[item], own])
        kernel, bias = dense(layers[layer]["features"])
        means = category_means(tables["category"], spec, "item", items.category[item])
        return sum([*means, *more], start=tables["item"][item]) + known @ kernel + bias, known

    expected = np.zeros((*batch.item_id.shape, HEADS))
    for request in range(len(expected)):
        events = [
            encoded("event", batch.history_id[request, at], batch.history_features[request, at])[0]
            for at in np.flatnonzero(batch.history_mask[request])
        ]
        of_request = batch.request_category[request]
        seen = sum(events, start=np.zeros(TEACHER.width)) / spec.history_length
        known_of_user = [
            tables["user"][batch.user_id[request]],
            batch.user_features[request],
            batch.context[request],
            *category_means(tables["category"], spec, "request", of_request),
            seen,
        ]
        for candidate, item in enumerate(batch.item_id[request]):
            own = batch.candidate_category[request, candidate]
            vector, known = encoded(
                *("item", item, batch.candidate_features[request, candidate]),
                *category_means(tables["category"], spec, "candidate", own),
            )
            attended, matches = np.zeros(TEACHER.width), np.zeros(TEACHER.attention_hidden)
            for event in events:
                attention = layers["attention"]
                kernel, bias = dense(attention["event"])
                hidden = event @ kernel + bias
                hidden = hidden + vector @ np.asarray(attention["candidate"]["kernel"][...])
                hidden = hidden + (event * vector) @ np.asarray(attention["product"]["kernel"][...])
                kernel, bias = dense(attention["weight"])
                hidden = np.maximum(hidden, 0) / spec.history_length
                matches += hidden
                attended += (hidden @ kernel + bias / spec.history_length)[0] * event
            of_candidate = [vector, known, attended, attended * vector, matches]
            joined = np.concatenate([*known_of_user, *of_candidate])
            crossed = joined
            for index in range(TEACHER.cross_layers):
                kernel, bias = dense(layers["crosses"][index])
                crossed = joined * (crossed @ kernel + bias) + crossed
            mixture = layers["mixture"]
            kernel, bias = dense(mixture["experts"])
            outputs = np.maximum(crossed @ kernel + bias, 0)
            outputs = outputs.reshape(TEACHER.experts, TEACHER.expert_hidden)
            kernel, bias = dense(mixture["gates"])
            gates = softmax((crossed @ kernel + bias).reshape(HEADS, TEACHER.experts), axis=-1)
            towers, offset = np.asarray(mixture["towers"][...]), np.asarray(mixture["offset"][...])
            expected[request, candidate] = ((gates @ outputs) * towers).sum(axis=1) + offset

    np.testing.assert_allclose(logits_of(model, parameters, batch, items), expected, atol=1e-4)
