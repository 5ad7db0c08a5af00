"""Ids and categories as whole numbers: a key for each value, whatever type the log gives it.

A whole number is its own key. A text's is a hash of 64 bits (SipHash, by `pandas.util.hash_array`),
so that all that follows sorts and searches numbers. Of n different texts, two share a key with a
probability of about n² / 2⁶⁵: 3 in 100,000 for 30 million of them.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int64, UInt64

from kd_ranker.sources.hashing import splitmix64

# The key of a missing value; no id is as small as that.
MISSING = np.iinfo(np.int64).min
# Beyond it, a float is not the whole number that was meant.
_EXACT_IN_FLOATS = 2.0**53
_OF_SALT = np.uint64(0xD1342543DE82EF95)


class Keys(NamedTuple):
    """A column of ids or categories.

    Attributes:
      key: the key of each value, `MISSING` where there is none.
      texts: the texts that occur, for a column of texts.
      text_keys: their keys.
      num_bad: how many values are no ids: numbers that are not whole.
    """

    key: Int64[np.ndarray, "n"]
    texts: pa.Array | None
    text_keys: Int64[np.ndarray, "distinct"]
    num_bad: int


def column_keys(array: pa.Array) -> Keys:
    """The keys of whole numbers, truth values or texts; "" counts as missing."""
    none = np.zeros(0, np.int64)
    type_ = array.type
    if pa.types.is_null(type_):
        return Keys(np.full(len(array), MISSING), None, none, 0)
    if pa.types.is_boolean(type_):
        array = array.cast(pa.int8())
    if pa.types.is_floating(type_):
        number = array.fill_null(float("nan")).to_numpy(zero_copy_only=False).astype(np.float64)
        whole = (np.abs(number) <= _EXACT_IN_FLOATS) & (np.floor(number) == number)
        key = np.where(whole, np.where(whole, number, 0).astype(np.int64), MISSING)
        return Keys(key, None, none, int((~whole & ~np.isnan(number)).sum()))
    if pa.types.is_integer(array.type):
        return Keys(_integers(array), None, none, 0)
    if not pa.types.is_dictionary(type_):
        array = _plain(array).dictionary_encode()
    indices = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    if pa.types.is_integer(array.dictionary.type):
        keys = np.append(_integers(array.dictionary), MISSING)
        return Keys(keys[indices], None, none, 0)
    used = np.zeros(len(array.dictionary) + 1, bool)
    used[indices] = True
    texts = _plain(array.dictionary)
    text_keys = _hashes(texts)
    keys = np.append(text_keys, MISSING)
    used = used[:-1] & (text_keys != MISSING)
    return Keys(keys[indices], texts.filter(pa.array(used)), text_keys[used], 0)


def _integers(array: pa.Array) -> Int64[np.ndarray, "n"]:
    if pa.types.is_uint64(array.type):
        array = array.view(pa.int64())
    return array.cast(pa.int64()).fill_null(MISSING).to_numpy(zero_copy_only=False)


def _hashes(texts: pa.Array) -> Int64[np.ndarray, "n"]:
    """The keys of texts, `MISSING` of null and of ""."""
    missing = pc.equal(pc.binary_length(texts.fill_null("" if _is_text(texts) else b"")), 0)
    objects = np.asarray(texts.to_pylist(), dtype=object)
    objects[missing.to_numpy(zero_copy_only=False)] = ""
    hashed = pd.util.hash_array(objects, categorize=False).view(np.int64)
    hashed = np.where(hashed == MISSING, 0, hashed)
    return np.where(missing.to_numpy(zero_copy_only=False), MISSING, hashed)


def _is_text(array: pa.Array) -> bool:
    return pa.types.is_string(array.type) or pa.types.is_large_string(array.type)


def _plain(texts: pa.Array) -> pa.Array:
    """The same texts in a layout that Arrow computes with."""
    if pa.types.is_string_view(texts.type):
        return texts.cast(pa.large_string())
    if pa.types.is_binary_view(texts.type) or pa.types.is_fixed_size_binary(texts.type):
        return texts.cast(pa.large_binary())
    return texts


def mixed(key: Int64[np.ndarray, "n"], salt: int = 0) -> UInt64[np.ndarray, "n"]:
    """A hash of each key, another one for each salt."""
    return splitmix64(key.view(np.uint64) + np.uint64(salt % 2**64) * _OF_SALT)


def share_of(key: Int64[np.ndarray, "n"], salt: int) -> Float64[np.ndarray, "n"]:
    """A number in [0, 1) for each key, which looks drawn at random: the top bits of `mixed`."""
    return (mixed(key, salt) >> np.uint64(11)).astype(np.float64) / 2.0**53
