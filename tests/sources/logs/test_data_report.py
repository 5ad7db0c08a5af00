"""The rate of a log's requests."""

import math

import pytest

from kd_ranker.sources.logs.data_report import requests_a_day


def report(**times):
    """The splits of a report: the number of requests, first and last time of each."""
    return {
        "splits": {
            split: {"requests": requests, "first": first, "last": last}
            for split, (requests, first, last) in times.items()
        }
    }


def test_the_rate_is_over_all_splits():
    log = report(
        train=(800, "2026-01-01 00:00:00", "2026-01-04 00:00:00"),
        test=(200, "2026-01-04 12:00:00", "2026-01-06 00:00:00"),
    )
    assert requests_a_day(log) == pytest.approx(1000 / 5)


@pytest.mark.parametrize(
    "log",
    [
        {},  # every row was rejected
        report(train=(800, "NaT", "NaT")),
        report(train=(800, "2026-01-01 00:00:00", "2026-01-01 00:00:00")),
    ],
    ids=["no requests", "no times", "one time"],
)
def test_a_log_without_times_has_no_rate(log):
    assert math.isnan(requests_a_day(log))
