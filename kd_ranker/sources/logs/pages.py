"""Checksums in Parquet files, which DuckDB ignores: a damaged page would be read as it is."""

import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.parquet as pq

from kd_ranker.sources.logs.files import Log, open_parquet

# The head of a page in Thrift's compact protocol: its type, its two sizes, and then the checksum.
_WITH_CHECKSUM = re.compile(rb"(?:\x15[\x80-\xff]*[\x00-\x7f]){3}\x15", re.DOTALL)


def check_pages(log: Log, columns: Collection[str], threads: int) -> None:
    """Raise UserError for a damaged page in some columns, if the writer has stored checksums.

    Files without checksums are not read.
    """

    def check_file(file: str) -> None:
        with open_parquet(log.system, file) as parquet:
            if not has_checksums(log.system, file, parquet.metadata):
                return
            names = [name for name in parquet.schema_arrow.names if name in columns]
            for _ in parquet.iter_batches(columns=names, use_threads=False):
                pass  # reading a page checks it

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(check_file, log.files))


def has_checksums(system: Any, file: str, metadata: pq.FileMetaData) -> bool:
    """Return whether the first page of a file has a checksum; a writer stores all or none."""
    if not metadata.num_row_groups:
        return False
    start = metadata.row_group(0).column(0).data_page_offset
    head = system.cat_file(file, start=start, end=start + 20)
    return _WITH_CHECKSUM.match(head) is not None
