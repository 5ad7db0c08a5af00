"""Report on a log before a model is trained on it: `data_report.json` and `.html`."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.requests.templates import templates_of
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.grouped import Cutoffs
from kd_ranker.sources.logs.layout import STAGES, Feature, LogLayout
from kd_ranker.sources.logs.leaks import remarks_of
from kd_ranker.sources.logs.looks import label_hint, probability_hint, size_hint
from kd_ranker.sources.logs.reasons import MEANING, Reason
from kd_ranker.sources.logs.statistics import NO_MOMENTS, Moments, Statistics

JSON_FILE, PAGE = "data_report.json", "data_report.html"
Report = dict[str, Any]

# Beyond it, a teacher's probabilities are so far from the labels that the report says so.
_CALIBRATION_TOLERANCE = 0.1
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)


class Found(NamedTuple):
    """All that was counted in a log.

    Attributes:
      rows: of the log.
      entries: its candidates; a row without any counts as one.
      counts: how many candidates each reason has cost.
      faults: name in the config, such as `features.age` -> `FAULTS`.
      other_version: how many candidates have teacher values of a version that does not count.
      cutoffs: the times at which splits begin, with a split by time.
      statistics: of what is used; None if nothing is left. The rest is empty then.
      steps_back: how many requests begin in the log behind one of a later time.
      moments: dense feature -> its moments in training.
      values: categorical feature -> `numbered.counts_of_values`.
      varying: feature -> how many requests, or items, have several values of it.
      ids: `numbered.counts_of_ids` and `counts_of_history`.
      tells: feature -> `leaks.tell_tales`.
    """

    rows: int
    entries: int
    counts: Int64[np.ndarray, "reasons"]
    faults: Mapping[str, Mapping[str, int]]
    other_version: int
    cutoffs: Cutoffs | None
    statistics: Statistics | None = None
    steps_back: int = 0
    moments: Mapping[str, Moments] = MappingProxyType({})
    values: Mapping[str, Mapping[str, int]] = MappingProxyType({})
    varying: Mapping[str, int] = MappingProxyType({})
    ids: Mapping[str, int] = MappingProxyType({})
    tells: Mapping[str, Mapping[str, float]] = MappingProxyType({})


def make_data_report(log: Log, layout: LogLayout, found: Found) -> Report:
    """Makes the report of what was found in a log, of values that JSON can hold."""
    counts, statistics = found.counts, found.statistics
    rejected = int(counts.sum())
    report: Report = {
        "log": {
            "path": layout.path,
            "files": len(log.files),
            "bytes": sum(log.sizes),
            "rows": found.rows,
            "row_is_a": "request" if layout.by_request else "candidate",
        },
        "candidates": {
            "in_the_log": found.entries,
            "used": found.entries - rejected,
            "rejected": rejected,
            "by_reason": {
                reason.name.lower(): {"candidates": int(counts[reason]), "meaning": MEANING[reason]}
                for reason in Reason
                if counts[reason]
            },
        },
        "columns": _columns(log, layout, found.faults),
        "remarks": [],
    }
    if statistics is not None:
        report |= {
            "requests": _requests(layout, statistics, found),
            "stages": _stages(statistics),
            "labels": _labels(layout, statistics),
            "teacher": _teacher(layout, statistics, found.other_version),
            "features": [_feature(feature, found) for feature in layout.features],
            "ids": dict(found.ids),
        }
    report["remarks"] = remarks(report)
    return report


def _columns(log: Log, layout: LogLayout, faults: Mapping[str, Mapping[str, int]]) -> list[dict]:
    """Missing and bad values of each column that the config names."""
    column_of = {f"columns.{name}": column for name, column in layout.columns.items()}
    for section in ("labels", "teacher"):
        column_of |= {f"{section}.{task}": c for task, c in getattr(layout, section).items()}
    column_of |= {f"features.{feature.key}": feature.column for feature in layout.features}
    columns: list[dict[str, Any]] = [
        {"key": f"data.{name}", "column": column_of[name], **faults[name]}
        for name in column_of
        if name in faults
    ]
    for column in columns:
        bad, number = column["out_of_range"], column["values"] - column["missing"]
        is_probability = column["key"].startswith("data.teacher.")
        is_probability &= layout.teacher_signal == "probability"
        if is_probability and 2 * bad > number:
            column["hint"] = probability_hint(log, column["column"])
        elif bad and column["key"].startswith("data.labels."):
            column["hint"] = label_hint(log, column["column"])
    return columns


def _requests(layout: LogLayout, statistics: Statistics, found: Found) -> dict:
    totals, cutoffs = statistics.totals, found.cutoffs
    number = totals["candidates_a_request"]
    result: dict[str, Any] = {
        "split_by": layout.split,
        "cutoffs": {split: _date(time) for split, time in cutoffs._asdict().items()}
        if cutoffs
        else None,
        "several_times": int(totals["several_times"]),
        "several_users": int(totals["several_users"]),
        "earlier_than_the_one_before": found.steps_back,
        "candidates_a_request": {
            "mean": float((number * np.arange(len(number))).sum() / number.sum()),
            "quantiles": {f"{q:g}": _quantile(number, q) for q in _QUANTILES},
            "histogram": _histogram(number),
        },
    }
    for index, split in enumerate(SPLITS):
        some = totals["requests"][index] > 0
        result[split] = {
            "requests": int(totals["requests"][index]),
            "candidates": int(totals["candidates"][index]),
            "without_a_label": int(totals["without_label"][index]),
            "first": _date(int(statistics.first[index])) if some else None,
            "last": _date(int(statistics.last[index])) if some else None,
        }
    return result


def _quantile(number: Int64[np.ndarray, "n"], q: float) -> int:
    """The quantile of sizes, `number[s]` of them s; the lower one where it is between two."""
    return int(np.searchsorted(np.cumsum(number), int(q * (number.sum() - 1)) + 1))


def _histogram(number: Int64[np.ndarray, "n"]) -> list[dict]:
    """At most 20 bars over the range that occurs."""
    used = np.flatnonzero(number)
    low, high = int(used[0]), int(used[-1])
    edges = np.unique(np.linspace(low, high + 1, min(20, high + 1 - low) + 1).astype(int))
    return [
        {"from": int(start), "to": int(end) - 1, "requests": int(number[start:end].sum())}
        for start, end in itertools.pairwise(edges)
    ]


def _stages(statistics: Statistics) -> list[dict]:
    stages = statistics.totals["stages"]
    return [
        {"split": split, **{name: int(n) for name, n in zip(STAGES, stages[index], strict=True)}}
        for index, split in enumerate(SPLITS)
    ]


def _labels(layout: LogLayout, statistics: Statistics) -> dict:
    totals = statistics.totals
    shown = totals["stages"][:, 2]
    by_task = {}
    for task_index, task in enumerate(layout.tasks):
        by_task[task] = {
            split: {
                "positives": int(totals["positives"][index, task_index]),
                "rate": _ratio(
                    totals["weighted_positives"][index, task_index], totals["label_weight"][index]
                ),
            }
            for index, split in enumerate(SPLITS)
        } | {"positives_not_shown": int(totals["positives_not_shown"][task_index])}
    return {
        "shown": {split: int(shown[index]) for index, split in enumerate(SPLITS)},
        "labelled": {split: int(totals["labelled"][index]) for index, split in enumerate(SPLITS)},
        "tasks": by_task,
    }


def _teacher(layout: LogLayout, statistics: Statistics, other_version: int) -> dict:
    if not layout.scored_tasks:
        return {"signal": layout.teacher_signal, "tasks": {}, "other_version": 0}
    totals = statistics.totals
    by_task: dict[str, dict] = {}
    for index, task in enumerate(layout.tasks):
        if task not in layout.scored_tasks:
            continue
        coverage = {
            split: {
                stage: _ratio(totals["teacher_proper"][s, index, place], totals["stages"][s, place])
                for place, stage in enumerate(STAGES)
            }
            for s, split in enumerate(SPLITS)
        }
        by_task[task] = {"coverage": coverage}
        if layout.teacher_signal == "probability":
            weight, predicted, observed = totals["calibration"][index].T
            by_task[task]["calibration"] = {
                "predicted_over_observed": _ratio(predicted.sum(), observed.sum()),
                "bins": [
                    {
                        "weight": float(w),
                        "predicted": float(p / w),
                        "observed": float(o / w),
                    }
                    for w, p, o in zip(weight, predicted, observed, strict=True)
                    if w > 0
                ],
            }
    return {
        "signal": layout.teacher_signal,
        "version": layout.teacher_version,
        "other_version": other_version,
        "tasks": by_task,
    }


def _feature(feature: Feature, found: Found) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": feature.name, "of": feature.of, "kind": feature.kind}
    moments = found.moments.get(feature.name, NO_MOMENTS)
    if moments.number:
        names = ("mean", "deviation", "low", "high")
        entry |= {name: getattr(moments, name) for name in names}
    if values := found.values.get(feature.name):
        entry |= {
            "values_in_train": values["values_in_train"],
            "values_kept": values["values_kept"],
            "share_kept_in_train": _ratio(values["train_kept"], values["train"]),
            "share_kept_elsewhere": _ratio(values["elsewhere_kept"], values["elsewhere"]),
        }
    if feature.name in found.varying:
        owner = "items" if feature.of == "item" else "requests"
        entry[f"{owner}_with_several_values"] = found.varying[feature.name]
    if tells := found.tells.get(feature.name):
        entry["tells"] = dict(tells)
    return entry


def remarks(report: Report) -> list[str]:
    """Findings of a report that deserve a look, a sentence each."""
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
            lie = "in [0, 1]" if column["key"].startswith("data.teacher") else "0 or 1"
            sentences.append(
                f"{column['key']}: {column['out_of_range']:,} values of column "
                f"{column['column']!r} are not {lie}, but {hint}."
            )
        elif column["out_of_range"] and not column["key"].startswith("data.labels"):
            sentences.append(
                f"{column['key']}: {column['out_of_range']:,} values of column "
                f"{column['column']!r} are none that it can hold."
            )
        if column["values"] and column["missing"] == column["values"]:
            sentences.append(f"{column['key']}: column {column['column']!r} holds nothing.")
    if "requests" in report:
        sentences += _remarks_on_requests(report["requests"])
        sentences += _remarks_on_labels(report["labels"])
        sentences += _remarks_on_teacher(report["teacher"])
        sentences += _remarks_on_features(report["features"], report["ids"])
    return sentences


def _remarks_on_requests(requests: dict) -> list[str]:
    sentences = [
        f"{without:,} of {(number := requests[split]['requests']):,} {split} requests "
        f"({without / number:.1%}) have no label."
        for split in SPLITS
        if (without := requests[split]["without_a_label"])
    ]
    sizes = requests["candidates_a_request"]["quantiles"]
    if hint := size_hint(sizes["0.5"], sizes["0.999"], sizes["1"]):
        sentences.append(f"{hint[0].upper()}{hint[1:]}.")
    if requests["several_times"]:
        sentences.append(
            f"The rows of {requests['several_times']:,} requests have several times; the earliest "
            "counts."
        )
    if requests["several_users"]:
        sentences.append(f"{requests['several_users']:,} requests have rows of several users.")
    return sentences


def _remarks_on_labels(labels: dict) -> list[str]:
    sentences = []
    for split in SPLITS:
        unlabelled = labels["shown"][split] - labels["labelled"][split]
        if unlabelled:
            sentences.append(
                f"{unlabelled:,} of {labels['shown'][split]:,} shown candidates in {split} lack a "
                "label or have label weight 0, and teach nothing by labels."
            )
    for task, entry in labels["tasks"].items():
        if entry["positives_not_shown"]:
            sentences.append(
                f"{entry['positives_not_shown']:,} candidates that were not shown have label 1 of "
                f"{task}; labels of what was not shown do not count."
            )
        sentences += [
            f"Every label of {task} in {split} is {entry[split]['rate']:.0f}: there is nothing to "
            "tell apart."
            for split in SPLITS
            if labels["labelled"][split] and entry[split]["rate"] in (0, 1)
        ]
    return sentences


def _remarks_on_teacher(teacher: dict) -> list[str]:
    sentences = []
    if teacher["other_version"]:
        sentences.append(
            f"{teacher['other_version']:,} candidates were scored by another teacher than version "
            f"{teacher['version']!r}, and their values do not count."
        )
    for task, entry in teacher["tasks"].items():
        for split in SPLITS:
            share = entry["coverage"][split]["passed"]
            if share is not None and share < 1:
                sentences.append(
                    f"The teacher of {task} covers {share:.1%} of the passed candidates in {split}."
                )
        ratio = entry.get("calibration", {}).get("predicted_over_observed")
        if ratio is not None and abs(ratio - 1) > _CALIBRATION_TOLERANCE:
            sentences.append(
                f"The teacher of {task} predicts {ratio:.2f} times what users did on the shown "
                "candidates."
            )
    return sentences


def _remarks_on_features(features: list[dict], ids: dict) -> list[str]:
    sentences = []
    for feature in features:
        if feature["kind"] == "dense" and feature.get("deviation", 0) == 0:
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
        sentences += remarks_of(feature.get("tells", {}), feature["name"])
    if unknown := ids.get("history_events_of_unknown_items"):
        sentences.append(
            f"{unknown:,} of {ids['history_events']:,} events of histories are of items that are "
            "never a candidate, and are left out."
        )
    return sentences


def write_data_report(report: Report, folder: Path) -> None:
    """Writes `data_report.json` and `data_report.html`."""
    (folder / JSON_FILE).write_text(json.dumps(report, indent=2, allow_nan=False))
    (folder / PAGE).write_text(data_report_page(report))


def read_data_report(folder: Path) -> Report | None:
    """Reads what `write_data_report` wrote to a folder; None where there is none.

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
            f"{path} is damaged ({error}); make the dataset anew, or copy it from there"
        ) from error


def data_report_page(report: Report) -> str:
    """The page's HTML, which needs no other file."""
    templates = templates_of("kd_ranker.sources.logs")
    templates.filters["number"] = _number
    templates.filters["percent"] = lambda share: "" if share is None else f"{share:.1%}"
    return templates.get_template("data_report.html").render(report=report, splits=SPLITS)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator) / float(denominator) if denominator else None


def _date(seconds: int) -> str:
    """Like 2024-01-31 23:59:59, in UTC."""
    return str(np.datetime64(seconds, "s")).replace("T", " ")
