"""From requests to batches on devices.

Data about requests has four forms between disk and step:

    Columns ─draw, read→ rows ─pack_batches→ PackedBatches ─unpack→ CandidateBatch

`Columns` (in `requests`) are many requests in a few arrays, 32 bits per number. A draw reads whole
rows from them, in files or on a device. `PackedBatches` are the training batches of some steps in
one array. `CandidateBatch` is one batch with one array per field. An evaluation batch is cut from
its columns on the host and is never packed.

The choice of the candidates of a batch is separate from their data. `sampling` counts the
candidates of each kind in the columns. From the counts and random numbers it derives a few numbers
per request (`Starts`), and from these the rows to read (`Draw`). Of the table in `samplers`, which
`config.batch.sampler` chooses from, this is `funnel`; others draw request by request on the host.
"""
