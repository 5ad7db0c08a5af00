"""The sizes of the funnel, counted in whole requests of the log."""

from typing import Any, NamedTuple

from kd_ranker.sources.logs.infer.guess import Guess, Roles
from kd_ranker.sources.logs.infer.sample import Sample
from kd_ranker.sources.logs.layout import NO_PLACE, split_at_commas
from kd_ranker.sources.logs.sql import literal, quoted

# A log with more rows is not read whole for a first config.
MOST_ROWS = 20_000_000
_UNKNOWN = "what are the sizes of your funnel?"


class FunnelSizes(NamedTuple):
    """The sizes of the funnel, and what is in doubt about them."""

    retrieved: int
    passed: int
    shown: int
    why: str
    check: str

    def guesses(self) -> dict[str, Guess]:
        """Return the guesses by key of the config."""
        report_at = sorted({self.shown, self.passed, min(2 * self.passed, self.retrieved)})
        return {
            "funnel.retrieved": Guess(self.retrieved, self.why, self.check),
            "funnel.passed": Guess(self.passed),
            "funnel.shown": Guess(self.shown),
            "funnel.report_at": Guess(tuple(report_at)),
        }


def count_funnel(sample: Sample, roles: Roles) -> FunnelSizes:
    """Count candidates in one pass over the log, or in the sample of a large one."""
    request = roles.column("request")
    if not request:
        return FunnelSizes(200, 50, 10, "", _UNKNOWN)
    num_rows: Any = sample.frame("count(*)", f"({sample.log})").iat[0, 0]
    is_large = num_rows > MOST_ROWS
    rows = "candidates" if is_large else f"({_sql_of_candidates(sample, roles)})"
    known = f"{quoted(request)} IS NOT NULL"
    # A request may be written twice.
    item = roles.column("item")
    candidates = f"count(DISTINCT {quoted(item)})" if item else "count(*)"
    counts = (
        f"SELECT {candidates} AS candidates, count(*) FILTER ({_sql_of_passed(roles)}) AS passed, "
        f"count(*) FILTER ({_sql_of_shown(roles)}) AS shown "
        f"FROM {rows} WHERE {known} GROUP BY {quoted(request)}"
    )
    sizes = sample.frame("max(candidates), median(passed)::INT, median(shown)::INT", f"({counts})")
    largest, num_passed, num_shown = (int(size) for size in sizes.iloc[0])
    shown = num_shown or min(10, largest)
    passed = max(shown, num_passed or min(largest, 2 * shown))
    if is_large:
        doubt = f"counted in a sample of {len(sample.codes):,} rows; is no request larger?"
    else:
        doubt = "" if num_passed and num_shown else _UNKNOWN
    return FunnelSizes(largest, passed, shown, "the largest request", doubt)


def _sql_of_candidates(sample: Sample, roles: Roles) -> str:
    """Return the SELECT of the columns to count by, a row per candidate."""
    columns = {
        roles.column("request"),
        roles.column("item"),
        roles.column("stage"),
        roles.column("position"),
        *(guess.value for guess in (*roles.labels.values(), *roles.teacher.values())),
    }
    lists = sample.layout.lists
    values = [
        f"unnest({quoted(column)}) AS {quoted(column)}" if column in lists else quoted(column)
        for column in sorted(columns - {""})
    ]
    return f"SELECT {', '.join(values)} FROM ({sample.log})"


def _sql_of_shown(roles: Roles) -> str:
    """Return the condition for candidates that count as shown, as in a dataset."""
    stage = roles.column("stage")
    if stage and "shown" in roles.stages and roles.stages["shown"].value:
        return _has_stage(stage, roles.stages["shown"].value)
    has_place = _has_place(roles.column("position"))
    if stage and "passed" in roles.stages:
        # A label may be known of all: only places tell the shown from the passed.
        return has_place
    labels = _any_known([guess.value for guess in roles.labels.values()])
    return f"({labels} OR {has_place})"


def _has_place(position: str) -> str:
    if not position:
        return "false"
    # It may be a column of texts.
    number = f"try_cast({quoted(position)} AS DOUBLE)"
    return f"({_any_known([position])} AND {number} IS DISTINCT FROM {NO_PLACE})"


def _sql_of_passed(roles: Roles) -> str:
    """Return the condition for candidates that were passed, shown ones among them."""
    shown = _sql_of_shown(roles)
    if roles.column("stage") and "passed" in roles.stages:
        return f"{shown} OR {_has_stage(roles.column('stage'), roles.stages['passed'].value)}"
    scores = [guess.value for guess in roles.teacher.values() if guess.value]
    return f"{shown} OR {_any_known(scores)}" if scores else "false"


def _has_stage(column: str, texts: str) -> str:
    # A truth value is True in a config, and true in SQL.
    listed = ", ".join(literal(text.lower()) for text in split_at_commas(texts))
    return f"lower({quoted(column)}::VARCHAR) IN ({listed})"


def _any_known(columns: list[str]) -> str:
    known = [
        f"coalesce({quoted(column)}::VARCHAR, '') NOT IN ('', 'nan')"
        for column in columns
        if column
    ]
    return f"({' OR '.join(known)})" if known else "false"
