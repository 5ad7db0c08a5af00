"""EASE against the regression of each item on all others, by scikit-learn."""

import numpy as np
import scipy.sparse
from sklearn.linear_model import Ridge

from kd_ranker.rivals import ease
from kd_ranker.rivals.candidates import Candidates
from tests.rivals.some_dataset import open_some


def random_taken(users, items):
    generator = np.random.default_rng(0)
    return (generator.random((users, items)) < 0.3).astype(np.float32)


def test_item_weights_are_a_ridge_regression_on_other_items():
    taken = random_taken(40, 7)

    fitted = ease.fit(scipy.sparse.csr_array(taken), 3.0)

    for item in range(7):
        others = np.delete(np.arange(7), item)
        ridge = Ridge(alpha=3.0, fit_intercept=False).fit(taken[:, others], taken[:, item])
        np.testing.assert_allclose(fitted.weights[others, item], ridge.coef_, atol=1e-5)
        assert fitted.weights[item, item] == 0


def test_a_users_items_are_from_histories_and_positive_labels(tmp_path):
    dataset, requests = open_some(tmp_path)

    taken = ease.taken_items(dataset).toarray()

    expected = np.zeros_like(taken)
    for request in requests["train"]:
        expected[request.user_id, request.history_id] = 1
        is_wanted = request.user_label.any(axis=1) & (request.label_weight > 0)
        wanted = request.item_id[: len(is_wanted)][is_wanted]
        expected[request.user_id, wanted] = 1
    np.testing.assert_array_equal(taken, expected)


def test_a_score_sums_weights_of_user_items_and_events(tmp_path):
    dataset, requests = open_some(tmp_path)
    taken = ease.taken_items(dataset)
    fitted = ease.fit(taken, 2.0)

    scores = fitted.score(Candidates(dataset, "test", slice(None)))

    expected = []
    for request in requests["test"]:
        history = taken[[request.user_id]].toarray()[0]
        history[request.history_id] = 1
        expected.append((history @ fitted.weights)[request.item_id])
    np.testing.assert_allclose(scores, np.concatenate(expected), rtol=1e-4, atol=1e-6)
