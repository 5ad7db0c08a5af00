"""Ways of distilling that a sweep compares."""

from ml_collections import ConfigDict


def with_ways(
    config: ConfigDict, rates: tuple[float, ...], weights: tuple[float, ...] = (1.0,)
) -> ConfigDict:
    """No distillation, and every way of distilling: two modes, and losses of three kinds.

    One loss meets the teacher's probabilities, one its order, one who is at the top. All ways are
    tuned alike, over `rates` and `weights`, with three seeds.
    """
    config.sweep.modes = ("none", "aux", "shared")
    config.sweep.axes.distill.loss = ("bce", "softmax", "topk")
    config.sweep.weights = weights
    config.sweep.axes.optimizer.learning_rate = rates
    config.sweep.seeds = (0, 1, 2)
    return config
