"""From requests to batches on devices.

    Columns ─draw, read→ rows ─pack_batches→ PackedBatches ─unpack→ CandidateBatch

`Columns` (in `requests`) are many requests in a few arrays, 32 bits per number. A draw reads whole
rows from them, in files or on a device. `PackedBatches` are the training batches of some steps in
one array. `CandidateBatch` is one batch with one array per field. An evaluation batch is cut from
its columns on the host and is never packed.

A sampler of the table in `samplers` draws the candidates of a batch, by `config.batch.sampler`.
`sampling` is the compiled form of `funnel`; other samplers draw request by request on the host.
"""
