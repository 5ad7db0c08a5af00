"""From requests to batches on devices.

What is known of requests has five forms between disk and step:

    record ─decode→ Request ─columns_of→ Columns ─pack_batches→ PackedBatches
        ─unpack→ CandidateBatch

A record is the bytes of one request, and `Request` is that in arrays. `Columns` are many requests
in three arrays, 32 bits a number, from which a draw reads whole rows; laid on a device, they are
`Columns.rows`. `PackedBatches` are the training batches of some steps in one array, and
`CandidateBatch` is one with an array a field. An evaluation batch is cut from its columns on the
host and is never packed.

Which candidates a batch holds is told apart from what is known of them: `sampling` makes of the
columns how many of each kind there are, of these and of chance a few numbers a request (`Starts`),
and of these the rows to read (`Draw`).
"""
