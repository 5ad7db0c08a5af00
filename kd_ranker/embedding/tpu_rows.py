"""Rows of a table on a TPU: read, changed and written back in one pass, by a Pallas kernel.

XLA reads the rows of an update into one array, lays them out anew for its intermediate arrays, and
writes them from another; `docs/benchmarks.md` has the bytes and cycles. The kernel copies a block
of rows into on-chip memory, changes them there, and copies them back.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# A TPU lays out as many numbers of a row together, and as many places of a list.
_LANES = 128
# The numbers of a block of rows, 1 MiB. A kernel has 16 MiB for its blocks and intermediate arrays.
_BLOCK_NUMBERS = 1 << 18
# The place of a row that is neither read nor written.
_SKIPPED = -1

ChangeRows = Callable[
    [Float[Array, "block W"], Float[Array, "block D"], Float[Array, ""], Float[Array, ""]],
    Float[Array, "block W"],
]
"""A function (rows, gradients, learning rate, weight decay) -> new rows, each row on its own."""


def rewrite(
    change_rows: ChangeRows,
    table: Float[Array, "rows W"],
    place: Int[Array, "M"],
    is_changed: Bool[Array, "M"],
    gradients: Float[Array, "M D"],
    learning_rate: Float[Array, ""],
    weight_decay: Float[Array, ""],
    interpret: Any = False,
) -> Float[Array, "rows W"]:
    """Replace the rows that change, which differ, by those of `change_rows`, in place.

    `change_rows` gets a block of rows at a time; those that do not change hold any values there.
    `interpret` is the argument of `pallas_call` that simulates the kernel on another device.
    """
    # Imported here because it takes a third of a second, and few runs need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    count, width = gradients.shape
    columns = table.shape[1]
    padded_columns = -(-columns // _LANES) * _LANES
    block = max(_BLOCK_NUMBERS // padded_columns // _LANES, 1) * _LANES
    places = jnp.where(is_changed, place, _SKIPPED)
    places = jnp.pad(places, (0, -count % block), constant_values=_SKIPPED).reshape(-1, 1, block)

    def change_block(
        places_ref: Any,
        numbers_ref: Any,
        gradients_ref: Any,
        table_before_ref: Any,
        table_ref: Any,
        rows_ref: Any,
        copied: Any,
    ) -> None:
        """Change one block of rows; the references are to memory, and `copied` is a semaphore."""

        def for_each_changed_row(act: Callable[[Any], None]) -> None:
            def act_on(index: Any, _: None) -> None:
                pl.when(places_ref[0, index] != _SKIPPED)(lambda: act(index))

            jax.lax.fori_loop(0, block, act_on, None)

        def reading(index: Any) -> Any:
            in_table = table_before_ref.at[pl.ds(places_ref[0, index], 1)]
            return pltpu.make_async_copy(in_table, rows_ref.at[pl.ds(index, 1)], copied)

        def writing(index: Any) -> Any:
            in_table = table_ref.at[pl.ds(places_ref[0, index], 1)]
            return pltpu.make_async_copy(rows_ref.at[pl.ds(index, 1)], in_table, copied)

        # All copies of a block are under way at the same time.
        for_each_changed_row(lambda index: reading(index).start())
        for_each_changed_row(lambda index: reading(index).wait())
        rows_ref[...] = change_rows(
            rows_ref[...], gradients_ref[...], numbers_ref[0], numbers_ref[1]
        )
        for_each_changed_row(lambda index: writing(index).start())
        for_each_changed_row(lambda index: writing(index).wait())

    call = pl.pallas_call(
        change_block,
        out_shape=jax.ShapeDtypeStruct(table.shape, table.dtype),
        grid=(places.shape[0],),
        in_specs=[
            pl.BlockSpec((None, 1, block), lambda index: (index, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((block, width), lambda index: (index, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[pltpu.VMEM((block, columns), table.dtype), pltpu.SemaphoreType.DMA],
        input_output_aliases={3: 0},
        interpret=interpret,
    )
    return call(places, jnp.stack([learning_rate, weight_decay]), gradients, table)
