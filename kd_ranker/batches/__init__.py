"""From requests to batches: `sampling` and `samplers` draw, `cutting` reads and packs."""
