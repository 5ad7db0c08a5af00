"""Intervals by hand, against SciPy, and the share of them that contain the truth."""

import math
import runpy
import sys

import numpy as np
import pytest
from scipy import stats

from kd_ranker.reporting.intervals import (
    OverDraws,
    combined,
    crossed_interval,
    interval,
    repeats_to_see,
    request_counts,
)


@pytest.mark.parametrize(("count", "confidence"), [(0, 0.95), (1, 0.95), (2, 0.95), (7, 0.90)])
def test_intervals_are_scipys_over_the_known_repeats(count, confidence):
    values = np.random.default_rng(count).normal(3, 2, count)

    ours = interval(np.array([*values, math.nan]), confidence)

    mean = values.mean() if count else math.nan
    if count > 1:
        ends = stats.ttest_1samp(values, 0).confidence_interval(confidence)
        expected = (mean, ends.low, ends.high, count, "repeats")
    else:
        expected = (mean, math.nan, math.nan, count, "nothing")
    assert ours == pytest.approx(expected, nan_ok=True)


def measured(values, counts, measure, repeats=None):
    """A measure of the sums of terms [R, N, ...], on the requests and on each draw of them."""
    names = tuple(range(len(values)) if repeats is None else repeats)
    return OverDraws(names, measure(np.tensordot(counts, values, (1, 1))), values.shape[1])


def share(sums):
    """The ratio of two sums, the last axis."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def draw_share_sums(generator, repeats, requests):
    """Per-request sums [R, N, 2] of a share, with a part of each repeat, request and both."""
    weight = generator.gamma(2, 1, requests)
    effect = (
        generator.normal(0, 0.1, (repeats, 1))
        + generator.normal(0, 1, requests)
        + generator.normal(0, 1, (repeats, requests))
    )
    return np.stack([weight * effect, np.broadcast_to(weight, effect.shape)], axis=-1)


def test_a_draw_has_all_requests_in_number_and_follows_its_seed():
    once, *counts = request_counts(50, draws=200, seed=3)
    assert (once == 1).all()
    counts = np.array(counts)
    assert (counts.sum(axis=1) == 50).all()
    np.testing.assert_array_equal(counts, request_counts(50, draws=200, seed=3)[1:])
    # With replacement: a request's count varies by 1 − 1/N, and its mean is 1.
    assert counts.mean(axis=0) == pytest.approx(np.ones(50), abs=0.3)
    assert counts.var() == pytest.approx(0.98, rel=0.05)


def test_a_crossed_interval_worked_by_hand():
    # N = 3, so N/(N − 1) = 1.5. Both repeats move alike: B = 1.5 · 1, S = 2 / 2.
    alike = OverDraws((0, 1), np.array([[1.0, 3], [0, 2], [2, 4], [1, 3]]), 3)
    half = (4.30265 * 1.5 + 12.7062 * 1) / math.sqrt(2.5)
    assert crossed_interval(alike)[:4] == pytest.approx((2, 2 - half, 2 + half, 2), rel=1e-5)
    # They move against each other: B = 0, and S contains all of the variance.
    apart = alike._replace(numbers=np.array([[1.0, 3], [0, 4], [2, 2], [1, 3]]))
    assert crossed_interval(apart).high == pytest.approx(2 + 12.7062, rel=1e-5)
    # Repeats that happen to agree: Cov = 0.5, so B = 0.75, and S = 0.
    agree = OverDraws((0, 1), np.array([[2.0, 2], [0, 1], [2, 2], [1, 3]]), 3)
    assert crossed_interval(agree).high == pytest.approx(2 + 4.30265 * 0.75**0.5, rel=1e-5)


def test_one_repeat_gives_the_interval_of_its_requests():
    values = np.random.default_rng(2).normal(1, 2, (1, 300))
    found = crossed_interval(measured(values, request_counts(300, 20_000), lambda sums: sums / 300))
    theirs = stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert (found.n, found.covers) == (1, "requests")


def test_a_difference_is_paired_over_the_repeats_that_both_have():
    counts = request_counts(60, draws=100)
    values = draw_share_sums(np.random.default_rng(3), 3, 60)
    one = measured(values, counts, share, ["a", "b", "c"])
    other = measured(values[[2, 0]], counts, share, ["c", "a"])

    gap = combined(np.subtract, one, other)

    assert gap.repeats == ("a", "c")
    # The same sums, so that nothing is left of what chance does to them.
    assert crossed_interval(gap) == pytest.approx((0, 0, 0, 2, "both"), abs=1e-12)
    assert crossed_interval(one).high > crossed_interval(one).low + 0.1


def test_a_repeat_without_the_measure_does_not_count():
    values = draw_share_sums(np.random.default_rng(6), 4, 60)
    counts = request_counts(60, draws=100)
    expected = crossed_interval(measured(values[:3], counts, share))

    values[3, :, 1] = 0  # a ratio over nothing

    assert crossed_interval(measured(values, counts, share)) == expected


def test_of_repeats_that_agree_each_moves_alone_by_hand():
    # N = 3, so N/(N − 1) = 1.5. Only the first moves: Cov = 0, S = 0, and the mean of all four
    # covariances is 1.5 · 2 / 4.
    alone = OverDraws((0, 1), np.array([[1.0, 1], [0, 1], [2, 1]]), 3)

    assert crossed_interval(alone).high == pytest.approx(1 + 4.30265 * 0.75**0.5, rel=1e-5)


def test_without_the_measure_there_is_no_interval():
    values = np.zeros((4, 60, 2))

    nowhere = measured(values, request_counts(60, draws=100), share)

    assert crossed_interval(nowhere)[3:] == (0, "nothing")


def test_settings_without_a_common_repeat_have_no_difference():
    values = draw_share_sums(np.random.default_rng(6), 1, 60)
    counts = request_counts(60, draws=100)
    one = measured(values, counts, share, ["a"])
    other = measured(values, counts, share, ["b"])

    gap = combined(np.subtract, one, other)

    assert crossed_interval(gap)[3:] == (0, "nothing")


def test_draws_without_the_measure_are_left_out_if_they_are_few():
    numbers = np.random.default_rng(7).normal(1, 1, (101, 2))
    numbers[0] = 1
    without_five = np.delete(numbers, slice(1, 6), axis=0)

    numbers[1:6, 0] = math.nan

    expected = crossed_interval(OverDraws((0, 1), without_five, 30))
    assert crossed_interval(OverDraws((0, 1), numbers, 30)) == expected


def test_too_many_draws_without_the_measure_give_no_interval():
    numbers = np.random.default_rng(7).normal(1, 1, (101, 2))
    numbers[0] = 1
    numbers[1:6, 0] = math.nan
    numbers[6, 1] = math.nan

    unknown = crossed_interval(OverDraws((0, 1), numbers, 30))
    assert unknown == pytest.approx((1, math.nan, math.nan, 2, "nothing"), nan_ok=True)


def coverage(repeats, of_repeats, of_pairs, studies=1000, draws=100):
    """The share for a measure with normal parts.

    Requests add 1 to the variance of the mean, `of_pairs` of it in each repeat separately.
    `of_repeats` is the part of the repeats in the same unit. The width of an interval is
    independent of its mean here, so the share of means within it is known.
    """
    generator = np.random.default_rng(repeats)

    def request_effects(*shape):
        shared = generator.normal(0, np.sqrt(1 - of_pairs), (*shape, 1))
        return shared + generator.normal(0, np.sqrt(of_pairs * repeats), (*shape, repeats))

    effects = request_effects(studies)
    each = effects + generator.normal(0, np.sqrt(of_repeats * repeats), (studies, repeats))
    drawn = each[:, None] + request_effects(studies, draws)
    numbers = np.concatenate([each[:, None], drawn], axis=1)
    names = tuple(range(repeats))
    intervals = [crossed_interval(OverDraws(names, of_study, 2000)) for of_study in numbers]
    half = np.array([found.high - found.mean for found in intervals])
    return np.mean(1 - 2 * stats.norm.sf(half / np.sqrt(1 + of_repeats)))


# No variance of repeats, a small part, and the parts of the cascade.
@pytest.mark.parametrize("parts", [(0, 0.2), (0.3, 0.3), (5, 0.2)])
@pytest.mark.parametrize(("repeats", "most"), [(2, 98), (3, 97), (5, 97)])
def test_95_percent_intervals_cover_about_95_percent(repeats, most, parts):
    assert 95 <= round(100 * coverage(repeats, *parts)) <= most


def test_the_script_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["coverage.py", "--studies=2", "--requests=30"])
    runpy.run_path("scripts/coverage.py", run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4 * 2 * 4


@pytest.mark.parametrize("deviation_of_requests", [0.0, 0.03])
def test_planned_repeats_exclude_0_in_four_studies_of_five(deviation_of_requests):
    """The power of the plan, and that one repeat less would not do, by drawing studies."""
    generator = np.random.default_rng(0)
    difference, requests = 0.25, 1000

    def drawn_study(repeats):
        shared = deviation_of_requests * generator.standard_normal(200)
        drawn = np.repeat(shared[:, None], repeats, axis=1)
        on_test = difference + 0.1 * generator.standard_normal(repeats)
        on_test += deviation_of_requests * generator.standard_normal()
        return OverDraws(tuple(range(repeats)), np.vstack([on_test, on_test + drawn]), requests)

    # Repeats with exactly the variance of the others.
    on_test = difference + 0.1 * stats.zscore(generator.standard_normal(9), ddof=1)
    shared = deviation_of_requests * stats.zscore(generator.standard_normal(200), ddof=1)
    pilot = OverDraws(tuple(range(9)), np.vstack([on_test, on_test + shared[:, None]]), requests)
    planned = repeats_to_see(pilot, difference)

    def power(repeats):
        return np.mean([crossed_interval(drawn_study(repeats)).low > 0 for _ in range(500)])

    assert planned is not None
    assert power(planned) > 0.75
    assert power(planned - 1) < 0.8


def test_no_plan_without_repeats_or_for_a_difference_that_requests_hide():
    drawn = np.random.default_rng(0).normal(0.1, 0.2, (200, 1)).repeat(3, axis=1)
    on_test = np.array([[0.1, 0.11, 0.12]])
    hidden = OverDraws((0, 1, 2), np.vstack([on_test, drawn]), 1000)
    assert repeats_to_see(hidden, 0.1) is None
    assert repeats_to_see(OverDraws((0,), on_test[:, :1], 1000), 0.1) is None
    assert repeats_to_see(hidden, 0.0) is None
