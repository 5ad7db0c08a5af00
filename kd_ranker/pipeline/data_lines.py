"""Lines for the terminal on data: what was found in a log, and how long training is on it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from kd_ranker.config.identity import dataset_name
from kd_ranker.requests import storage
from kd_ranker.requests.records import Dataset
from kd_ranker.sources.logs.data_report import JSON_FILE, Report, read_data_report
from kd_ranker.sources.logs.unseen import Unseen
from kd_ranker.training.workdir import write_atomically


def data_lines(config: ConfigDict, dataset: Dataset) -> list[str]:
    """The lines: for an own log its candidates and all remarks; for every dataset the epochs."""
    report = read_data_report(dataset.directory)
    of_log = [*_of_log(report)] if report else []
    return [*of_log, *_epochs(config, dataset.builder.info.splits["train"].num_examples)]


def keep_data_report(config: ConfigDict, workdir: Path) -> None:
    """Copies the data report of an own log to a workdir, for the report on what trains there."""
    path = storage.directory_of(dataset_name(config), config.data.dir) / JSON_FILE
    if path.exists():
        write_atomically(workdir / JSON_FILE, path.read_bytes())


def _of_log(report: Report) -> Iterator[str]:
    candidates = report["candidates"]
    reasons = {name: entry["candidates"] for name, entry in candidates["by_reason"].items()}
    yield _candidates(candidates["used"], "used", reasons)
    for remark in report["remarks"]:
        yield f"remark: {remark}"


def score_lines(read: Unseen) -> list[str]:
    """The lines on a log that was scored: its candidates, and which training did not know."""
    new = (
        f"{number:,} candidates ({number / read.used:.1%}) by their {name}"
        for name, number in read.new.items()
    )
    candidates = _candidates(read.used, "scored", read.rejected)
    return [candidates, f"unknown to training: {', '.join(new)}"]


def _candidates(used: int, how: str, by_reason: Mapping[str, int]) -> str:
    rejected = sum(by_reason.values())
    reasons = ", ".join(f"{name} {number:,}" for name, number in by_reason.items())
    return (
        f"candidates: {used + rejected:,} in the log = {used:,} {how} + {rejected:,} rejected"
        f"{f' ({reasons})' if reasons else ''}"
    )


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
