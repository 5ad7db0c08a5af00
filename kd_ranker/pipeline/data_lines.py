"""Lines for the terminal on a dataset: what was found in a log, and how long training is on it."""

import json
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from kd_ranker.requests.records import Dataset
from kd_ranker.sources.logs.data_report import JSON_FILE, Report


def data_lines(config: ConfigDict, dataset: Dataset) -> list[str]:
    """The lines: for an own log its candidates and all remarks; for every dataset the epochs."""
    report = read_data_report(dataset.directory)
    of_log = [*_of_log(report)] if report else []
    return [*of_log, *_epochs(config, dataset.builder.info.splits["train"].num_examples)]


def read_data_report(directory: Path) -> Report | None:
    """The data report of a dataset; None where it was not made from an own log."""
    path = directory / JSON_FILE
    return json.loads(path.read_text()) if path.exists() else None


def _of_log(report: Report) -> Iterator[str]:
    candidates = report["candidates"]
    rejected = ", ".join(
        f"{name} {entry['candidates']:,}" for name, entry in candidates["by_reason"].items()
    )
    yield (
        f"candidates: {candidates['in_the_log']:,} in the log = {candidates['used']:,} used + "
        f"{candidates['rejected']:,} rejected{f' ({rejected})' if rejected else ''}"
    )
    for remark in report["remarks"]:
        yield f"remark: {remark}"


def _epochs(config: ConfigDict, requests: int) -> Iterator[str]:
    """The passes over the training requests that the steps of a config amount to."""
    has_teacher = config.teacher.source == "live" or config.teacher.workdir
    trained = {"": config, "teacher.": config.teacher} if has_teacher else {"": config}
    for name, of in trained.items():
        epochs = of.train.steps * of.batch.requests / requests
        yield (
            f"epochs: {epochs:.3g} in {name}train.steps={of.train.steps}, of {requests:,} training "
            f"requests, {of.batch.requests} a step"
        )
