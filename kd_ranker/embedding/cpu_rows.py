"""Rows of tables on a CPU in C++: gathered, or updated by Adam, in one pass over a batch's rows.

XLA makes a pass over memory for each intermediate array of rows, of which an update has many;
`docs/benchmarks.md` has the times. The functions are those of `cpu_rows.cc`.
"""

from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kd_ranker import native

_GATHER = "kd_ranker_gather"
_UPDATE = "kd_ranker_update_by_adam"


def are_available() -> bool:
    """Compile and load the functions, see `native.is_available`."""
    return native.is_available(Path(__file__).with_suffix(".cc"), _GATHER, _UPDATE)


def gather(
    tables: Float[Array, "runs rows W"], row: Int[Array, "M"], width: int
) -> Float[Array, "runs M D"]:
    """Return the first `width` numbers of these rows of each run's table."""
    gathered = jax.ShapeDtypeStruct((tables.shape[0], row.shape[0], width), tables.dtype)
    return jax.ffi.ffi_call(_GATHER, gathered, vmap_method="sequential")(tables, row)


def update_by_adam(
    tables: Float[Array, "runs rows W"],
    row: Int[Array, "M"],
    position: Int[Array, "M"],
    represents: Bool[Array, "M"],
    gradients: Float[Array, "runs M D"],
    learning_rate: Float[Array, "runs"],
    weight_decay: Float[Array, "runs"],
    may_change: Bool[Array, "runs"],
    b1: float,
    b2: float,
    eps: float,
) -> Float[Array, "runs rows W"]:
    """Update rows in place; see `row_optimizers.update_tables`."""
    updated = jax.ShapeDtypeStruct(tables.shape, tables.dtype)
    call = jax.ffi.ffi_call(_UPDATE, updated, input_output_aliases={0: 0}, vmap_method="sequential")
    arrays = (row, position, represents, gradients, learning_rate, weight_decay, may_change)
    return call(tables, *arrays, b1=np.float64(b1), b2=np.float64(b2), eps=np.float64(eps))
