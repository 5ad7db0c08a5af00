"""Passes over the candidates of a request on a CPU, in C++: those of `cpu_curves.cc`."""

import math
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Int, Num

from kd_ranker import native

_LEAVING = "kd_ranker_leaving_places"
_SUMS = "kd_ranker_running_sums"


def are_available() -> bool:
    """Compile and load the functions, see `native.is_available`."""
    return native.is_available(Path(__file__).with_suffix(".cc"), _LEAVING, _SUMS)


def leaving_places(arriving: Int[Array, "N"], shown: int) -> Int[Array, "N"]:
    """Return the place that each newcomer evicts; see `funnel`."""
    leaving = jax.ShapeDtypeStruct(arriving.shape, arriving.dtype)
    call = jax.ffi.ffi_call(_LEAVING, leaving, vmap_method="broadcast_all")
    return call(arriving, shown=np.int64(shown))


def running_sums(numbers: Num[Array, "N ..."]) -> Num[Array, "N ..."]:
    """Return the sums over the first k entries, k = 1..N."""
    sums = jax.ShapeDtypeStruct(numbers.shape, numbers.dtype)
    call = jax.ffi.ffi_call(_SUMS, sums, vmap_method="broadcast_all")
    candidates, *others = numbers.shape
    return call(numbers, candidates=np.int64(candidates), width=np.int64(math.prod(others)))
