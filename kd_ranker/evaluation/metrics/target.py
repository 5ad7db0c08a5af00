"""The main target: the share of the final value that a funnel must keep to be as good as the whole.

Its name in columns, and the columns by which rankers are compared, follow from it.
"""

from kd_ranker.evaluation.metrics.metric import percent

TARGET = 0.99
"""A share in (0, 1)."""

PERCENT = f"{percent(TARGET)}%"
"""The same for people."""


def at_target(metric: str) -> str:
    """Return the column of a metric at the main target.

    >>> at_target("passed_for")
    'passed_for_99'
    """
    return f"{metric}_{percent(TARGET)}"


CRITERION = at_target("passed_for")
"""Rankers are compared by it: the smaller mean over repeats is chosen."""

SCORED = at_target("scored_for")
"""The mean number of candidates that the final ranker scores then: its part of the cost."""
