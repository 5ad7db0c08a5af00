"""Hashes of values, whatever type the log gives them."""

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import UInt64

from kd_ranker.sources.hashing import splitmix64


def hashes_of(values: pa.Array) -> UInt64[np.ndarray, "n"]:
    """A hash of each value: of whole numbers by splitmix64, of texts by SipHash."""
    if pa.types.is_integer(values.type):
        numbers = values.fill_null(0).to_numpy(zero_copy_only=False)
        return splitmix64(numbers.astype(np.uint64, casting="unsafe"))
    encoded = values.dictionary_encode()
    texts = np.append(encoded.dictionary.to_numpy(zero_copy_only=False), "").astype(object)
    hashed = splitmix64(pd.util.hash_array(texts, categorize=False))
    return hashed[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
