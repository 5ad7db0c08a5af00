"""From requests to batches on devices.

What is known of requests has four forms between disk and step:

    Columns ─draw, read→ rows ─pack_batches→ PackedBatches ─unpack→ CandidateBatch

`Columns` (in `requests`) are many requests in a few arrays, 32 bits a number, from which a draw
reads whole rows: where they lie in files, or, laid on a device, there. `PackedBatches` are the
training batches of some steps in one array, and `CandidateBatch` is one with an array a field. An
evaluation batch is cut from its columns on the host and is never packed.

Which candidates a batch holds is told apart from what is known of them: `sampling` makes of the
columns how many of each kind there are, of these and of chance a few numbers a request (`Starts`),
and of these the rows to read (`Draw`).
"""
