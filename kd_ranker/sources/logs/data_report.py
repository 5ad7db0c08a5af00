"""Report on a log before a model is trained on it: `data_report.json`, `.html`, rejected rows."""

import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64

from kd_ranker.errors import UserError
from kd_ranker.requests.columns import LEAST_WHOLE
from kd_ranker.requests.request import SPLITS
from kd_ranker.requests.templates import templates_of
from kd_ranker.sources.logs.columns import is_list, wanted_columns
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.files import SQL, Log
from kd_ranker.sources.logs.layout import Feature, LogLayout
from kd_ranker.sources.logs.query import logged
from kd_ranker.sources.logs.sql import quoted

JSON_FILE, PAGE, REJECTED_FOLDER = "data_report.json", "data_report.html", "rejected"
Report = dict[str, Any]
SomeNumbers = Callable[[str], Float64[np.ndarray, "n"]]

# The distance of the teacher's calibration from 1 that causes a remark.
_CALIBRATION_TOLERANCE = 0.1
# The largest request has a remark beyond this multiple of the median.
_FAR = 5
# A user has a remark who has so large a share of the requests, among at least so many users.
MOST_OF_A_USER = 0.1
LEAST_USERS = 20
_NO_PROBABILITIES = (
    ": divide percentages by 100 and take the sigmoid of logits, or set data.teacher_signal='score'"
)
# The columns next to those of the log.
_ADDED = ("reason", "file", "row")
# Reason -> its meaning. A row has the first reason that applies.
REASONS = {
    "lists_differ": "its lists differ in length",
    "no_candidates": "its list of items is empty or missing",
    "missing_request": "the id of the request is missing or invalid",
    "missing_time": "the time is missing or invalid",
    "missing_user": "the id of the user is missing or invalid",
    "missing_item": "the id of the item is missing or invalid",
    "unknown_stage": "the stage is missing or not in data.stages",
    "bad_label": "a label is neither 0 nor 1",
    "several_hours": "its request is longer than data.longest_request: two requests with one id?",
    "several_users": "most rows of its request belong to another user",
    "duplicate_item": "an earlier row of the request has the item, and all positive labels",
    "beyond_retrieved": "its request has more candidates than funnel.retrieved",
}


class Counts(NamedTuple):
    """The counts of a log: rejected candidates by reason, tables of `report.sql`, and leaks."""

    rejected: Mapping[str, int]
    tables: Mapping[str, list[dict[str, Any]]]
    leaks: Mapping[str, Mapping[str, float]]

    def row(self, name: str) -> dict[str, Any]:
        """Return the only row of a table, with 0 for NULL; {} if there is no table."""
        (row,) = self.tables.get(name) or [{}]
        return {column: value or 0 for column, value in row.items()}

    @property
    def candidates(self) -> int:
        """The number of candidates of the log; a row without any counts as one."""
        return self.row("faults_of_rows").get("entries") or self.row("faults_of_candidates")["rows"]

    @property
    def used(self) -> int:
        """The number of candidates that are not rejected."""
        return sum(row["candidates"] for row in self.tables["totals"])

    def moments(self, name: str) -> dict[str, float]:
        """Return the `mean` and `deviation` of a dense feature in training; {} without values.

        They are rounded to 32 bits, which hides the order of summation.
        """
        for table in ("used", "request_rows", "items"):
            row = self.row(f"moments_of_{table}")
            if row.get(f"{name}/number"):
                return {
                    moment: _float32_digits(row[f"{name}/{moment}"])
                    for moment in ("mean", "deviation")
                }
        return {}


def _float32_digits(number: float) -> float:
    """The number with the digits that a 32-bit float has."""
    return float(str(np.float32(number)))


def make_data_report(
    log: Log, layout: LogLayout, counts: Counts, some_numbers: SomeNumbers
) -> Report:
    """Return the report on a log, as values for JSON.

    `some_numbers` returns some numbers of a column; none for a column without numbers.
    """
    rejected = sum(counts.rejected.values())
    report: Report = {
        "log": {
            "path": layout.path,
            "files": len(log.files or [file for file in log.manifest if file != SQL]),
        },
        "candidates": {
            "in_the_log": counts.candidates,
            "used": counts.candidates - rejected,
            "rejected": rejected,
            "by_reason": {
                reason: {"candidates": number, "meaning": REASONS[reason]}
                for reason, number in counts.rejected.items()
            },
        },
        "columns": _columns(layout, counts, some_numbers),
    }
    if counts.used:
        report |= {
            "requests": _requests(counts),
            "splits": _splits(counts),
            "tasks": list(layout.tasks),
            "teacher": {
                "signal": layout.teacher_signal,
                "version": layout.teacher_version,
                "other_version": counts.row("faults_of_candidates").get("other_version", 0),
                "tasks": list(layout.scored_tasks),
            },
            "features": [_feature(feature, counts) for feature in layout.features],
            "ids": counts.row("ids") | counts.row("events"),
        }
    report["remarks"] = [*_remarks(report)]
    return report


def _columns(layout: LogLayout, counts: Counts, some_numbers: SomeNumbers) -> list[dict]:
    """Return the counts of values per column of the config: all, missing and invalid ones."""
    faults: dict[str, dict[str, int]] = {}
    for table in ("rows", "candidates", "items", "requests"):
        for name, number in counts.row(f"faults_of_{table}").items():
            key, _, fault = name.rpartition("/")
            faults.setdefault(f"data.{key}", {})[fault] = number
    columns: list[dict[str, Any]] = [
        {"key": wanted.key, "column": wanted.column, **faults[wanted.key]}
        for wanted in wanted_columns(layout)
        if wanted.key in faults
    ]
    for column in columns:
        bad = column["out_of_range"]
        is_bad_label = column["key"].startswith("data.labels.") and bad > 0
        are_no_probabilities = (
            column["key"].startswith("data.teacher.")
            and layout.teacher_signal == "probability"
            and 2 * bad > column["values"] - column["missing"]
        )
        if is_bad_label or are_no_probabilities:
            column["hint"] = _range_of(some_numbers(column["column"]))
        if are_no_probabilities and column["hint"]:
            column["hint"] += _NO_PROBABILITIES
    return columns


def _range_of(numbers: Float64[np.ndarray, "n"]) -> str:
    return f"{numbers.min():.4g} to {numbers.max():.4g}" if len(numbers) else ""


def _requests(counts: Counts) -> dict[str, Any]:
    rows = sorted(counts.tables["sizes"], key=operator.itemgetter("size"))
    ends = np.cumsum([row["requests"] for row in rows])
    places = {f"{q:g}": np.searchsorted(ends, q * ends[-1]) for q in (0.5, 0.999, 1.0)}
    return {
        "candidates": {q: rows[place]["size"] for q, place in places.items()},
        "several_times": sum(row["several_times"] for row in counts.tables["splits"]),
    }


def _splits(counts: Counts) -> dict[str, dict[str, Any]]:
    """Return the counts of each split that has requests, and rates; None for those of nothing."""
    splits: dict[int, dict[str, Any]] = {}
    for row in sorted(counts.tables["splits"], key=operator.itemgetter("split")):
        splits[row["split"]] = {
            "requests": row["requests"],
            "without_a_label": 0,
            "scored_whole": 0,
            "scored_beyond_passed": 0,
            "first": _time_text(row["first"]),
            "last": _time_text(row["last"]),
        }
    for row in counts.tables["sizes"]:
        split = splits[row["split"]]
        split["without_a_label"] += row["without_label"]
        split["scored_whole"] += row["whole"]
        split["scored_beyond_passed"] += row["whole_beyond"]
    for row in counts.tables["totals"]:
        split = splits[row["split"]]
        for name, number in row.items():
            if name != "split":
                # 12 digits hide the order of summation.
                split[name] = float(f"{number:.12g}") if isinstance(number, float) else number
    return {SPLITS[number]: split for number, split in splits.items()}


def _time_text(seconds: int | None) -> str:
    return str(np.datetime64(seconds, "s")).replace("T", " ")


def _feature(feature: Feature, counts: Counts) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": feature.name, "of": feature.of, "kind": feature.kind}
    if feature.kind == "dense":
        entry |= counts.moments(feature.name)
    for owner in ("items", "requests"):
        if (number := counts.row(f"varying_{owner}").get(feature.name)) is not None:
            entry[f"{owner}_with_several_values"] = number
    if leaks := counts.leaks.get(feature.name):
        entry["reveals"] = dict(leaks)
    return entry


def _remarks(report: Report) -> Iterator[str]:
    """Yield the remarks on a report, one sentence each."""
    for column in report["columns"]:
        key, name = column["key"], f"column {column['column']!r}"
        bad, hint = column["out_of_range"], column.get("hint")
        is_label = key.startswith("data.labels.")
        if bad and (hint or not is_label):
            valid = "0 or 1" if is_label else "in [0, 1]"
            fault = f"are not {valid}; it holds {hint}" if hint else "are invalid"
            yield f"{key}: {bad:,} values of {name} {fault}."
        if "early_scores" in column["key"] and 0 < column["missing"] < column["values"]:
            share = column["missing"] / column["values"]
            yield (
                f"Early score {column['column']!r} is missing for {share:.1%} of the candidates: a "
                "fusion by rank gives them nothing for it."
            )
        if column["values"] and column["missing"] == column["values"]:
            yield f"{key}: {name} is empty."
        zoned = column.get("with_zone", 0)
        times = column["values"] - column["missing"]
        if 0 < zoned < times:
            yield (
                f"{key}: {zoned:,} of {times:,} values of {name} have a time zone; the others are "
                "read as UTC. Write all of them with their zone."
            )
    if "requests" not in report:
        return
    middle, high, largest = report["requests"]["candidates"].values()
    if largest > _FAR * middle:
        yield (
            f"The largest request has {largest:,} candidates; the median is {middle:,}, the 99.9% "
            f"quantile {high:,}: if it is an error, set config.funnel.retrieved={high}, which "
            "rejects the candidates beyond."
        )
    if number := report["requests"]["several_times"]:
        yield f"The rows of {number:,} requests have several times; the earliest counts."
    ids = report["ids"]
    share = ids["requests_of_one_user"] / sum(
        split["requests"] for split in report["splits"].values()
    )
    if ids["users"] >= LEAST_USERS and share >= MOST_OF_A_USER:
        yield (
            f"One user has {share:.0%} of the requests: if its id stands for users without an "
            "account, give each of their requests a user of its own, by data.sql."
        )
    splits = report["splits"]
    num_retrieved = sum(split["retrieved"] for split in splits.values())
    num_passed = sum(split["passed"] for split in splits.values())
    if not num_retrieved and not num_passed:
        yield "All candidates were shown, so a funnel is measured within what was shown."
    elif not num_retrieved:
        yield (
            "No candidate was retrieved and not passed: the log lacks those, so survival and the "
            "numbers of candidates are among the passed ones."
        )
    for name, split in splits.items():
        yield from _remarks_on_split(name, split, report["tasks"])
    yield from _remarks_on_teacher(report)
    yield from _remarks_on_features(report["features"])
    if unknown := report["ids"].get("history_events_of_unknown_items"):
        yield (
            f"{unknown:,} of {report['ids']['history_events']:,} events of histories are of items "
            "that are never a candidate, and are left out."
        )


def _remarks_on_split(name: str, split: dict, tasks: Sequence[str]) -> Iterator[str]:
    if without := split["without_a_label"]:
        share = f"{without / split['requests']:.1%}"
        yield f"{without:,} of {split['requests']:,} {name} requests ({share}) have no label."
    if unlabeled := split["shown"] - split["labeled"]:
        yield (
            f"{unlabeled:,} of {split['shown']:,} shown candidates in {name} lack a label or have "
            "label weight 0, and are not learned from by labels."
        )
    for task in tasks:
        if positives := split[f"positives_not_shown/{task}"]:
            yield (
                f"{positives:,} candidates in {name} that were not shown have label 1 of {task}; "
                "labels count only where a candidate was shown."
            )


def _remarks_on_teacher(report: Report) -> Iterator[str]:
    teacher = report["teacher"]
    if other := teacher["other_version"]:
        yield (
            f"{other:,} candidates were scored by another teacher than version "
            f"{teacher['version']!r}, and their values do not count."
        )
    test = report["splits"].get("test", {})
    share = test.get("scored_share", 1.0)
    are_all_whole = bool(test) and test["scored_whole"] == test["requests"]
    whole = test.get("scored_beyond_passed", 0)
    if whole and not are_all_whole:
        yield (
            f"Scored whole by the final ranker, beyond the passed candidates: {whole:,} of "
            f"{test['requests']:,} test requests. The numbers of candidates to pass "
            "(passed_for_99) are measured on these."
        )
    elif share < LEAST_WHOLE and not are_all_whole:
        yield (
            f"Scored by the final ranker: {share:.1%} of the test candidates. So the numbers of "
            "candidates to pass (passed_for_99) have bounds only. To count them, let the final "
            "ranker score all candidates of 1 request in 200."
        )
    for task in teacher["tasks"]:
        ratio = report["splits"].get("train", {}).get(f"predicted_over_observed/{task}")
        if ratio is not None and abs(ratio - 1) > _CALIBRATION_TOLERANCE:
            yield (
                f"The teacher of {task} predicts {ratio:.2f} times the rate of labels on shown "
                "candidates of training requests."
            )


def _remarks_on_features(features: Sequence[dict]) -> Iterator[str]:
    """Yield the remarks on features; numbers of a vector that share a remark have one."""
    named: dict[tuple[str, str], list[str]] = {}
    for feature in features:
        column = feature["name"].partition("[")[0]  # of a vector, as in name[3]
        for remark in _remarks_on_feature(feature):
            named.setdefault((column, remark), []).append(feature["name"])
    for (column, remark), names in named.items():
        who = f"{names[0]!r}" if len(names) == 1 else f"{column!r} ({len(names)} of its numbers)"
        yield f"Feature {who} {remark}"


def _remarks_on_feature(feature: dict) -> Iterator[str]:
    """Yield the remarks on a feature, without its name."""
    has_moments = feature["kind"] == "dense" and feature["of"] != "event"
    if has_moments and not feature.get("deviation"):
        yield "has the same value everywhere."
    if number := feature.get("items_with_several_values"):
        yield f"varies in {number:,} items; the last value by time is stored."
    if number := feature.get("requests_with_several_values"):
        yield f"varies within {number:,} requests; that of the first row counts."
    for answer, share in feature.get("reveals", {}).items():
        what = f"reveals {share:.0%} of the uncertainty of the {answer}"
        if answer == "shown":
            what = f"reveals {share:.0%} of which candidates were shown"
        elif answer.startswith("teacher"):
            what = f"orders candidates like the {answer} (rank correlation {share:.2f})"
        elif answer == "order":
            what = f"has {share:.0%} of the shown candidates first, more than chance"
        elif answer.startswith("known_"):
            stage = answer.removeprefix("known_")
            what = f"is known {share:.0%} as often where a candidate was not {stage}"
        yield f"{what}: is it known before they are ranked?"


def write_data_report(report: Report, folder: Path) -> None:
    """Write `data_report.json` and `data_report.html`, a page without other files."""
    (folder / JSON_FILE).write_text(json.dumps(report, indent=2, allow_nan=False))
    templates = templates_of("kd_ranker.sources.logs")
    templates.filters["number"] = _format_number
    templates.filters["percent"] = _format_percent
    page = templates.get_template("data_report.html").render(report=report)
    (folder / PAGE).write_text(page)


def _format_number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _format_percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def count_rejected(database: Database) -> dict[str, int]:
    """Return the number of rejected candidates by reason, in the order of `REASONS`."""
    query = "SELECT why, sum(entries)::BIGINT AS entries FROM rejected GROUP BY why"
    counts = {row["why"]: row["entries"] for row in database.rows(query)}
    return {reason: counts[reason] for reason in REASONS if reason in counts}


def write_rejected(
    database: Database, log: Log, layout: LogLayout, types: Mapping[str, pa.DataType], folder: Path
) -> None:
    """Write the rejected rows of `reported` to `rejected/rejected.parquet`, in the log's order.

    It has `reason`, `file` and `row`, the row's number in that file from 0, and all columns of the
    log. If a row is a request and only some of its candidates are rejected, each of these has a row
    with only its values in the lists.

    The folder is made if any row was rejected. `types` are those of the columns of the log.
    """
    if not database.number("SELECT count(*) FROM reported"):
        return
    wanted = wanted_columns(layout)
    listed = {column.column for column in wanted if column.per_candidate}
    read_already: set[str] = set()
    if not layout.by_request:
        read_already = {feature.column for feature in layout.features if feature.of_request}
    columns = []
    for name, type_ in types.items():
        table = "reported_columns" if name in read_already else "log"
        column = f"{table}.{logged(name)}"
        value = column
        if name in listed and is_list(type_):
            is_whole = f"place < 0 OR {column} IS NULL"
            value = f"CASE WHEN {is_whole} THEN {column} ELSE {column}[place + 1:place + 1] END"
        new_name = f"{name}_" if name in _ADDED else name
        columns.append(f"{value} AS {quoted(new_name)}")
    batches = database.stream(f"""
        SELECT why AS reason, file, "row", {", ".join(columns)}
        FROM log JOIN reported USING (file, "row")
        {'JOIN reported_columns USING (file, "row")' if read_already else ""}
        ORDER BY file, "row", place""")
    paths = pa.array(log.files or [SQL])
    folder.mkdir()
    schema = batches.schema.set(1, pa.field("file", pa.string()))
    with pq.ParquetWriter(folder / "rejected.parquet", schema) as writer:
        for batch in batches:
            writer.write_batch(batch.set_column(1, "file", paths.take(batch["file"])))


def read_data_report(folder: Path) -> Report | None:
    """Return the report that `write_data_report` wrote to a folder; None without one.

    Raises:
      UserError: it is damaged.
    """
    path = folder / JSON_FILE
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); make the dataset again, or copy it from there"
        ) from error


def requests_a_day(report: Report) -> float:
    """Return how many requests a day a log holds, from its first to its last; NaN without times."""
    splits = report.get("splits", {}).values()
    first = np.array([split["first"] for split in splits], "datetime64[s]")
    last = np.array([split["last"] for split in splits], "datetime64[s]")
    span = (last.max() - first.min()) / np.timedelta64(1, "D") if len(first) else 0.0
    # The span is NaN if a split has no times.
    return sum(split["requests"] for split in splits) / span if span > 0 else float("nan")
