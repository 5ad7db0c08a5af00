"""The methods that a sweep compares, and their runs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kd_ranker.distillation.losses import LOSSES

Run = dict[str, Any]  # values by key, as `sweep` of a config file yields them


def grid(values: Mapping[str, Sequence[Any]]) -> Iterator[Run]:
    """Yield all combinations of the values of some keys; the last key varies first.

    >>> list(grid({"distill.mode": ("none", "aux"), "seed": (0,)}))
    [{'distill.mode': 'none', 'seed': 0}, {'distill.mode': 'aux', 'seed': 0}]
    """
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def compare_methods(
    rates: Sequence[float],
    weights: Sequence[float] = (1.0,),
    unshown: Sequence[float] = (0.1,),
    losses: Sequence[str] = ("bce", "softmax", "topk"),
    stages: bool = True,
    more: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> Iterator[Run]:
    """Yield the runs of methods without the final ranker's scores, and of two modes with them.

    Without scores: mode `none` on the labels of shown candidates; with a list loss as well; with
    candidates that were not shown as negatives; and losses on how far a candidate came. With
    scores: mode `aux` with one loss; and both modes with a loss on scores and one on stages. All
    except plain `none` use negatives.

    Args:
      rates: values of `optimizer.learning_rate`.
      weights: values of `distill.weight`, of every method that distills.
      unshown: values of `train.unshown_weight`, of every method with negatives; the one without
        distillation also tries three times the last value.
      losses: losses on the scores for mode `aux`. By default one takes the probabilities, one their
        order, and one the top. Those that need no probabilities are tried on stages, too.
      stages: whether the log holds candidates that were not shown. If not, there are no negatives
        and no stages.
      more: values of other keys, of every method.
      seeds: values of `seed`, of every method.
    """
    every = {"seed": seeds, "optimizer.learning_rate": rates, **(more or {})}
    negatives = {"train.unshown_weight": unshown} if stages else {}
    distilled = {**every, **negatives, "distill.weight": weights}

    yield from grid({"distill.mode": ["none"], **every})
    yield from grid(
        {
            "distill.mode": ["none"],
            "train.user_loss": ["bce+softmax"],
            **every,
            **negatives,
        }
    )
    if stages:
        stronger = round(3 * unshown[-1], 6)
        yield from grid(
            {
                "distill.mode": ["none"],
                **every,
                "train.unshown_weight": (*unshown, stronger),
            }
        )
        of_order = [loss for loss in losses if not LOSSES[loss].needs_probabilities]
        yield from grid(
            {
                "distill.mode": ["aux"],
                "distill.loss": [f"{loss}:stage" for loss in of_order],
                **distilled,
            }
        )
    yield from grid({"distill.mode": ["aux"], "distill.loss": losses, **distilled})
    if stages:
        yield from grid(
            {
                "distill.mode": ["aux", "shared"],
                "distill.loss": ["softmax + softmax:stage"],
                **distilled,
            }
        )
    else:
        yield from grid({"distill.mode": ["shared"], "distill.loss": ["softmax"], **distilled})
