"""`data.name = "parquet"`: from a log to a source of requests, and the files beside them."""

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ml_collections import ConfigDict

from kd_ranker.batch import Stage
from kd_ranker.errors import UserError
from kd_ranker.requests.block import Block
from kd_ranker.requests.pool import Runner, open_threads
from kd_ranker.requests.request import SPLITS, Source
from kd_ranker.sources.logs import files, findings, looks, scan, typed
from kd_ranker.sources.logs import grouped as grouped_
from kd_ranker.sources.logs.candidate_rows import ROWS_FOLDER, path_of, write_candidate_rows
from kd_ranker.sources.logs.data_report import (
    PAGE,
    Found,
    Report,
    make_data_report,
    write_data_report,
)
from kd_ranker.sources.logs.encode import (
    ITEM,
    TRANSFORMS,
    encode_requests,
    item_matrix,
    load_encoding,
    make_encoding,
    save_encoding,
    transforms,
)
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.engines import open_engine
from kd_ranker.sources.logs.faults import count_faults
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.findings import Finding
from kd_ranker.sources.logs.grouped import Grouped
from kd_ranker.sources.logs.layout import LogLayout, read_layout
from kd_ranker.sources.logs.leaks import tell_tales
from kd_ranker.sources.logs.numbered import (
    Numbered,
    counts_of_history,
    counts_of_ids,
    counts_of_values,
    number,
)
from kd_ranker.sources.logs.ordered import Piece, write_ordered
from kd_ranker.sources.logs.rejected import REJECTED_FOLDER, write_rejected
from kd_ranker.sources.logs.statistics import Moments, add_up, floats_of, moments_of
from kd_ranker.sources.logs.varying import count_varying
from kd_ranker.sources.logs.vocabulary import VOCABULARIES_FOLDER, write_vocabularies

MANIFEST = "log.json"
# Folder below `data.dir` for the report of a log of which no dataset was built.
REFUSED = "refused_log"


class PreparedLog(NamedTuple):
    """A log, read up to the point where only requests are left to be written.

    Attributes:
      engine: what has read it.
      grouped: its rows as requests.
      found: what was counted.
      pieces: the pieces in which requests and candidates lie in the engine's folder.
      numbered: what has ids; None if nothing is left.
      hashed: feature whose values are hashed -> what these are, see `typed.kind_of`.
    """

    engine: Engine
    grouped: Grouped
    found: Found
    pieces: list[Piece]
    numbered: Numbered | None
    hashed: Mapping[str, str] = MappingProxyType({})

    def shards(self, split: str) -> list[Piece]:
        """The pieces of a split, in the order of time."""
        return [piece for piece in self.pieces if piece.split == split]

    def num_requests(self, split: str) -> int:
        """The number of requests of a split."""
        spans = (piece.requests for piece in self.shards(split))
        return sum(stop - start for start, stop in spans)


def open_source(data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> Source:
    """Opens a log of Parquet files as a source; `configs/parquet.py` explains `data`.

    The engine reads the log, with the memory that `data.memory` gives it, and brings its rows into
    order in a folder below `data.dir`, which `Source.close` removes.

    Returns:
      The source; each split comes in the order of time, then of request ids.

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
        candidates = sum(part.entries for part in log.parts)
        engine = stack.enter_context(open_engine(layout, work, candidates))
        run = stack.enter_context(open_threads(layout.processes))
        source = _source(log, layout, _read(log, layout, engine, run), run)
        # From here on, all of it is the source's to close.
        return dataclasses.replace(source, close=stack.pop_all().close)


def check_unchanged(data: ConfigDict, directory: Path) -> None:
    """Checks that a log is what the dataset in `directory` was made of; one that is gone is fine.

    Raises:
      UserError: files have come, gone or changed.
    """
    try:
        _, *columns = files.find_files(data.path)
    except UserError as error:
        if not files.is_there(data.path):
            return
        raise UserError(f"the log that {directory} was made of has changed: {error}") from error
    if not (directory / MANIFEST).exists():
        raise UserError(
            f"{directory / MANIFEST}, the list of files that this dataset was made of, is gone; "
            "restore it, or remove that folder and make it again with: python -m "
            "experiments.prepare_data"
        )
    now = {name: [size, changed] for name, size, changed in zip(*columns, strict=True)}
    if how := files.manifest_differences(json.loads((directory / MANIFEST).read_text()), now):
        raise UserError(
            f"the log at {data.path} has changed since {directory} was made of it ({how}); give "
            "another data.dir to make a dataset of it as it is now, or restore its files"
        )


def _read(log: Log, layout: LogLayout, engine: Engine, run: Runner) -> PreparedLog:
    """All passes but the last."""
    own, rows, unfolded, without_any = typed.open_rows(engine, log, layout)
    grouped = grouped_.group(engine, layout, typed.typed(unfolded, own), without_any)
    if layout.split == "time" and grouped.cutoffs is None and engine.count(grouped.requests):
        raise UserError(
            f"data.split='time', but the requests of {layout.path} have less than three "
            "different times, one a split; split by 'request' or 'user'"
            f"{looks.time_hint(log, layout)}"
        )
    scanned = scan.scan(engine, own, rows)
    counts = grouped_.counts_by_reason(engine, grouped)
    used = engine.count(grouped.candidates)
    numbered = number(engine, own, rows, unfolded, grouped) if used else None
    faults, other_version = count_faults(engine, own, rows, unfolded, numbered)
    found = Found(
        *scanned,
        counts=counts,
        faults=faults,
        other_version=other_version,
        cutoffs=grouped.cutoffs,
    )
    if found.rows != sum(part.rows for part in log.parts):
        raise RuntimeError(
            f"{sum(part.rows for part in log.parts)} rows in files, {found.rows} read"
        )
    if found.entries != used + counts.sum():
        raise RuntimeError(
            f"{found.entries} candidates in the log, {used} used, {counts.sum()} rejected"
        )
    if numbered is None:
        return PreparedLog(engine, grouped, found, [], None)
    pieces = write_ordered(engine, layout, grouped, numbered)
    statistics = add_up(layout, engine.folder, pieces, run)
    return PreparedLog(
        engine,
        grouped,
        found._replace(
            statistics=statistics,
            steps_back=grouped_.count_steps_back(engine, grouped.requests),
            moments=statistics.moments | _moments_of_items(engine, layout, numbered),
            values={name: counts_of_values(engine, of) for name, of in numbered.values.items()},
            varying=count_varying(engine, own, rows, unfolded, grouped),
            ids=counts_of_ids(engine, numbered) | counts_of_history(engine, layout, numbered),
            tells=tell_tales(engine, layout, grouped, numbered),
        ),
        pieces,
        numbered,
        {of.name: typed.kind_of(unfolded[of.column].type()) for of in own.features if of.hashed},
    )


def _moments_of_items(engine: Engine, layout: LogLayout, numbered: Numbered) -> dict[str, Moments]:
    """The moments of the dense features of items that training has."""
    names = {of.name: f"feature:{of.name}" for of in layout.of("item", kind="dense")}
    if not names:
        return {}
    items = numbered.items.filter(numbered.items.train > 0).order_by("id")
    table = engine.fetch(items.select(*names.values()))
    return {name: moments_of(floats_of(table, column)) for name, column in names.items()}


def _source(log: Log, layout: LogLayout, read: PreparedLog, run: Runner) -> Source:
    report = make_data_report(log, layout, read.found)
    found = findings.find(report, functools.partial(looks.time_hint, log, layout))
    report["allowed"] = [finding._asdict() for finding in found if finding.name in layout.allow]
    for name, text in found:
        verdict = "Allowed" if name in layout.allow else "Refused"
        report["remarks"].append(f"{verdict}, {name}: {text}.")
    if why := _unusable(layout, read, report, found):
        raise _refuse(log, layout, read, report, why)
    engine, numbered = read.engine, read.numbered
    assert numbered is not None
    items = engine.fetch(numbered.items.order_by("id"))
    values = {ITEM: items["value"].combine_chunks()}
    for name, table in numbered.values.items():
        known = table.filter(table.id.notnull()).order_by("id").select("value")
        values[name] = engine.fetch(known)["value"].combine_chunks()
    users = engine.count(numbered.users)
    encoding = make_encoding(layout, users, values, read.found.moments)
    save_encoding(encoding, engine.folder / "encoding")
    load_encoding(engine.folder / "encoding")  # once, before threads ask for it
    item_features, item_category = item_matrix(layout, encoding, items)

    def shards(split: str) -> list[Callable[[], Iterator[Block]]]:
        return [
            functools.partial(encode_requests, layout, engine.folder, piece)
            for piece in read.shards(split)
        ]

    def write_beside(directory: Path) -> None:
        _write_report(log, layout, read, report, directory)
        write_vocabularies(engine, numbered, encoding.spec, directory / VOCABULARIES_FOLDER)
        told = transforms(layout, encoding, read.hashed)
        (directory / TRANSFORMS).write_text(json.dumps(told, indent=2))
        (directory / ROWS_FOLDER).mkdir()
        rows = [
            (engine.folder, piece, path_of(directory, split, shard))
            for split in SPLITS
            for shard, piece in enumerate(read.shards(split))
        ]
        for _ in run(write_candidate_rows, rows, "writing places"):
            pass
        (directory / MANIFEST).write_text(json.dumps(log.manifest, indent=2))

    return Source(
        spec=encoding.spec,
        item_features=item_features,
        requests=lambda split: (
            request for shard in shards(split) for block in shard() for request in block.requests()
        ),
        num_requests={split: read.num_requests(split) for split in SPLITS},
        item_category=item_category,
        shards=shards,
        run=run,
        write_beside=write_beside,
    )


def _unusable(
    layout: LogLayout, read: PreparedLog, report: Report, found: Sequence[Finding]
) -> str:
    """A reason for making no dataset of a log, "" if there is none."""
    if read.numbered is None:
        times = "".join(f"; {finding.text}" for finding in found if finding.name == "times")
        return f"not one row of the log can be used{times}"
    for split in SPLITS:
        if not read.num_requests(split):
            shares = (
                f"data.validation_share={layout.validation_share} and "
                f"data.test_share={layout.test_share}"
            )
            column = f"column {layout.columns.get('split')!r}"
            by = column if layout.split == "column" else shares
            return f"no request is left for the split {split!r}, with {by}"
    if "propensity" in layout.columns and (why := _bad_propensity(layout, read)):
        return why
    if layout.strict and (faults := _faults(report)):
        return f"data.strict=True, and the log has faults: {faults}"
    return findings.refusal(found, layout.allow)


def _bad_propensity(layout: LogLayout, read: PreparedLog) -> str:
    """Propensities of shown candidates that are none, with an example; "" if there are none."""
    of = read.grouped.candidates
    shown = of.filter(of.stage == int(Stage.SHOWN), of.propensity.notnull())
    bad = shown.filter((shown.propensity <= 0) | (shown.propensity > 1))
    (row,) = read.engine.fetch(bad.agg(number=bad.count(), least=bad.propensity.min())).to_pylist()
    if not row["number"]:
        return ""
    return (
        f"data.columns.propensity: {row['number']:,} of {read.engine.count(shown):,} values of "
        f"column {layout.columns['propensity']!r} on shown candidates are not in (0, 1], such as "
        f"{row['least']:g}"
    )


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
    written = write_rejected(
        read.engine, log, layout, read.grouped.rejected, directory / REJECTED_FOLDER
    )
    if written != (rejected := read.found.counts.sum()):
        raise RuntimeError(f"{rejected} candidates rejected, {written} written")
