"""The bins of `calibration.csv`, of labels with about the same predicted probability."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kd_ranker.evaluation.metrics.metric import Sums, ratio


def calibration(sums: Sums, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each task and bin with a weight.

    `sums` has `bin_weight`, `bin_predicted` and `bin_observed`, each [T, B].
    """
    weight = np.asarray(sums["bin_weight"])
    predicted = ratio(sums["bin_predicted"], weight)
    observed = ratio(sums["bin_observed"], weight)
    return [
        {
            "task": tasks[task],
            "bin": index,
            "weight": float(weight[task, index]),
            "predicted": float(predicted[task, index]),
            "observed": float(observed[task, index]),
        }
        for task, index in np.argwhere(weight).tolist()
    ]
