"""Three ways of updating the tables of a population, at the cascade's sizes with Adam.

`loop` is the project's: one flat table, and a loop over runs in the program. `flat` is one
gather and one scatter over all runs' rows, at ids with an offset a run. `vmap` maps the
update of one run over stacked tables. On a TPU, `kernel` is the project's with
`parallel.row_kernel`.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_ranker.embedding.row_optimizers import ROW_OPTIMIZERS, find_occurrences, update_tables
from scripts.benchmarks import measuring

ROWS, WIDTH, IDS = 8_192, 32, 4_096
OPTIMIZER = ROW_OPTIMIZERS["adam"]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times all three in turn."""
    runs = arguments.runs
    generator = np.random.default_rng(0)
    columns = WIDTH + 1 + OPTIMIZER.slots(WIDTH)
    gradients = jnp.asarray(generator.normal(size=(runs, IDS, WIDTH)), jnp.float32)
    tables = jnp.asarray(generator.normal(size=(runs, ROWS, columns)), jnp.float32)
    owners = {"loop": ROWS, "flat": runs * ROWS, "vmap": ROWS, "kernel": ROWS}
    milliseconds = measuring.interleaved(
        {
            way.__name__: measuring.donated(
                way, (tables, jnp.zeros(owners[way.__name__], jnp.int32)), gradients
            )
            for way in ways(runs, jnp.asarray(generator.integers(0, ROWS, IDS), jnp.int32))
        }
    )
    best_other = min(milliseconds["flat"]["median"], milliseconds["vmap"]["median"])
    ratio = milliseconds["loop"]["median"] / best_other
    updated = runs * IDS * columns * tables.dtype.itemsize
    return {
        "ratio": ratio,
        "bar": 1.0,
        "passed": ratio <= 1.0,
        "ms": milliseconds,
        "floor": measuring.floor(0, 2 * updated, milliseconds["loop"]["median"]),
        "sizes": {"runs": runs, "rows": ROWS, "width": WIDTH, "ids": IDS},
    }


def ways(runs: int, row: Any) -> list[Callable]:
    """Returns them, each (tables and owners, gradients) -> tables and owners."""
    mask = jnp.ones(IDS, bool)
    numbers = (jnp.full(runs, 0.01), jnp.full(runs, 0.1), jnp.ones(runs, bool))

    def loop(state: Any, gradients: Any, kernel_on_tpu: bool = False) -> Any:
        tables, owner = state
        occurrences, owner = find_occurrences(row, mask, owner)
        arguments = (tables, occurrences, gradients, *numbers)
        return update_tables(OPTIMIZER, *arguments, kernel_on_tpu=kernel_on_tpu), owner

    def kernel(state: Any, gradients: Any) -> Any:
        return loop(state, gradients, kernel_on_tpu=True)

    def flat(state: Any, gradients: Any) -> Any:
        tables, owner = state
        all_rows = (row + (jnp.arange(runs) * ROWS)[:, None]).reshape(-1)
        occurrences, owner = find_occurrences(all_rows, jnp.tile(mask, runs), owner)
        new = update_tables(
            OPTIMIZER,
            tables.reshape(1, runs * ROWS, -1),
            occurrences,
            gradients.reshape(1, -1, WIDTH),
            *(number[:1] for number in numbers),
        )
        return new.reshape(tables.shape), owner

    def vmap(state: Any, gradients: Any) -> Any:
        tables, owner = state
        occurrences, owner = find_occurrences(row, mask, owner)

        def one(table: Any, *others: Any) -> Any:
            first = jax.tree.map(lambda array: array[None], others)
            return update_tables(OPTIMIZER, table[None], occurrences, *first)[0]

        return jax.vmap(one)(tables, gradients, *numbers), owner

    on_tpu = [kernel] if jax.default_backend() == "tpu" else []
    return [loop, flat, vmap, *on_tpu]
