"""`data.name = "parquet"`: from a log to a source of requests, and the files beside them."""

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.requests.pool import Runner, open_pool
from kd_ranker.requests.request import SPLITS, Request, Source
from kd_ranker.sources.logs import (
    assemble,
    candidate_rows,
    files,
    findings,
    log_statistics,
    looks,
    partition,
    scan,
)
from kd_ranker.sources.logs.assemble import AssembledBucket
from kd_ranker.sources.logs.data_report import PAGE, Report, make_data_report, write_data_report
from kd_ranker.sources.logs.encode import (
    encode_requests,
    item_matrix,
    make_encoding,
    save_encoding,
)
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.findings import Finding
from kd_ranker.sources.logs.layout import LogLayout, read_layout
from kd_ranker.sources.logs.log_statistics import Statistics
from kd_ranker.sources.logs.named_columns import SortedRun
from kd_ranker.sources.logs.partition import Partitioned
from kd_ranker.sources.logs.plan import Cutoffs, plan_buckets, save_plan, time_cutoffs
from kd_ranker.sources.logs.reasons import Reason
from kd_ranker.sources.logs.rejected import REJECTED_FOLDER, write_rejected
from kd_ranker.sources.logs.scan import Scan
from kd_ranker.sources.logs.vocabulary import VOCABULARIES_FOLDER, write_vocabularies

MANIFEST = "log.json"
# Folder below `data.dir` for the report of a log of which no dataset was built.
REFUSED = "refused_log"


class PreparedLog(NamedTuple):
    """A log, read up to the point where only requests are left to be written."""

    scan: Scan
    cutoffs: Cutoffs | None
    partitioned: list[Partitioned]
    assembled: list[AssembledBucket]
    statistics: Statistics | None
    counts: Int64[np.ndarray, "reasons"]

    @property
    def rejected(self) -> list[str]:
        """Paths of the records of all rejected rows."""
        return [
            *(part.rejected for part in self.partitioned),
            *(bucket.rejected for bucket in self.assembled),
        ]

    def buckets(self, split: str) -> list[AssembledBucket]:
        """The buckets that have requests of a split, in the order of time."""
        return [bucket for bucket in self.assembled if bucket.num_requests[split]]

    def num_requests(self, split: str) -> int:
        """The number of requests of a split."""
        return sum(bucket.num_requests[split] for bucket in self.assembled)


def open_source(data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> Source:
    """Opens a log of Parquet files as a source; `configs/parquet.py` explains `data`.

    The log is read twice, a batch at a time, and its rows are brought into order in a folder below
    `data.dir`, which `Source.close` removes. Each process holds `data.rows_in_memory` rows at most,
    and the vocabularies are held once.

    Returns:
      The source; each split comes in the order of time, then of request ids (of texts, their hash).

    Raises:
      UserError: the config or the log's columns are at fault, nothing is left to train or to test
        on, something tells against the log that `data.allow` does not name, or with `data.strict`
        any row is at fault.
    """
    layout = read_layout(data, tasks, funnel)
    log = files.open_log(layout)
    Path(layout.directory).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        work = Path(tempfile.mkdtemp(prefix=".parquet-", dir=layout.directory))
        stack.callback(shutil.rmtree, work)
        run = stack.enter_context(open_pool(layout.processes))
        source = _source(log, layout, _read(log, layout, work, run), work)
        # From here on, all of it is the source's to close.
        return dataclasses.replace(source, run=run, close=stack.pop_all().close)


def check_unchanged(data: ConfigDict, directory: Path) -> None:
    """Checks that a log is what the dataset in `directory` was made of; one that is gone is fine.

    Raises:
      UserError: files have come, gone or changed.
    """
    try:
        _, *columns = files.find_files(data.path)
    except UserError:
        return
    now = {name: [size, changed] for name, size, changed in zip(*columns, strict=True)}
    if how := files.manifest_differences(json.loads((directory / MANIFEST).read_text()), now):
        raise UserError(
            f"the log at {data.path} has changed since {directory} was made of it ({how}); remove "
            "that folder to make it anew, or let data.path name what it was"
        )


def _read(log: Log, layout: LogLayout, work: Path, run: Runner) -> PreparedLog:
    """All passes but the last."""
    chunks = files.chunks_of(log.parts, layout.bucket_rows)
    calls: list[tuple] = [(log, layout, parts) for parts in chunks]
    times = scan.time_merger()
    scans = []
    for scanned in run(scan.scan_parts, calls, "reading times"):
        times.add(scanned.times)
        scans.append(scanned._replace(times=scan.NO_TIMES))
    whole = scan.merge_scans(scans, times)
    cutoffs = None
    if layout.split == "time" and len(whole.times.time):
        cutoffs = time_cutoffs(whole.times.time, layout.validation_share, layout.test_share)
        if cutoffs is None:
            raise UserError(
                f"data.split='time', but the requests of {layout.path} have less than three "
                "different times, one a split; split by 'request' or 'user'"
                f"{looks.time_hint(log, layout)}"
            )
    save_plan(plan_buckets(whole.times, layout), work / "plan")
    # The times are on disk now.
    whole = whole._replace(times=scan.NO_TIMES)
    del times

    calls = [
        (log, layout, work / "plan", parts, work, f"{index:06d}")
        for index, parts in enumerate(chunks)
    ]
    partitioned = list(run(partition.partition_parts, calls, "sorting rows"))
    candidates = _by_bucket(itertools.chain.from_iterable(part.candidates for part in partitioned))
    requests = _by_bucket(itertools.chain.from_iterable(part.requests for part in partitioned))
    assembled: list[AssembledBucket] = []
    calls = [
        (layout, cutoffs, candidates[bucket], requests[bucket], work, f"{bucket:06d}")
        for bucket in sorted(candidates)
    ]

    def pieces() -> Iterator[Statistics]:
        for bucket in run(assemble.assemble_bucket, calls, "making requests"):
            yield bucket.statistics
            assembled.append(bucket._replace(statistics=None))

    total = log_statistics.add_up_buckets(pieces()) if calls else None
    for part in partitioned:
        for a_run in (*part.candidates, *part.requests):
            Path(a_run.path).unlink()
    none = np.zeros(max(Reason) + 1, np.int64)
    counts = sum((part.counts for part in (*partitioned, *assembled)), none)
    used = sum(bucket.used for bucket in assembled)
    if whole.entries != used + counts.sum():
        raise RuntimeError(
            f"{whole.entries} candidates in the log, {used} used, {counts.sum()} rejected"
        )
    return PreparedLog(whole, cutoffs, partitioned, assembled, total, counts)


def _by_bucket(runs: Iterator[SortedRun]) -> dict[int, list[tuple[str, int]]]:
    """Bucket -> the places of its rows, in the order of the log."""
    places: dict[int, list[tuple[str, int]]] = {}
    for run in runs:
        for bucket, index in run.buckets.items():
            places.setdefault(bucket, []).append((run.path, index))
    return places


def _source(log: Log, layout: LogLayout, read: PreparedLog, work: Path) -> Source:
    encoding = make_encoding(layout, read.statistics) if read.statistics else None
    report = make_data_report(
        log,
        layout,
        read.scan,
        read.cutoffs,
        read.partitioned,
        read.counts,
        read.statistics,
        encoding,
    )
    found = findings.find(report, functools.partial(looks.time_hint, log, layout))
    report["allowed"] = [finding._asdict() for finding in found if finding.name in layout.allow]
    for name, text in found:
        verdict = "Allowed" if name in layout.allow else "Refused"
        report["remarks"].append(f"{verdict}, {name}: {text}.")
    if why := _unusable(layout, read, report, found):
        raise _refuse(log, layout, read, report, why)
    assert encoding is not None
    assert read.statistics is not None
    folder = work / "encoding"
    save_encoding(encoding, folder)
    item_features, item_category = item_matrix(layout, encoding, read.statistics.items)

    def shards(split: str) -> list[Callable[[], Iterator[Request]]]:
        return [
            functools.partial(
                encode_requests, layout, bucket.requests, bucket.candidates, str(folder), split
            )
            for bucket in read.buckets(split)
        ]

    def write_beside(directory: Path) -> None:
        _write_report(log, layout, read, report, directory)
        texts = [part.texts for part in read.partitioned]
        write_vocabularies(encoding, texts, directory / VOCABULARIES_FOLDER)
        for split in SPLITS:
            paths = [bucket.candidate_rows[split] for bucket in read.buckets(split)]
            candidate_rows.move_candidate_rows(paths, split, directory)
        (directory / MANIFEST).write_text(json.dumps(log.manifest, indent=2))

    return Source(
        spec=encoding.spec,
        item_features=item_features,
        requests=lambda split: itertools.chain.from_iterable(shard() for shard in shards(split)),
        num_requests={split: read.num_requests(split) for split in SPLITS},
        item_category=item_category,
        shards=shards,
        write_beside=write_beside,
    )


def _unusable(
    layout: LogLayout, read: PreparedLog, report: Report, found: Sequence[Finding]
) -> str:
    """A reason for making no dataset of a log, "" if there is none."""
    if read.statistics is None:
        times = "".join(f"; {finding.text}" for finding in found if finding.name == "times")
        return f"not one row of the log can be used{times}"
    for split in SPLITS:
        if not read.num_requests(split):
            return (
                f"no request is left for the split {split!r}, with data.validation_share="
                f"{layout.validation_share} and data.test_share={layout.test_share}"
            )
    if layout.strict and (faults := _faults(report)):
        return f"data.strict=True, and the log has faults: {faults}"
    return findings.refusal(found, layout.allow)


def _faults(report: Report) -> str:
    """Faults that a strict reading refuses, in words; "" if there are none."""
    bad = sum(column["out_of_range"] for column in report["columns"])
    requests = report["requests"]
    counted = (
        (report["candidates"]["rejected"], "rejected candidates"),
        (bad, "values that their columns cannot hold"),
        (report["teacher"]["other_version"], "candidates of another teacher version"),
        (requests["several_times"], "requests of several times"),
    )
    return ", ".join(f"{number:,} {what}" for number, what in counted if number)


def _refuse(log: Log, layout: LogLayout, read: PreparedLog, report: Report, why: str) -> UserError:
    """The error for a log of which no dataset is made; its report is written all the same."""
    directory = Path(layout.directory) / REFUSED
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    _write_report(log, layout, read, report, directory)
    reasons = report["candidates"]["by_reason"]
    rejected = ", ".join(f"{name} {entry['candidates']:,}" for name, entry in reasons.items())
    return UserError(
        f"{layout.path}: {why}{f'; rejected were: {rejected}' if rejected else ''}; see "
        f"{directory / PAGE}"
    )


def _write_report(
    log: Log, layout: LogLayout, read: PreparedLog, report: Report, directory: Path
) -> None:
    """Writes the report and the rejected rows."""
    write_data_report(report, directory)
    written = write_rejected(log, layout, read.rejected, directory / REJECTED_FOLDER)
    if written != read.counts.sum():
        raise RuntimeError(f"{read.counts.sum()} candidates rejected, {written} written")
