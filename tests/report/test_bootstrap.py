import math

import numpy as np
import pytest
from scipy import stats

from kd_ranker.report.intervals import (
    Measured,
    combined,
    crossed_interval,
    measured,
    passed_for,
    request_counts,
    resampled_sums,
)


def share(sums):
    """The ratio of two sums, the last axis."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def of_setting(generator, repeats, requests):
    """Per-request sums [R, N, 2] of a share, with a part of each repeat, request and both."""
    weight = generator.gamma(2, 1, requests)
    effect = (
        generator.normal(0, 0.1, (repeats, 1))
        + generator.normal(0, 1, requests)
        + generator.normal(0, 1, (repeats, requests))
    )
    return np.stack([weight * effect, np.broadcast_to(weight, effect.shape)], axis=-1)


def test_sums_of_a_draw_are_those_of_its_requests_one_by_one():
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, (3, 5, 4, 2))
    counts = request_counts(5, draws=7)
    sums = resampled_sums(values, counts)
    for draw, of_draw in zip(counts, sums, strict=True):
        drawn = np.repeat(np.arange(5), draw)
        np.testing.assert_allclose(of_draw, values[:, drawn].sum(axis=1), atol=1e-12)


def test_each_draw_has_as_many_requests_as_there_are_and_depends_on_the_seed_alone():
    counts = request_counts(50, draws=200, seed=3)
    assert (counts.sum(axis=1) == 50).all()
    np.testing.assert_array_equal(counts, request_counts(50, draws=200, seed=3))
    assert (counts != request_counts(50, draws=200, seed=4)).any()
    # With replacement: a request's count varies by 1 − 1/N, and its mean is 1.
    assert counts.mean(axis=0) == pytest.approx(np.ones(50), abs=0.3)
    assert counts.var() == pytest.approx(0.98, rel=0.05)


def test_an_interval_worked_by_hand():
    # N = 3, so N/(N − 1) = 1.5. Both repeats move alike: B = 1.5 · 1, S = 2 / 2.
    alike = Measured((0, 1), np.array([1.0, 3]), np.array([[0.0, 2], [2, 4], [1, 3]]), 3)
    half = (4.30265 * 1.5 + 12.7062 * 1) / math.sqrt(2.5)
    assert crossed_interval(alike)[:4] == pytest.approx((2, 2 - half, 2 + half, 2), rel=1e-5)
    # They move against each other: B = 0, and S contains all of the variance.
    apart = alike._replace(drawn=np.array([[0.0, 4], [2, 2], [1, 3]]))
    assert crossed_interval(apart).high == pytest.approx(2 + 12.7062, rel=1e-5)
    # Repeats that happen to agree: Cov = 0.5, so B = 0.75, and S = 0.
    agree = Measured((0, 1), np.array([2.0, 2]), np.array([[0.0, 1], [2, 2], [1, 3]]), 3)
    assert crossed_interval(agree).high == pytest.approx(2 + 4.30265 * 0.75**0.5, rel=1e-5)
    # At 90%, with the points of that.
    half = (2.91999 * 1.5 + 6.31375 * 1) / math.sqrt(2.5)
    assert crossed_interval(alike, 0.9).high == pytest.approx(2 + half, rel=1e-5)


def test_the_interval_is_that_of_a_two_way_analysis_of_variance():
    repeats, requests = 3, 40
    generator = np.random.default_rng(1)
    values = generator.normal(0, 1, (repeats, requests)) + generator.normal(0, 1, requests)
    values += np.array([[0.0], [0.2], [0.3]])
    ours = measured(values, request_counts(requests, 20_000), lambda sums: sums / requests)
    rows = values.mean(axis=1, keepdims=True)
    columns = values.mean(axis=0, keepdims=True)
    residual = values - rows - columns + values.mean()
    of_both = (residual**2).sum() / ((repeats - 1) * (requests - 1))
    # E(mean square of requests) = R · Var(b) + Var(c), of repeats N · Var(a) + Var(c).
    shared = (columns.var(ddof=1) * repeats - of_both) / (repeats * requests)
    parts = np.array([shared, rows.var(ddof=1) / repeats])
    points = stats.t.ppf(0.975, [requests - 1, repeats - 1])
    half = points @ parts / math.sqrt(parts.sum())
    found = crossed_interval(ours)
    assert shared > 0
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.mean == pytest.approx(half, rel=0.01)
    assert found.covers == "both"


def test_one_repeat_gives_the_interval_of_its_requests_and_says_so():
    values = np.random.default_rng(2).normal(1, 2, (1, 300))
    found = crossed_interval(measured(values, request_counts(300, 20_000), lambda sums: sums / 300))
    theirs = stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert (found.n, found.covers) == (1, "requests")


def coverage(repeats, spread, requests=200, sims=400):
    """The share of intervals of a paired difference that hold the truth, and their mean half-width.

    In units of the standard error: `spread` is what repeats, requests and both together add to the
    mean of a difference of two shares, which is 0 in truth; requests are skewed. The same for
    requests alone and for Student's t over repeats.
    """
    generator = np.random.default_rng(repeats)
    of_repeats, of_requests, of_both = np.array(spread) / math.sqrt(2)
    weight = generator.gamma(2, 1, (requests, sims, 1))
    # E w² / (E w)² = 1.5 is what the weights add to the variance of a share.
    times = math.sqrt(requests / 1.5)
    shape = (repeats, requests, sims, 2)
    effect = (
        generator.normal(0, of_repeats * math.sqrt(repeats), (repeats, 1, sims, 2))
        + (generator.exponential(1, shape[1:]) - 1) * of_requests * times
        + generator.normal(0, of_both * math.sqrt(repeats) * times, shape)
        # What both settings share is large, and cancels out.
        + generator.normal(0, 5, (repeats, 1, sims, 1))
        + generator.normal(0, 5 * times, (1, requests, sims, 1))
    )
    values = np.stack([weight * effect, np.broadcast_to(weight, shape)], axis=-1)
    one = measured(values, request_counts(requests, draws=200), share)
    each, drawn = (np.diff(numbers)[..., 0] for numbers in (one.each, one.drawn))
    both, alone = [], []
    for sim in range(sims):
        setting = Measured(one.repeats, each[:, sim], drawn[:, :, sim], requests)
        both.append(crossed_interval(setting))
        # The mean over repeats, as if that were the one repeat.
        mean = Measured(
            (0,), setting.each.mean(keepdims=True), setting.drawn.mean(axis=1)[:, None], requests
        )
        alone.append(crossed_interval(mean))
    student = stats.ttest_1samp(each, 0).pvalue > 0.05
    holds = [np.mean([x.low <= 0 <= x.high for x in found]) for found in (both, alone)]
    return [*holds, student.mean()], np.mean([x.high - x.mean for x in both])


# Three standard errors of a share of 0.95 over 400 below it.
COVERED = 0.95 - 3 * math.sqrt(0.95 * 0.05 / 400)


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_95_of_100_intervals_hold_the_truth_however_the_spread_is_made_up(repeats):
    requests_alone, _ = coverage(repeats, (0, 1, 0.3))
    repeats_dominate, _ = coverage(repeats, (3, 1, 0.3))
    mixed, _ = coverage(repeats, (1, 1, 0.5))
    assert min(requests_alone[0], repeats_dominate[0], mixed[0]) > COVERED
    # Neither half of it does alone.
    assert repeats_dominate[1] < 0.8
    assert requests_alone[2] < 0.9


def test_where_repeats_add_nothing_the_interval_is_no_wider_than_requests_make_it():
    (covered, *_), half = coverage(3, (0, 1, 0.05))
    assert covered > COVERED
    assert half == pytest.approx(1.96, rel=0.1)


def test_a_difference_is_paired_over_the_repeats_that_both_have():
    generator = np.random.default_rng(3)
    counts = request_counts(60, draws=100)
    values = of_setting(generator, 3, 60)
    one = measured(values, counts, share, ["a", "b", "c"])
    other = measured(values[[2, 0]], counts, share, ["c", "a"])
    gap = combined(np.subtract, one, other)
    assert gap.repeats == ("a", "c")
    # The same sums, so that nothing is left of what chance does to them.
    assert crossed_interval(gap) == pytest.approx((0, 0, 0, 2, "both"), abs=1e-12)
    assert crossed_interval(one).high > crossed_interval(one).low + 0.1


def test_settings_without_a_repeat_in_common_have_no_difference():
    counts = request_counts(20, draws=30)
    values = of_setting(np.random.default_rng(4), 1, 20)
    one, other = (measured(values, counts, share, [name]) for name in "ab")
    gap = crossed_interval(combined(np.subtract, one, other))
    assert math.isnan(gap.mean)
    assert (gap.n, gap.covers) == (0, "nothing")


def test_a_saving_is_of_the_costs_within_repeats():
    passed = [Measured((0, 1), np.array(k), np.array([k, k]), 9) for k in ([50.0, 60], [100.0, 80])]
    saving = combined(lambda ours, theirs: 1 - (10 + ours) / (10 + theirs), *passed)
    assert crossed_interval(saving).mean == pytest.approx((1 - 60 / 110 + 1 - 70 / 90) / 2)


def test_one_request_gives_a_mean_and_no_interval():
    values = of_setting(np.random.default_rng(5), 3, 1)
    found = crossed_interval(measured(values, request_counts(1, draws=10), share))
    assert found.mean == pytest.approx(share(values[:, 0]).mean())
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert (found.n, found.covers) == (3, "nothing")


def test_a_repeat_without_the_measure_does_not_count():
    generator = np.random.default_rng(6)
    values, counts = of_setting(generator, 4, 60), request_counts(60, draws=100)
    whole = measured(values[:3], counts, share)
    values[3, :, 1] = 0  # a ratio over nothing
    assert crossed_interval(measured(values, counts, share)) == crossed_interval(whole)
    values[..., 1] = 0
    nothing = crossed_interval(measured(values, counts, share))
    assert math.isnan(nothing.mean)
    assert (nothing.n, nothing.covers) == (0, "nothing")


def test_draws_without_the_measure_are_left_out_if_they_are_few():
    each, drawn = np.ones(2), np.random.default_rng(7).normal(1, 1, (100, 2))
    kept = crossed_interval(Measured((0, 1), each, drawn[5:], 30))
    drawn[:5, 0] = math.nan
    assert crossed_interval(Measured((0, 1), each, drawn, 30)) == kept
    drawn[5, 1] = math.nan
    unknown = crossed_interval(Measured((0, 1), each, drawn, 30))
    assert unknown.mean == 1
    assert math.isnan(unknown.low)
    assert math.isnan(unknown.high)
    assert (unknown.n, unknown.covers) == (2, "nothing")


def test_passed_for_on_all_ks_is_the_smallest_that_reaches_the_target():
    generator = np.random.default_rng(8)
    # Not every step rises, as with true value.
    curves = np.cumsum(generator.normal(0.4, 1, (50, 2, 30)), axis=-1)
    curves[..., -1] = np.abs(curves[..., -1]) + 1
    found = passed_for(curves, np.arange(1, 31), 0.9)
    for curve, k in zip(curves.reshape(-1, 30), found.ravel(), strict=True):
        assert k == next(k for k in range(1, 31) if curve[k - 1] / curve[-1] >= 0.9)


def test_passed_for_between_the_ks_lies_on_the_line_and_below_the_first_is_the_first():
    curve = np.array([[5.0, 7, 8], [7.9, 8, 8], [7.1, 7.6, 8]])
    np.testing.assert_array_equal(passed_for(curve, np.array([10, 20, 40]), 0.92), [28, 10, 16])
    np.testing.assert_array_equal(passed_for(curve, np.array([10, 20, 40]), 1), [40, 20, 40])


def test_passed_for_is_unknown_where_there_is_nothing_to_capture():
    curves = np.array([[0.0, 0, 0], [math.nan, 1, 2], [math.nan] * 3])
    found = passed_for(curves, np.array([1, 2, 3]), 0.99)
    np.testing.assert_array_equal(found, [math.nan, 3, math.nan])


def test_a_curve_at_other_ks_is_refused():
    with pytest.raises(ValueError, match="a curve of 3 values at 4 values of k"):
        passed_for(np.ones(3), np.array([1, 2, 3, 4]), 0.99)


def test_repeats_that_agree_exactly_leave_the_variance_of_the_requests() -> None:
    generator = np.random.default_rng(0)
    one = generator.normal(100, 1, 400)
    # The draws of the two repeats vary against each other, and their mean less.
    drawn = np.stack([one, 200 - 0.5 * one - 50], axis=1)
    found = crossed_interval(Measured((0, 1), np.full(2, 100.0), drawn, 1000))
    half = stats.t.ppf(0.975, 999) * np.sqrt(drawn.mean(axis=1).var(ddof=1) * 1000 / 999)
    np.testing.assert_allclose(found.high - found.mean, half, rtol=1e-9)
    assert half > 0
