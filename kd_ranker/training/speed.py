"""How fast a run trains and where its time goes, from one line of metrics to the next.

speed/steps, speed/requests, speed/candidates      per second, padding included
time/data, time/evaluation, time/checkpoint        shares of the time: waiting for batches,
                                                   measuring, copying and saving the state
time/step                                          the rest: the steps themselves
device/flops                                       floating-point operations per second of one
                                                   device, over those of a large matrix product
device/memory                                      most bytes that were in use on one device,
                                                   where it counts them
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kd_ranker.batches.cutting import PackedBatches

_ACTIVITIES = ("data", "evaluation", "checkpoint")
# A matrix product that takes as long shows what a device can do.
_SECONDS_OF_PRODUCT = 0.01
_LARGEST_PRODUCT = 4096  # 128 MB on the device


class SpeedMeter:
    """The time since the last line of metrics, and what it was spent on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Start the time; `clock` returns seconds."""
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Forget what was before, such as a compilation."""
        self._begin = self._clock()
        self._seconds = dict.fromkeys(_ACTIVITIES, 0.0)
        self._steps = 0

    @contextlib.contextmanager
    def spent_on(self, activity: str) -> Iterator[None]:
        """Count the time within as that of an activity other than the steps."""
        begin = self._clock()
        yield
        self._seconds[activity] += self._clock() - begin

    def add_steps(self, steps: int) -> None:
        """Count steps that were taken."""
        self._steps += steps

    def scalars(self, requests: int, candidates: int, flops: float) -> dict[str, float]:
        """Return the scalars since the last restart; none if no step was taken.

        Args:
          requests: of a batch, of all devices.
          candidates: the places of a request of a batch.
          flops: of a step, of one device; 0 if they are not known.
        """
        elapsed = self._clock() - self._begin
        if not self._steps or elapsed <= 0:
            return {}
        steps = self._steps / elapsed
        shares = {name: seconds / elapsed for name, seconds in self._seconds.items()}
        scalars = {
            "speed/steps": steps,
            "speed/requests": steps * requests,
            "speed/candidates": steps * requests * candidates,
            "time/step": 1 - sum(shares.values()),
            **{f"time/{name}": share for name, share in shares.items()},
        }
        # Before `matrix_rate`, which needs memory of its own.
        memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if memory:
            scalars["device/memory"] = float(memory)
        if flops:
            scalars["device/flops"] = steps * flops / matrix_rate()
        return scalars


def sizes_of(batches: PackedBatches) -> tuple[int, int]:
    """Return the requests of a batch, of all devices, and the candidates of each."""
    requests = math.prod(batches.rows.shape[:-2])
    return requests, batches.layout.row["candidates"].shape[0]


def flops_of(compiled: Any) -> float:
    """Return the floating-point operations of a compiled program on one device; 0 if unknown.

    The body of a loop counts once, and so do the steps of one call. Functions in C++ do not count.
    """
    analysis = compiled.cost_analysis() or {}
    return max(float(analysis.get("flops", 0.0)), 0.0)


@functools.cache
def matrix_rate() -> float:
    """Measure the FLOPs per second of a large float32 matrix product on one device."""
    size = 512
    seconds = _seconds_of_product(size)
    while seconds < _SECONDS_OF_PRODUCT and size < _LARGEST_PRODUCT:
        size *= 2
        seconds = _seconds_of_product(size)
    return 2 * size**3 / seconds


def _seconds_of_product(size: int) -> float:
    """Return the shortest of three times of a product of square matrices."""
    matrix = jnp.ones((size, size))
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
