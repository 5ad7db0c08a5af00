"""Ways of training that a sweep compares."""

from ml_collections import ConfigDict


def with_ways(
    config: ConfigDict,
    rates: tuple[float, ...],
    weights: tuple[float, ...] = (1.0,),
    unshown: tuple[float, ...] = (0.1, 0.3),
    losses: tuple[str, ...] = ("bce", "softmax", "topk"),
) -> ConfigDict:
    """The ways without the final ranker's scores, then two modes that distill from them.

    The first learn from user labels, from candidates that were not shown, from a list loss on user
    labels, and from how far a candidate came. All have the same `rates` and three seeds, and those
    that distill have the same `weights`.

    Args:
      config: the config of one student; changed in place.
      rates: values of `optimizer.learning_rate`.
      weights: values of `distill.weight`.
      unshown: values of `train.unshown_weight` for its way.
      losses: values of `distill.loss` from the scores; by default one takes the probabilities, one
        their order, and one who is at the top.
    """
    config.sweep.ways = (
        "distill.mode=none",
        f"distill.mode=none train.unshown_weight={','.join(map(str, unshown))}",
        "distill.mode=none train.user_loss=bce+softmax",
        "distill.mode=aux distill.loss=topk:stage",
        f"distill.mode=aux,shared distill.loss={','.join(losses)}",
    )
    config.sweep.weights = weights
    config.sweep.axes.optimizer.learning_rate = rates
    config.sweep.seeds = (0, 1, 2)
    return config
