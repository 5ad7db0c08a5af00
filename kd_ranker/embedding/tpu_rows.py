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

NewRows = Callable[..., Float[Array, "block W"]]


def rewrite(
    new_rows: NewRows,
    table: Float[Array, "rows W"],
    place: Int[Array, "M"],
    is_changed: Bool[Array, "M"],
    gradients: Float[Array, "M D"],
    *numbers: Float[Array, ""],
    interpret: Any = False,
) -> Float[Array, "rows W"]:
    """Replace rows in place by `new_rows(rows, gradients, *numbers)`; see `row_optimizers`.

    `new_rows` is called on a block of rows at a time, and treats each row on its own. `interpret`
    is that of `pallas_call`, to simulate the kernel on another device.
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
        places: Any, numbers: Any, gradients: Any, before: Any, table: Any, rows: Any, arrived: Any
    ) -> None:
        """Change one block; all arguments are references to memory, except that of a semaphore."""

        def for_each_row(act: Callable[[Any, Any], None]) -> None:
            def act_unless_skipped(index: Any, _: None) -> None:
                place = places[0, index]
                pl.when(place != _SKIPPED)(lambda: act(pl.ds(index, 1), pl.ds(place, 1)))

            jax.lax.fori_loop(0, block, act_unless_skipped, None)

        def read(row: Any, place: Any) -> Any:
            return pltpu.make_async_copy(before.at[place], rows.at[row], arrived)

        def write(row: Any, place: Any) -> Any:
            return pltpu.make_async_copy(rows.at[row], table.at[place], arrived)

        for_each_row(lambda row, place: read(row, place).start())
        for_each_row(lambda row, place: read(row, place).wait())
        each_number = [numbers[index] for index in range(numbers.shape[0])]
        rows[...] = new_rows(rows[...], gradients[...], *each_number)
        for_each_row(lambda row, place: write(row, place).start())
        for_each_row(lambda row, place: write(row, place).wait())

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
    return call(places, jnp.stack(numbers), gradients, table)
