"""From requests to batches on devices: sampling, packing, training, evaluation."""
