"""Report on a log before a model is trained on it: `data_report.json` and `.html`."""

import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.requests.templates import templates_of
from kd_ranker.sources.logs.files import SQL, Log, wanted_columns
from kd_ranker.sources.logs.layout import Feature, LogLayout
from kd_ranker.sources.logs.leaks import remarks_of
from kd_ranker.sources.logs.rejected import REASONS

JSON_FILE, PAGE = "data_report.json", "data_report.html"
Report = dict[str, Any]
SomeNumbers = Callable[[str], Float64[np.ndarray, "n"]]
# Counts of the values of a column: all, missing, invalid, and cut off from lists.
FAULTS = ("values", "missing", "out_of_range", "cut_off")

# The distance of the teacher's calibration from 1 that causes a remark.
_CALIBRATION_TOLERANCE = 0.1
# The largest request has a remark beyond this multiple of the median.
_FAR = 5
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)


class Counts(NamedTuple):
    """The counts of a log.

    Attributes:
      rejected: reason -> number of rejected candidates.
      tables: name of a table of `report.sql` -> its rows.
      leaks: feature -> `leaks.find_leaks`.
    """

    rejected: Mapping[str, int]
    tables: Mapping[str, list[dict[str, Any]]]
    leaks: Mapping[str, Mapping[str, float]]

    def row(self, name: str) -> dict[str, Any]:
        """Return the only row of a table, with 0 for NULL; {} if there is no table."""
        (row,) = self.tables.get(name) or [{}]
        return {column: value or 0 for column, value in row.items()}

    @property
    def faults(self) -> dict[str, dict[str, int]]:
        """Key of the config that names a column -> the counts of `FAULTS`."""
        faults: dict[str, dict[str, int]] = {}
        for table in ("rows", "candidates", "items", "requests"):
            if table in ("items", "requests") and not self.used:
                continue
            for name, number in self.row(f"faults_of_{table}").items():
                key, slash, fault = name.rpartition("/")
                if slash:
                    faults.setdefault(key, dict.fromkeys(FAULTS, 0))[fault] = number
        return faults

    @property
    def rows(self) -> int:
        """The number of rows of the log."""
        return self.row("faults_of_rows").get("rows") or self.row("faults_of_candidates")["rows"]

    @property
    def candidates(self) -> int:
        """The number of candidates of the log; a row without any counts as one."""
        return self.row("faults_of_rows").get("entries") or self.row("faults_of_candidates")["rows"]

    @property
    def used(self) -> int:
        """The number of candidates that are not rejected."""
        return sum(row["candidates"] for row in self.tables["totals"])

    def moments(self, name: str) -> dict[str, float]:
        """Return `number`, `mean`, `deviation`, `low` and `high` of a dense feature in training.

        They are rounded to 32 bits, which hides the order of summation.
        """
        for table in ("used", "request_rows", "items"):
            row = self.row(f"moments_of_{table}")
            if row.get(f"{name}/number"):
                of = ("number", "mean", "deviation", "low", "high")
                return {of: float(str(np.float32(row[f"{name}/{of}"]))) for of in of}
        return {}


def make_data_report(
    log: Log, layout: LogLayout, counts: Counts, some_numbers: SomeNumbers
) -> Report:
    """Return the report on a log, as values for JSON.

    Args:
      log: the log.
      layout: of the log.
      counts: its counts.
      some_numbers: returns some numbers of a column; none for a column without numbers.
    """
    rejected = sum(counts.rejected.values())
    read = log.files or [file for file in log.manifest if file != SQL]
    report: Report = {
        "log": {
            "path": layout.path,
            "files": len(read),
            "bytes": sum(log.manifest[file][0] for file in read),
            "rows": counts.rows,
            "row_is_a": "request" if layout.by_request else "candidate",
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
        "columns": _columns(layout, counts.faults, some_numbers),
        "remarks": [],
    }
    if counts.used:
        report |= {
            "requests": _requests(layout, counts),
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
    report["remarks"] = remarks(report)
    return report


def _columns(
    layout: LogLayout, faults: Mapping[str, Mapping[str, int]], some_numbers: SomeNumbers
) -> list[dict]:
    """Return the counts of missing and invalid values per column of the config."""
    columns: list[dict[str, Any]] = [
        {"key": of.key, "column": of.column, **faults[name]}
        for of in wanted_columns(layout)
        if (name := of.key.removeprefix("data.")) in faults
    ]
    for column in columns:
        bad, number = column["out_of_range"], column["values"] - column["missing"]
        is_probability = column["key"].startswith("data.teacher.")
        is_probability &= layout.teacher_signal == "probability"
        if is_probability and 2 * bad > number:
            column["hint"] = _probability_hint(some_numbers(column["column"]))
        elif bad and column["key"].startswith("data.labels."):
            column["hint"] = _label_hint(some_numbers(column["column"]))
    return columns


def _probability_hint(numbers: Float64[np.ndarray, "n"]) -> str:
    """Return the range of numbers that should be probabilities, in words."""
    if not len(numbers):
        return ""
    low, high = numbers.min(), numbers.max()
    found = f"{low:.4g} to {high:.4g}"
    if low < 0:
        return f"{found}: logits? then take their sigmoid, or set data.teacher_signal='score'"
    return f"{found}: percentages? then divide by 100" if high <= 100 else found


def _label_hint(numbers: Float64[np.ndarray, "n"]) -> str:
    """Return the most frequent number of a column of labels except 0 and 1, in words."""
    others, times = np.unique(numbers[(numbers != 0) & (numbers != 1)], return_counts=True)
    return f"for example {others[times.argmax()]:.4g}" if len(others) else ""


def _requests(layout: LogLayout, counts: Counts) -> dict:
    number = np.zeros(layout.retrieved + 1, np.int64)
    for row in counts.tables["sizes"]:
        number[row["size"]] += row["requests"]
    cutoffs = counts.row("cutoffs")
    return {
        "split_by": layout.split,
        "cutoffs": {split: _date(time) for split, time in cutoffs.items()} or None,
        "candidates_a_request": {
            "mean": float((number * np.arange(len(number))).sum() / number.sum()),
            "quantiles": {f"{q:g}": _quantile(number, q) for q in _QUANTILES},
        },
        **{
            name: sum(row[name] for row in counts.tables["splits"])
            for name in ("several_times", "several_users")
        },
    }


def _splits(counts: Counts) -> dict[str, dict[str, Any]]:
    """Return the counts of each split that has requests, and rates; None for those of nothing."""
    splits: dict[str, dict[str, Any]] = {}
    for row in sorted(counts.tables["splits"], key=operator.itemgetter("split")):
        times = {name: _date(row[name]) for name in ("first", "last")}
        splits[SPLITS[row["split"]]] = {"requests": row["requests"], "without_a_label": 0, **times}
    for row in counts.tables["sizes"]:
        splits[SPLITS[row["split"]]]["without_a_label"] += row["without_label"]
    for row in counts.tables["totals"]:
        rounded = {name: _rounded(of) for name, of in row.items() if name != "split"}
        splits[SPLITS[row["split"]]] |= rounded
    return splits


def _quantile(number: Int64[np.ndarray, "n"], q: float) -> int:
    """Return the lower quantile of sizes; `number[s]` of them are s."""
    return int(np.searchsorted(np.cumsum(number), int(q * (number.sum() - 1)) + 1))


def _feature(feature: Feature, counts: Counts) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": feature.name, "of": feature.of, "kind": feature.kind}
    if moments := feature.kind == "dense" and counts.moments(feature.name):
        entry |= {name: moments[name] for name in ("mean", "deviation", "low", "high")}
    if values := counts.row(f"counts:{feature.name}"):
        entry |= {
            "values_in_train": values["values_in_train"],
            "values_kept": values["values_kept"],
            "share_kept_in_train": _ratio(values["train_kept"], values["train"]),
            "share_kept_elsewhere": _ratio(values["elsewhere_kept"], values["elsewhere"]),
        }
    owner = "items" if feature.of == "item" else "requests"
    if (number := counts.row(f"varying_{owner}").get(feature.name)) is not None:
        entry[f"{owner}_with_several_values"] = number
    if leaks := counts.leaks.get(feature.name):
        entry["reveals"] = dict(leaks)
    return entry


def remarks(report: Report) -> list[str]:
    """Return the remarks on a report, one sentence each."""
    sentences = []
    candidates = report["candidates"]
    if candidates["rejected"]:
        reasons = ", ".join(
            f"{name} {entry['candidates']:,}" for name, entry in candidates["by_reason"].items()
        )
        share = candidates["rejected"] / max(candidates["in_the_log"], 1)
        sentences.append(
            f"{candidates['rejected']:,} of {candidates['in_the_log']:,} candidates "
            f"({share:.2%}) were rejected: {reasons}."
        )
    for column in report["columns"]:
        if hint := column.get("hint"):
            valid = "in [0, 1]" if column["key"].startswith("data.teacher") else "0 or 1"
            sentences.append(
                f"{column['key']}: {column['out_of_range']:,} values of column "
                f"{column['column']!r} are not {valid}: {hint}."
            )
        elif column["out_of_range"] and not column["key"].startswith("data.labels"):
            sentences.append(
                f"{column['key']}: {column['out_of_range']:,} values of column "
                f"{column['column']!r} are invalid."
            )
        if column["values"] and column["missing"] == column["values"]:
            sentences.append(f"{column['key']}: column {column['column']!r} is empty.")
    if "requests" in report:
        sentences += _remarks_on_requests(report["requests"])
        if not any(of["retrieved"] or of["passed"] for of in report["splits"].values()):
            sentences.append(
                "All candidates were shown, so a funnel is measured within what was shown."
            )
        for split, of in report["splits"].items():
            sentences += _remarks_on_split(split, of, report)
        sentences += _remarks_on_teacher(report)
        sentences += _remarks_on_features(report["features"], report["ids"])
    return sentences


def _remarks_on_requests(requests: dict) -> list[str]:
    sentences = []
    sizes = requests["candidates_a_request"]["quantiles"]
    if sizes["1"] > _FAR * sizes["0.5"]:
        sentences.append(
            f"The largest request has {sizes['1']:,} candidates; the median is {sizes['0.5']:,}, "
            f"the 99.9% quantile {sizes['0.999']:,}: if it is an error, set "
            f"config.funnel.retrieved={sizes['0.999']}, which rejects the candidates beyond."
        )
    if requests["several_times"]:
        sentences.append(
            f"The rows of {requests['several_times']:,} requests have several times; the earliest "
            "counts."
        )
    if requests["several_users"]:
        sentences.append(f"{requests['several_users']:,} requests have rows of several users.")
    return sentences


def _remarks_on_split(split: str, of: dict, report: Report) -> list[str]:
    sentences = []
    if without := of["without_a_label"]:
        sentences.append(
            f"{without:,} of {of['requests']:,} {split} requests ({without / of['requests']:.1%}) "
            "have no label."
        )
    if unlabelled := of["shown"] - of["labelled"]:
        sentences.append(
            f"{unlabelled:,} of {of['shown']:,} shown candidates in {split} lack a label or have "
            "label weight 0, and are not learned from by labels."
        )
    sentences += [
        f"{positives:,} candidates in {split} that were not shown have label 1 of {task}; labels "
        "count only where a candidate was shown."
        for task in report["tasks"]
        if (positives := of[f"positives_not_shown/{task}"])
    ]
    for task in report["teacher"]["tasks"]:
        share = of[f"coverage/{task}/passed"]
        if share is not None and share < 1:
            sentences.append(
                f"The teacher of {task} covers {share:.1%} of the passed candidates in {split}."
            )
    return sentences


def _remarks_on_teacher(report: Report) -> list[str]:
    sentences, teacher = [], report["teacher"]
    if teacher["other_version"]:
        sentences.append(
            f"{teacher['other_version']:,} candidates were scored by another teacher than version "
            f"{teacher['version']!r}, and their values do not count."
        )
    for task in teacher["tasks"]:
        ratio = report["splits"].get("train", {}).get(f"predicted_over_observed/{task}")
        if ratio is not None and abs(ratio - 1) > _CALIBRATION_TOLERANCE:
            sentences.append(
                f"The teacher of {task} predicts {ratio:.2f} times the rate of labels on shown "
                "candidates of training requests."
            )
    return sentences


def _remarks_on_features(features: list[dict], ids: dict) -> list[str]:
    sentences = []
    for feature in features:
        has_moments = feature["kind"] == "dense" and feature["of"] != "event"
        if has_moments and feature.get("deviation", 0) == 0:
            sentences.append(f"Feature {feature['name']!r} has the same value everywhere.")
        if number := feature.get("items_with_several_values"):
            sentences.append(
                f"Feature {feature['name']!r} varies in {number:,} items; the last value by time "
                "is stored."
            )
        if number := feature.get("requests_with_several_values"):
            sentences.append(
                f"Feature {feature['name']!r} varies within {number:,} requests; that of the first "
                "row counts."
            )
        sentences += remarks_of(feature.get("reveals", {}), feature["name"])
    if unknown := ids.get("history_events_of_unknown_items"):
        sentences.append(
            f"{unknown:,} of {ids['history_events']:,} events of histories are of items that are "
            "never a candidate, and are left out."
        )
    return sentences


def write_data_report(report: Report, folder: Path) -> None:
    """Write `data_report.json` and `data_report.html`."""
    (folder / JSON_FILE).write_text(json.dumps(report, indent=2, allow_nan=False))
    (folder / PAGE).write_text(data_report_page(report))


def read_data_report(folder: Path) -> Report | None:
    """Return the report that `write_data_report` wrote to a folder; None without one.

    Raises:
      UserError: it is damaged.
    """
    path = folder / JSON_FILE
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); make the dataset again, or copy it from there"
        ) from error


def data_report_page(report: Report) -> str:
    """Return the page as HTML without other files."""
    templates = templates_of("kd_ranker.sources.logs")
    templates.filters["number"] = _number
    templates.filters["percent"] = lambda share: "" if share is None else f"{share:.1%}"
    return templates.get_template("data_report.html").render(report=report, splits=SPLITS)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _ratio(numerator: float, denominator: float) -> float | None:
    return _rounded(numerator / denominator) if denominator else None


def _rounded(value: Any) -> Any:
    """Return a number with 12 digits, which hide the order of summation."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _date(seconds: int) -> str:
    """Return a time in UTC, as 2024-01-31 23:59:59."""
    return str(np.datetime64(seconds, "s")).replace("T", " ")
