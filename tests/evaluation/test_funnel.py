"""The funnel where the rows of `test_metrics`, which restate its curves, do not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from kd_ranker.evaluation import funnel

funnel_curves = jax.jit(funnel.funnel_curves, static_argnums=3)
favorites_first = jax.jit(funnel.favorites_first)


def test_a_diverged_student_is_nan_where_the_teacher_knows() -> None:
    student = np.array([[0.3, np.nan, 0.1], [0.3, np.nan, 0.1]])
    teacher = np.array([[0.5, 0.5, 0.5], [0.5, np.nan, 0.5]])
    mask = np.ones((2, 3), bool)

    curves = funnel_curves(student, teacher, mask, 2, of_shown={"value": teacher}).curves

    assert jnp.isnan(curves["survival"][0]).all()
    assert jnp.isnan(curves["value"][0]).all()
    np.testing.assert_allclose(curves["survival"][1], [0.5, 1.0, 1.0])


@pytest.mark.parametrize("size", [1, 7, 2000])
def test_favorites_come_first_and_padding_last(size):
    rng = np.random.default_rng(size)
    values = rng.normal(size=(3, size)).astype(np.float32)
    special = np.array([np.inf, np.nan, -np.nan, 0.0, -0.0], np.float32)
    values[1] = values[1].round()  # with ties
    values[2] = np.where(rng.random(size) < 0.5, rng.choice(special, size), values[2])
    mask = rng.random((3, size)) < 0.9

    orders = favorites_first(values, mask), funnel.favorites_first_on_host(values, mask)

    for row in range(3):
        # NaN before padding, behind all that has a value.
        rank = np.where(np.isnan(values[row]), 1, 0) + np.where(mask[row], 0, 2)
        value = np.where(rank == 0, values[row], 0)
        expected = np.lexsort((np.arange(size), -value, rank))
        for order in orders:
            kept = mask[row, expected]
            np.testing.assert_array_equal(order[row][kept], expected[kept])
            assert sorted(order[row].tolist()) == list(range(size))


def partly_scored(seed):
    """Requests of 8 to 20 candidates and padding, of which the teacher knows some."""
    rng = np.random.default_rng(seed)
    student = rng.normal(size=(30, 20)).astype(np.float32)
    mask = np.arange(20) < rng.integers(8, 21, (30, 1))
    known = mask & (rng.random((30, 20)) < 0.6)
    teacher = np.where(known, rng.random((30, 20)), np.nan).astype(np.float32)
    return student, teacher, mask, known


def test_slots_follow_the_fraction_of_known_candidates():
    student, teacher, mask, known = partly_scored(0)

    weights = funnel.slots_of_part(4, known.sum(axis=1), mask.sum(axis=1))
    found = jax.jit(funnel.list_sums)(student, teacher, mask, teacher, weights)

    for row in range(len(student)):
        order = [at for at in np.argsort(-student[row], kind="stable") if mask[row, at]]
        slots = 4 * known[row].sum() / mask[row].sum()
        for k in range(1, len(order) + 1):
            values = sorted((teacher[row, at] for at in order[:k] if known[row, at]), reverse=True)
            whole = int(slots)
            value = sum(values[:whole]) + (slots - whole) * sum(values[whole : whole + 1])
            np.testing.assert_allclose(found[row, k - 1], value, rtol=1e-5)


def test_the_slots_of_a_known_candidate_without_others():
    slots = funnel.slots_of_part(2, jnp.array([1, 0, 0]), jnp.array([1, 1, 0]))
    assert slots.tolist() == [[1, 1], [0, 0], [0, 0]]


def test_with_all_slots_the_sum_is_that_of_the_funnel():
    student, _, mask, _ = partly_scored(1)
    teacher = np.random.default_rng(2).random(student.shape).astype(np.float32)

    found = funnel.list_sums(student, teacher, mask, teacher, np.ones((30, 4), np.float32))

    curves = funnel_curves(student, teacher, mask, 4, of_shown={"value": teacher}).curves
    np.testing.assert_allclose(found, curves["value"], rtol=1e-5)


def test_the_sums_of_a_diverged_student_are_nan():
    student, teacher, mask, known = partly_scored(3)
    student[0, np.argmax(known[0])] = np.nan

    found = funnel.list_sums(student, teacher, mask, teacher, np.ones((30, 4), np.float32))

    assert jnp.isnan(found[0]).all()
    assert not jnp.isnan(found[1:]).any()


def test_the_share_of_pairs_is_the_area_under_the_roc_curve():
    student, _, mask, _ = partly_scored(4)
    chosen = mask & (np.random.default_rng(5).random(mask.shape) < 0.3)
    chosen[:, 0], chosen[:, 1] = True, False
    chosen[0], chosen[1] = False, mask[1]

    found = funnel.share_of_pairs(student, mask, chosen)

    assert jnp.isnan(found[:2]).all()
    for row in range(2, len(student)):
        expected = roc_auc_score(chosen[row, mask[row]], student[row, mask[row]])
        np.testing.assert_allclose(found[row], expected, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_some_candidates_come_first_in_their_order(share):
    which = np.random.default_rng(0).random((5, 40)) < share
    expected = np.argsort(~which, axis=1, kind="stable")
    np.testing.assert_array_equal(jax.jit(funnel.first_of)(which), expected)


@pytest.mark.parametrize("shown", [1, 4, 12])
def test_with_as_many_passed_as_shown_the_value_is_that_of_the_students_own_top(shown):
    """So `value_captured` at m is the value at timeout: the final ranker has no choice."""
    student, teacher, mask, known = partly_scored(1)
    own = np.zeros(len(student))
    best = np.zeros(len(student))
    for request in range(len(student)):
        candidates = np.flatnonzero(mask[request])
        first = candidates[np.argsort(-student[request, candidates], kind="stable")][:shown]
        own[request] = np.nansum(teacher[request, first])
        best[request] = np.sort(teacher[request, known[request]])[::-1][:shown].sum()

    curve = funnel_curves(student, teacher, mask, shown, of_shown={"value": teacher}).curves[
        "value"
    ]

    np.testing.assert_allclose(curve[:, shown - 1], own, rtol=1e-5)
    np.testing.assert_allclose(curve[:, -1], best, rtol=1e-5)
