"""Checksums of the pages of Parquet files, which writers may have left, compared with the pages.

DuckDB passes over them, and a page that was damaged on its way may well be read as other numbers.
"""

import zlib
from collections.abc import Collection
from typing import Any, BinaryIO, NamedTuple

import pyarrow.parquet as pq

from kd_ranker.errors import UserError

# Types of Thrift's compact protocol, in which the header of a page is written
# (parquet-format, parquet.thrift: PageHeader).
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_COMPRESSED_SIZE, _CHECKSUM = 3, 4
_DAMAGED = (
    "{} is damaged: a page of column {!r} in row group {} is not what its checksum says; fetch or "
    "write the file again"
)


class _Bytes:
    """Bytes that are read from the front."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def byte(self) -> int:
        self.place += 1
        return self.content[self.place - 1]

    def varint(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)


class _Header(NamedTuple):
    """Of the header of a page: the bytes of the page, and their checksum if there is one."""

    size: int
    checksum: int | None


def check_pages(
    parquet: pq.ParquetFile, file: BinaryIO, name: str, columns: Collection[str]
) -> None:
    """Compares all pages of some columns with their checksums; passes over a file without any.

    Args:
      parquet: the file, opened.
      file: the same, as bytes.
      name: of the file, for messages.
      columns: names of columns.

    Raises:
      UserError: a page is damaged.
    """
    metadata = parquet.metadata
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            # Within lists, a path goes on behind the name, which may have dots of its own.
            path = f"{chunk.path_in_schema}."
            column = next((name for name in columns if path.startswith(f"{name}.")), None)
            if column is None:
                continue
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            file.seek(start)
            content = _Bytes(file.read(chunk.total_compressed_size))
            while content.place < len(content.content):
                try:
                    header = _read_header(content)
                except (IndexError, KeyError, RecursionError) as error:
                    raise UserError(_DAMAGED.format(name, column, group)) from error
                if header.checksum is None:
                    return  # a writer leaves them all, or none
                page = content.content[content.place : content.place + header.size]
                content.place += header.size
                if zlib.crc32(page) != header.checksum & 0xFFFFFFFF:
                    raise UserError(_DAMAGED.format(name, column, group))


def _read_header(content: _Bytes) -> _Header:
    found: dict[int, Any] = {}
    field = 0
    while byte := content.byte():
        field = field + (byte >> 4) if byte >> 4 else content.zigzag()
        found[field] = _read(content, byte & 0x0F)
    return _Header(found[_COMPRESSED_SIZE], found.get(_CHECKSUM))


def _read(content: _Bytes, type_: int) -> int | None:
    """A whole number; None for anything else, which is passed over."""
    if type_ in (_TRUE, _FALSE):
        return None
    if type_ == _BYTE:
        return content.byte()
    if type_ == _DOUBLE:
        content.place += 8
    elif type_ == _BINARY:
        size = content.varint()
        content.place += size
    elif type_ in (_LIST, _SET):
        header = content.byte()
        number = header >> 4 if header >> 4 < 15 else content.varint()
        for _ in range(number):
            # Truth values in a list take a byte each.
            _read(content, _BYTE if header & 0x0F in (_TRUE, _FALSE) else header & 0x0F)
    elif type_ == _STRUCT:
        while byte := content.byte():
            if not byte >> 4:
                content.zigzag()
            _read(content, byte & 0x0F)
    else:
        return content.zigzag()
    return None
