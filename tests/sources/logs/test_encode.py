"""Pieces of requests, from batches of rows that end elsewhere."""

import pyarrow as pa
import pytest

from kd_ranker.sources.logs import encode
from kd_ranker.sources.logs.database import open_duckdb


# The second: many requests of one candidate, then a few of 24,000.
@pytest.mark.parametrize("number", ["floor(sqrt(n))", "if(n < 600, n, 600 + n // 24000)"])
def test_pieces_hold_all_rows_in_order_whatever_the_batches(tmp_path, monkeypatch, number):
    monkeypatch.setattr(encode, "PIECE", 50_000)
    with open_duckdb(1.0, 1, tmp_path, 0) as database:
        database.run(
            [
                f"CREATE TABLE used AS SELECT ({number})::BIGINT AS number, "
                "number // 250 AS split, 'item ' || lpad(n::VARCHAR, 6, '0') AS item, 3 AS stage, "
                "0 AS position FROM range(500_000) AS each(n)",
                "CREATE VIEW candidate_fields AS FROM used",
                "CREATE TABLE requests AS "
                "SELECT DISTINCT number, split, number AS request, range(number % 3) AS ids "
                "FROM used",
                "CREATE VIEW request_fields AS FROM requests",
            ]
        )
        pieces = encode.write_ordered(database)
        expected = [
            database.fetch(f"FROM {of}_fields ORDER BY ALL") for of in ("request", "candidate")
        ]
    read = [(piece.requests(), piece.candidates()) for piece in pieces]
    assert 10 < max(len(candidates) for _, candidates in read) < 4 * encode.PIECE
    for whole, parts in zip(expected, zip(*read, strict=True), strict=True):
        assert pa.concat_tables(parts).equals(whole)
    for piece, (requests, candidates) in zip(pieces, read, strict=True):
        numbers = requests["number"].to_pylist()
        assert {*candidates["number"].to_pylist()} == {*numbers}
        assert {encode.SPLITS[number // 250] for number in numbers} == {piece.split}
