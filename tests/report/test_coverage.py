"""The share of intervals that contain the truth, in simulated studies."""

import numpy as np
import pytest
from scipy import stats

from kd_ranker.report.intervals import Measured, crossed_interval
from tests import small


def coverage(repeats, of_repeats, of_pairs, studies=1000, draws=100):
    """The share for a measure with normal parts.

    Requests add 1 to the variance of the mean, `of_pairs` of it in each repeat separately.
    `of_repeats` is the part of the repeats in the same unit. The width of an interval is
    independent of its mean here, so the share of means within it is known.
    """
    generator = np.random.default_rng(repeats)

    def of_requests(*shape):
        shared = generator.normal(0, np.sqrt(1 - of_pairs), (*shape, 1))
        return shared + generator.normal(0, np.sqrt(of_pairs * repeats), (*shape, repeats))

    each = of_requests(studies) + generator.normal(
        0, np.sqrt(of_repeats * repeats), (studies, repeats)
    )
    drawn = each[:, None] + of_requests(studies, draws)
    names = tuple(range(repeats))
    found = [crossed_interval(Measured(names, *one, 2000)) for one in zip(each, drawn, strict=True)]
    half = np.array([one.high - one.mean for one in found])
    return np.mean(1 - 2 * stats.norm.sf(half / np.sqrt(1 + of_repeats)))


# No variance of repeats, a small part, and the parts of the cascade.
@pytest.mark.parametrize("parts", [(0, 0.2), (0.3, 0.3), (5, 0.2)])
@pytest.mark.parametrize(("repeats", "most"), [(2, 98), (3, 97), (5, 97)])
def test_nominal_95_percent_intervals_are_neither_narrow_nor_wide(repeats, most, parts):
    assert 95 <= round(100 * coverage(repeats, *parts)) <= most


def test_one_repeat_covers_its_requests_only():
    assert coverage(1, 0, 0) == pytest.approx(0.95, abs=0.005)
    # The standard error is too small by √6: 1.96 / √6 = 0.80.
    assert coverage(1, 5, 0) == pytest.approx(1 - 2 * stats.norm.sf(0.80), abs=0.01)


def test_the_script_prints_a_table():
    finished = small.run("scripts/coverage.py", "--studies=2", "--requests=30")
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[4:-1]] == [
        "difference", "mean", "passed_for_99", "saving",
    ]  # fmt: skip
    assert len(lines) == 2 + 4 * 2 * 4
