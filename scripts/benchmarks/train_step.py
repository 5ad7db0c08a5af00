"""A train step of the default student against the same student in plain PyTorch.

Same sizes, same random batch, the same losses, Adam on the dense part and sparse Adam on the
tables. PyTorch reads the batch as rows of one user and one item, as such models are usually fed;
beside it stand the same model with the user's side computed once a request, and that with Adam on
the unique rows of a batch as well, which is as careful as PyTorch gets without a kernel of its own.
"""

import argparse
import sys
from typing import Any

import numpy as np

from scripts.benchmarks import measuring
from scripts.benchmarks.programs import Program
from scripts.benchmarks.sizes import Sizes

BAR = 4.0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times all sides in turn; `ratio` is that of rows a second."""
    del arguments
    try:
        from scripts.benchmarks import torch_student
    except ImportError:
        sys.exit("train_step needs PyTorch: .venv/bin/pip install -e '.[torch]'")
    sizes = Sizes()
    rows = sizes.requests * sizes.candidates
    batch, items = sizes.batch(), sizes.random_items()
    config = sizes.config()
    ours = Program({"": config}, sizes.spec(), items, batch)
    config.optimizer.table_name = "adagrad"
    adagrad = Program({"": config}, sizes.spec(), items, batch)
    by_request = {
        "user_id": batch.user_id.astype(np.int64),
        "user_features": batch.user_features,
        "item_id": batch.item_id.astype(np.int64),
        "item_features": np.asarray(items.features)[batch.item_id],
        "user_label": batch.user_label,
        "label_weight": batch.label_weight[..., None],
        "teacher_probability": batch.teacher_probability,
        "teacher_weight": batch.teacher_weight,
    }
    by_row = {
        name: np.repeat(array, sizes.candidates, axis=0)
        if name.startswith("user_") and name != "user_label"
        else array.reshape(rows, *array.shape[2:])
        for name, array in by_request.items()
    }
    milliseconds = measuring.interleaved(
        {
            "kd_ranker": ours.step,
            "kd_ranker, row-wise Adagrad": adagrad.step,
            "PyTorch": torch_student.trainer(sizes, by_row),
            "PyTorch, users once a request": torch_student.trainer(sizes, by_request),
            "PyTorch, careful": torch_student.careful_trainer(sizes, by_request),
        },
    )
    median = {name: times["median"] for name, times in milliseconds.items()}
    ratio = median["PyTorch"] / median["kd_ranker"]
    return {
        "ratio": ratio,
        "bar": BAR,
        "passed": ratio >= BAR,
        "ratio, row-wise Adagrad": median["PyTorch"] / median["kd_ranker, row-wise Adagrad"],
        "ratio, PyTorch with users once a request": (
            median["PyTorch, users once a request"] / median["kd_ranker"]
        ),
        "ratio, careful PyTorch": median["PyTorch, careful"] / median["kd_ranker"],
        "ms": milliseconds,
        "rows a second": {name: 1e3 * rows / time for name, time in median.items()},
        "floor": measuring.floor(
            ours.flops, 2 * rows * ours.row_bytes("item"), median["kd_ranker"]
        ),
        "sizes": vars(sizes),
    }
