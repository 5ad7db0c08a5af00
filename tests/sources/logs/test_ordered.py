"""Pieces of requests, from files whose batches end elsewhere."""

import types

import numpy as np
import pyarrow as pa

from kd_ranker.sources.logs import ordered


def batches_of(table, lengths):
    starts = np.cumsum([0, *lengths])
    parts = (table.slice(*of).combine_chunks() for of in zip(starts, lengths, strict=False))
    batches = [batch for part in parts for batch in part.to_batches()]
    return pa.RecordBatchReader.from_batches(table.schema, batches)


def test_pieces_hold_all_rows_in_order_whatever_the_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(ordered, "PIECE", 10)
    split, size = np.array([0] * 9 + [1] * 2 + [2] * 4), np.arange(3, 18)
    number = np.repeat(np.arange(15), size)
    requests = pa.table(
        {
            "request": range(15),
            "file": [0] * 15,
            "number": range(15),
            "ids": [[n] * (n % 3) for n in range(15)],
        }
    )
    candidates = pa.table({"number": number, "item": [f"item {n}" for n in range(len(number))]})
    streams = {"request_fields": (requests, [1, 10, 4]), "candidate_fields": (candidates, [7] * 21)}
    streams["candidate_fields"][1].append(len(number) - 7 * 21)
    database = types.SimpleNamespace(
        folder=tmp_path,
        stream=lambda query: batches_of(*next(of for key, of in streams.items() if key in query)),
        fetch=lambda query: pa.table({"split": split, "size": size}),
    )
    pieces = ordered.write_ordered(database)
    assert len(pieces) > 8
    read = [ordered.read_piece(tmp_path, piece) for piece in pieces]
    for whole, parts in zip((requests, candidates), zip(*read, strict=True), strict=True):
        assert pa.concat_tables(parts).equals(whole)
    for piece, (of_requests, of_candidates) in zip(pieces, read, strict=True):
        numbers = of_requests["number"].to_pylist()
        assert {*of_candidates["number"].to_pylist()} == {*numbers}
        assert {ordered.SPLITS[split[n]] for n in numbers} == {piece.split}
    only = ordered.read_requests(tmp_path, pieces[3])
    assert only.equals(read[3][0].select(["request", "file"]))
