"""Hashes of whole numbers of 64 bits, the same on every platform and in every process."""

import numpy as np
from jaxtyping import Int64, UInt64


def murmur64(bits: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """The 64-bit finaliser of MurmurHash3 (Appleby, 2011), a bijection.

    >>> murmur64(np.array([0, 1], np.uint64)).tolist()
    [0, 12994781566227106604]
    """
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        bits = (bits ^ (bits >> np.uint64(33))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(33))


def splitmix64(bits: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """A step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a bijection.

    >>> splitmix64(np.array([0, 1], np.uint64)).tolist()
    [16294208416658607535, 10451216379200822465]
    """
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def hash_into(ids: Int64[np.ndarray, "n"], size: int) -> Int64[np.ndarray, "n"]:
    """A number in [0, size) for each id, by `murmur64`.

    Ids that differ may share a number: with as many numbers as ids, a share 1/e of them stays
    unused.

    >>> hash_into(np.array([7, 8, 7]), 1000).tolist()
    [789, 783, 789]
    """
    return (murmur64(ids.astype(np.uint64)) % np.uint64(size)).astype(np.int64)
