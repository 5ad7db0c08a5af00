"""The funnel's curves against a hand-worked case and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_ranker.evaluation import funnel

funnel_curves = jax.jit(funnel.funnel_curves, static_argnums=3)


def brute_force(
    student: np.ndarray,
    teacher: np.ndarray,
    mask: np.ndarray,
    true: np.ndarray,
    was_shown: np.ndarray,
    positive: np.ndarray,
    shown: int,
) -> dict[str, np.ndarray]:
    """The curves of one request, from the definitions, one k after the other."""
    candidates = [i for i in range(mask.size) if mask[i]]

    def shown_by_teacher(passed: list[int]) -> list[int]:
        known = [i for i in passed if not np.isnan(teacher[i])]
        return sorted(known, key=lambda i: (-teacher[i], i))[:shown]

    by_student = sorted(candidates, key=lambda i: (-student[i], i))
    own_top = set(shown_by_teacher(candidates))
    once_shown = {i for i in candidates if was_shown[i]}
    if len(once_shown) == len(candidates):
        once_shown = set()
    done = [{i for i in candidates if positive[i, task]} for task in range(positive.shape[1])]
    curves = []
    for k in range(1, mask.size + 1):
        passed = set(by_student[:k])
        chosen = shown_by_teacher(by_student[:k])
        curves.append(
            {
                "survival": len(own_top & passed) / max(len(own_top), 1),
                "value_captured": sum(teacher[i] for i in chosen),
                "true_value_captured": sum(true[i] for i in chosen),
                "shown_kept": len(once_shown & passed),
                "positives_kept": [len(of_task & passed) for of_task in done],
                "positives_shown": [len(of_task & set(chosen)) for of_task in done],
            }
        )
    return {name: np.array([of_k[name] for of_k in curves]) for name in curves[0]}


@st.composite
def ragged_requests(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    """Values with ties and holes in ragged requests; few sizes, for each is compiled."""
    shape = (draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 9])))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    student, teacher, true = generator.integers(0, levels, size=(3, *shape)) / levels
    teacher[generator.uniform(size=shape) < draw(st.sampled_from([0.0, 0.3]))] = np.nan
    mask = generator.uniform(size=shape) < draw(st.sampled_from([0.4, 1.0]))
    # What lies on padding must not matter.
    student[~mask], true[~mask] = np.nan, np.nan
    was_shown = generator.uniform(size=shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    # More tasks than counts fit into one number.
    positive = generator.uniform(size=(*shape, 16)) < draw(st.sampled_from([0.0, 0.2, 1.0]))
    values = (array.astype(np.float32) for array in (student, teacher, true))
    return (*values, mask, was_shown, positive)


@settings(deadline=None, max_examples=150)
@given(ragged_requests(), st.sampled_from([1, 3]))
def test_curves_match_brute_force(requests: tuple[np.ndarray, ...], shown: int) -> None:
    student, teacher, true, mask, was_shown, positive = requests
    arguments = (true, was_shown, positive)
    curves = jax.device_get(funnel_curves(student, teacher, mask, shown, *arguments))
    for request in range(len(mask)):
        expected = brute_force(
            *(array[request] for array in (student, teacher, mask, *arguments)), shown
        )
        for name, of in expected.items():
            # A running sum in float32 is off by the rounding of its largest term, at most 1 here,
            # and its last entries may be much smaller than that.
            found = getattr(curves, name)[request]
            np.testing.assert_allclose(found, of, rtol=1e-6, atol=1e-6, err_msg=name)
            # From the number of candidates on, nothing is lost, to the last bit.
            assert (found[max(mask[request].sum(), 1) - 1 :] == found[-1]).all()
        assert curves.counts[request] == (mask[request] & ~np.isnan(teacher[request])).any()
    assert (curves.survival[curves.counts, -1] == 1).all()
    # Letting more pass never loses value of the teacher. (It may lose true value.)
    assert (np.diff(curves.value_captured) >= 0).all()
    assert (np.diff(curves.survival) >= 0).all()


def test_candidates_without_a_value_come_after_the_others_and_before_the_padding() -> None:
    # A logged teacher as a student: it does not know the first one, which was shown.
    value = np.array([[np.nan, 0.2, 0.9, np.nan]])
    mask = np.array([[True, True, True, False]])
    shown = np.array([[True, False, True, False]])
    curves = funnel_curves(value, value, mask, 1, None, shown)
    np.testing.assert_allclose(curves.shown_kept, [[1.0, 1.0, 2.0, 2.0]])


def test_unknown_true_values_give_nan_and_leave_the_rest() -> None:
    curves = funnel_curves(np.ones((1, 3)), np.ones((1, 3)), np.ones((1, 3), bool), 2)
    assert jnp.isnan(curves.true_value_captured).all()
    np.testing.assert_allclose(curves.value_captured, [[1.0, 2.0, 2.0]])


def test_a_diverged_student_gives_nan_only_where_the_teacher_knows_the_candidate() -> None:
    student = np.array([[0.3, np.nan, 0.1], [0.3, np.nan, 0.1]])
    teacher = np.array([[0.5, 0.5, 0.5], [0.5, np.nan, 0.5]])
    curves = funnel_curves(student, teacher, np.ones((2, 3), bool), 2)
    assert jnp.isnan(curves.survival[0]).all()
    assert jnp.isnan(curves.value_captured[0]).all()
    np.testing.assert_allclose(curves.survival[1], [0.5, 1.0, 1.0])


def test_shown_must_be_positive() -> None:
    with pytest.raises(ValueError, match="shown=0"):
        funnel.funnel_curves(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2), bool), 0)


@pytest.mark.parametrize("size", [1, 7, 2000, 1 << 16])
def test_ascending_sorts_as_numpy_does_stably(size):
    rng = np.random.default_rng(size)
    values = rng.normal(size=size).astype(np.float32)
    special = rng.choice(np.array([np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0], np.float32), size)
    for of in (values, values.round(), np.where(rng.random(size) < 0.5, special, values)):
        np.testing.assert_array_equal(funnel.ascending(of), np.argsort(of, kind="stable"))


def test_passed_for_on_all_ks_is_the_smallest_that_reaches_the_target() -> None:
    generator = np.random.default_rng(8)
    # Not every step rises, as with true value.
    curves = np.cumsum(generator.normal(0.4, 1, (30, 50, 2)), axis=0)
    curves[-1] = np.abs(curves[-1]) + 1
    found = funnel.passed_for(curves, np.arange(1, 31), 0.9)
    for curve, k in zip(curves.reshape(30, -1).T, found.ravel(), strict=True):
        assert k == next(k for k in range(1, 31) if curve[k - 1] / curve[-1] >= 0.9)


@pytest.mark.parametrize(
    ("curve", "target", "expected"),
    [
        # Between two k on the line, below the first k the first, and exact.
        ([5.0, 7, 8], 0.92, 28),
        ([7.9, 8, 8], 0.92, 10),
        ([7.1, 7.6, 8], 0.92, 16),
        ([5.0, 7, 8], 1, 40),
        ([7.9, 8, 8], 1, 20),
        # Nothing to capture, and where the curve is unknown.
        ([0.0, 0, 0], 0.99, np.nan),
        ([np.nan, 1, 2], 0.99, 40),
        ([np.nan] * 3, 0.99, np.nan),
    ],
)
def test_passed_for_between_the_kept_ks(curve, target, expected) -> None:
    found = funnel.passed_for(np.array(curve), np.array([10, 20, 40]), target)
    np.testing.assert_array_equal(found, expected)
