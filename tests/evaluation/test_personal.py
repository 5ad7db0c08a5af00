"""Tests of how much the item alone explains."""

import numpy as np

from kd_ranker.evaluation.references import item_share


def test_the_share_is_that_of_the_variances_drawn() -> None:
    rng = np.random.default_rng(0)
    number, items = 3000, 40
    item_effect, request_effect = rng.normal(0, 1, items), rng.normal(0, 5, number)
    item = np.stack([rng.permutation(items)[:20] for _ in range(number)])
    noise = rng.normal(0, 2, item.shape)
    value = item_effect[item] + request_effect[:, None] + noise
    request = np.repeat(np.arange(number), 20)
    # A request's mean takes 1/20 of both variances, which leaves their ratio.
    expected = item_effect.var() / (item_effect.var() + 4)
    assert abs(item_share(request, item.ravel(), value.ravel()) - expected) < 0.02


def test_small_requests_do_not_hide_what_items_explain() -> None:
    """A request's mean of two takes half of the item's own effect with it."""
    rng = np.random.default_rng(2)
    effect = rng.normal(0, 1, 50)
    item = np.stack([rng.permutation(50)[:2] for _ in range(20_000)]).ravel()
    request = np.repeat(np.arange(20_000), 2)
    assert abs(item_share(request, item, effect[item]) - 1) < 0.02
    noise = rng.normal(0, 1, len(item))
    expected = effect.var() / (effect.var() + 1)
    assert abs(item_share(request, item, effect[item] + noise) - expected) < 0.02


def test_few_items_do_not_inflate_it() -> None:
    """The others of a request tell its item where there are few."""
    rng = np.random.default_rng(3)
    effect = np.array([-1.0, 0.0, 1.0])
    item = np.stack([rng.permutation(3)[:2] for _ in range(20_000)]).ravel()
    request = np.repeat(np.arange(20_000), 2)
    assert abs(item_share(request, item, effect[item]) - 1) < 0.02


def test_it_is_not_inflated_where_items_are_rare() -> None:
    rng = np.random.default_rng(1)
    request, item = np.repeat(np.arange(2000), 10), rng.integers(0, 8000, 20_000)
    assert abs(item_share(request, item, rng.normal(size=20_000))) < 0.02


def test_ids_may_be_texts_and_nothing_to_compare_is_nan() -> None:
    request, item = np.array(["a", "a", "b", "b"]), np.array(["x", "y", "x", "y"])
    assert item_share(request, item, np.array([1.0, 0.0, 5.0, 4.0])) == 1
    assert np.isnan(item_share(request, np.array(["w", "x", "y", "z"]), np.arange(4.0)))
