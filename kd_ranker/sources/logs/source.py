"""`data.name = "parquet"`: a log as a source of requests, with the files next to their dataset."""

import contextlib
import dataclasses
import functools
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.requests.lock import hold_work, remove_leftovers
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS, ReadBlock
from kd_ranker.requests.row_files import Flat
from kd_ranker.requests.source import Source
from kd_ranker.sources.logs import encode, files, vocabulary
from kd_ranker.sources.logs.data_report import Report
from kd_ranker.sources.logs.encode import USER, Encoding, Piece
from kd_ranker.sources.logs.extend import (
    EarlierDataset,
    check_new_requests,
    extend_report,
    open_earlier,
)
from kd_ranker.sources.logs.layout import read_layout, sql_of
from kd_ranker.sources.logs.tables import Tables, open_tables
from kd_ranker.sources.logs.verdict import count_log, report_on_log, write_report
from kd_ranker.sources.logs.vocabulary import LoggedRequests

# The beginning of the name of a hidden folder below `data.dir`, for the tables of a log.
_WORK = ".parquet-"


def open_source(
    data: ConfigDict,
    tasks: Sequence[str],
    funnel: ConfigDict,
    extended: Dataset | None = None,
) -> "LogSource":
    """Open a log as a source; `configs/parquet.py` explains `data`.

    The engine brings the rows into order in a folder below `data.dir`, which `LogSource.close`
    removes.

    Args:
      data: `config.data`.
      tasks: `config.tasks`.
      funnel: `config.funnel`.
      extended: a dataset of older files of the log, which new files follow; None reads all files.

    Returns:
      The source; each split comes in the order of time, then of request ids.

    Raises:
      UserError: the config or the log's columns are at fault, nothing is left to train or to test
        on, a finding is not in `data.allow`, or with `data.strict` any row is at fault; or the log
        cannot extend that dataset.
    """
    layout = read_layout(data, tasks, funnel)
    earlier = open_earlier(layout, extended) if extended else None
    log = files.open_log(layout, earlier.files if earlier else ())
    directory = Path(layout.directory)
    remove_leftovers(directory, f"{_WORK}*")
    with contextlib.ExitStack() as resources:
        folder = directory / f"{_WORK}{uuid.uuid4().hex[:12]}"
        work = resources.enter_context(hold_work(folder))
        known = earlier.encoding if earlier else None
        tables = resources.enter_context(open_tables(log, layout, work, known))
        source = _read_tables(tables, earlier)
        # From here on, the source closes all of it.
        return dataclasses.replace(source, resources=resources.pop_all())


def _read_tables(tables: Tables, earlier: EarlierDataset | None) -> "LogSource":
    """Report on a log, and bring its requests into order; their blocks are read later."""
    layout, database = tables.layout, tables.database
    if earlier:
        check_new_requests(earlier, tables)
    counts = count_log(tables)
    pieces = encode.write_ordered(database) if counts.used else []
    # The requests of an earlier dataset are there for training.
    report = report_on_log(tables, counts, SPLITS[1:] if earlier else SPLITS)
    encoding = vocabulary.encoding_of(
        database,
        layout,
        kinds=vocabulary.kinds_of(layout, tables.query.types),
        moments={feature.name: counts.moments(feature.name) for feature in layout.of(kind="dense")},
        known=earlier.encoding if earlier else None,
    )
    if earlier:
        extend_report(earlier, encoding, tables, report)
    features, category = encode.item_matrix(
        encoding,
        database.fetch("SELECT * FROM item_fields ORDER BY id"),
        earlier.items if earlier else None,
    )
    return LogSource(
        spec=encoding.spec,
        item_features=features,
        item_category=category,
        num_requests={
            split: report["splits"].get(split, {}).get("requests", 0) for split in SPLITS
        },
        tables=tables,
        encoding=encoding,
        block_encoding=_without_users(encoding),
        pieces=pieces,
        report=report,
        earlier=earlier,
    )


def _without_users(encoding: Encoding) -> Encoding:
    """Return an encoding for ordered requests: they have the ids of their users already.

    Other machines then need not hold the vocabulary of users.
    """
    vocabularies = {name: table for name, table in encoding.vocabularies.items() if name != USER}
    return dataclasses.replace(encoding, vocabularies=vocabularies)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSource(Source):
    """A log whose requests the engine has brought into order, in pieces on disk."""

    tables: Tables
    encoding: Encoding
    block_encoding: Encoding  # to encode requests with
    pieces: Sequence[Piece]
    report: Report
    earlier: EarlierDataset | None  # the dataset that the log extends
    # What to close: the engine and the folder of the pieces.
    resources: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    def blocks(self, split: str) -> list[ReadBlock]:
        """Return a function for each piece of a split, which encodes it; see `Source.blocks`.

        It holds no connection to the engine, so that a process of another machine can call it.
        """
        num_earlier = self.earlier.num_requests if self.earlier else 0
        return [
            functools.partial(
                encode.encode_requests,
                self.tables.layout,
                self.block_encoding,
                piece,
                num_earlier,
            )
            for piece in self.pieces
            if piece.split == split
        ]

    def pack_blocks(
        self, pack: Callable[[ReadBlock], Flat], blocks: Iterable[ReadBlock]
    ) -> Iterator[Flat]:
        """Yield each block as `pack` packs it, in threads or on the workers of the engine."""
        return self.tables.database.map(pack, blocks)

    def write_side_files(self, directory: Path) -> None:
        """Write the data report, and what `vocabulary` keeps next to a dataset."""
        write_report(self.tables, self.report, directory)
        manifest = self.tables.log.manifest
        vocabulary.write(self.encoding, manifest, directory)
        for split in SPLITS:
            requests = self._logged_requests(split)
            vocabulary.write_requests(requests, manifest, directory, split)

    def _logged_requests(self, split: str) -> Iterator[LoggedRequests]:
        """Yield the requests of a split by their ids in the log, in stored order."""
        if self.earlier and split == "train":
            for earlier_split in SPLITS:
                table = vocabulary.read_requests_of(self.earlier.directory, earlier_split)
                yield LoggedRequests(table, tuple(self.earlier.files))
        new_files = self.tables.log.files or (files.SQL,)
        for piece in self.pieces:
            if piece.split == split:
                yield LoggedRequests(piece.requests(), new_files)

    def close(self) -> None:
        """Close the engine, and remove the folder of the pieces."""
        self.resources.close()


def check_unchanged(data: ConfigDict, directory: Path) -> None:
    """Raise UserError if a log has changed since `directory` was made of it; it may be missing."""
    now = files.manifest_of(data.path, sql_of(data))
    if not now.keys() - {files.SQL}:
        return
    before = vocabulary.read_manifest(directory)
    differences = files.manifest_differences(before, now)
    if not differences:
        return
    has_only_new_files = before.items() <= now.items()
    if has_only_new_files:
        differences += f"; with another data.dir, --config.data.extends={data.dir} adds new files"
    raise UserError(
        f"the log at {data.path or files.SQL} has changed since {directory} was made of it "
        f"({differences}); give another data.dir to make a new dataset, or restore its files"
    )
