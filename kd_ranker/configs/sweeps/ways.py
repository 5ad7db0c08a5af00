"""Ways of training that a sweep compares."""

from ml_collections import ConfigDict

from kd_ranker.distillation.losses import LOSSES


def with_ways(
    config: ConfigDict,
    rates: tuple[float, ...],
    weights: tuple[float, ...] = (1.0,),
    unshown: tuple[float, ...] = (0.1,),
    losses: tuple[str, ...] = ("bce", "softmax", "topk"),
    stages: bool = True,
    rivals: tuple[str, ...] = ("trees",),
) -> ConfigDict:
    """The ways without the final ranker's scores, then two modes that learn from them.

    The first are plain mode `none`; the same with candidates that were not shown as negatives, with
    a list loss on user labels, and with losses on how far a candidate came. Ways with scores may
    use all of this too: negatives always, and in both modes a loss on scores and a loss on stages
    at once. All have the same `rates` and three seeds. All except plain `none` have negatives of
    the same weights, and those that distill have the same `weights`.

    Args:
      config: the config of one student; changed in place.
      rates: values of `optimizer.learning_rate`.
      weights: values of `distill.weight`.
      unshown: values of `train.unshown_weight`; mode `none` also tries three times the last one.
      losses: values of `distill.loss` from the scores in mode `aux`; by default one takes the
        probabilities, one their order, and one who is at the top. Those that need no probabilities
        learn from the stages as well, each as a way without scores.
      rivals: rankers of other architectures that are compared, too.
      stages: whether the log holds candidates that were not shown. Without, they cannot be
        negatives, and there are no stages to learn from.
    """
    negatives = f" train.unshown_weight={_joined(unshown)}" if stages else ""
    more = f"train.unshown_weight={_joined((*unshown, round(3 * unshown[-1], 6)))}"
    orders = [f"{loss}:stage" for loss in losses if not LOSSES[loss].needs_probabilities]
    of_stages = (
        f"distill.mode=none {more}",
        f"distill.mode=aux{negatives} distill.loss={','.join(orders)}",
    )
    config.sweep.ways = (
        "distill.mode=none",
        f"distill.mode=none{negatives} train.user_loss=bce+softmax",
        *(of_stages if stages else ()),
        f"distill.mode=aux{negatives} distill.loss={_joined(losses)}",
        f"distill.mode=aux,shared{negatives} distill.terms=softmax+softmax:stage"
        if stages
        else "distill.mode=shared distill.loss=softmax",
    )
    config.sweep.weights = weights
    config.sweep.axes.optimizer.learning_rate = rates
    config.sweep.seeds = (0, 1, 2)
    config.sweep.rivals = rivals
    return config


def _joined(values: tuple[float | str, ...]) -> str:
    return ",".join(map(str, values))
