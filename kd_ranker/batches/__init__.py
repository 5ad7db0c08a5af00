"""From requests to batches on devices.

Data about requests has four forms between disk and step:

    Columns ─draw, read→ rows ─pack_batches→ PackedBatches ─unpack→ CandidateBatch

`Columns` (in `requests`) are many requests in a few arrays, 32 bits per number. A draw reads whole
rows from them, in files or on a device. `PackedBatches` are the training batches of some steps in
one array. `CandidateBatch` is one batch with one array per field. An evaluation batch is cut from
its columns on the host and is never packed.

The choice of the candidates of a batch is separate from their data. `sampling` counts the
candidates of each kind in the columns. From the counts and random numbers it derives a few numbers
per request (`Starts`), and from these places in requests (`Draw`). This is `funnel` of the table in
`samplers`, where `config.batch.sampler` chooses; others draw request by request on the host.
"""
