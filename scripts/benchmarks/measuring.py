"""Times, rates and floors, for all benchmarks."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def donated(way: Callable, start: Any, *inputs: Any) -> Callable[[], None]:
    """A function that takes a step each time it is called, in place."""
    step = jax.jit(way, donate_argnums=0)
    held = [jax.tree.map(jnp.copy, start)]

    def call() -> None:
        held[0] = jax.block_until_ready(step(held[0], *inputs))

    return call


def interleaved(
    sides: Mapping[str, Callable[[], Any]], turns: int = 8, calls: int = 8, warm: int = 3
) -> dict[str, dict[str, float]]:
    """Milliseconds of a call of each side, in turns, so that noise meets all alike.

    A turn is several calls, as a training run takes its steps one after the other. The first ones
    are not counted: they find the caches of another side, and its threads still spinning.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, side in sides.items():
            for call in range(warm + calls):
                start = time.perf_counter()
                side()
                if call >= warm:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: spread(milliseconds) for name, milliseconds in times.items()}


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(numbers, n=4)
    return {"median": median, "lower quartile": low, "upper quartile": high}


def floor(flops: float, copied_bytes: float, milliseconds: float) -> dict[str, float]:
    """The time of the operations and the bytes at the machine's best, and how far that is.

    Operations run at the rate of a large matrix product, bytes at that of a large copy, one after
    the other.
    """
    least = 1e3 * (flops / matrix_rate() + copied_bytes / copy_bytes_rate())
    return {
        "flops": flops,
        "bytes": copied_bytes,
        "matrix rate, flops/s": matrix_rate(),
        "copy rate, bytes/s": copy_bytes_rate(),
        "ms": least,
        "times the floor": milliseconds / least,
    }


@functools.cache
def matrix_rate() -> float:
    """FLOPs a second of a large matrix product in float32."""
    size = 2048
    matrix = jnp.ones((size, size))
    product = jax.jit(lambda matrix: matrix @ matrix)
    return 2 * size**3 / best_seconds(lambda: jax.block_until_ready(product(matrix)))


@functools.cache
def copy_bytes_rate() -> float:
    """Bytes a second, read and written, of a large pass over memory, in place."""
    # Larger than any cache; fresh memory would be paid for page by page.
    array = jnp.ones(2**28)
    return 2 * array.nbytes / best_seconds(donated(lambda array: array + 1, array))


def best_seconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """The shortest of several calls: a rate is what the machine can do."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
