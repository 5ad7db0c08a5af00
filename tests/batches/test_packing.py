import jax
import numpy as np
import pytest

from kd_ranker.requests import columns

ARRAYS = {
    "id": np.arange(5, dtype=np.int64),
    "number": np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 3, 2),
    "none": np.zeros((5, 0), np.int32),
    "flag": np.arange(10).reshape(5, 2) % 3 == 0,
    "label": np.full(5, 1, np.uint8),
}


@pytest.mark.parametrize("on", ["host", "device"])
def test_what_is_packed_comes_back(on):
    rows, spans = columns.pack(ARRAYS)
    assert rows.shape == (5, 1 + 6 + 0 + 2 + 1)
    unpack = (
        jax.jit(columns.unpack_rows, static_argnums=1) if on == "device" else columns.unpack_rows
    )
    for index in (np.array([3, 0, 3]), np.array([[1], [4]])):
        unpacked = unpack(rows[index], spans)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(unpacked[name], array[index])
            kind = "int32" if array.dtype.kind in "iu" else array.dtype.name
            assert unpacked[name].dtype == kind


def test_a_first_row_may_stand_for_nothing():
    unpacked = columns.unpack_rows(*columns.pack(ARRAYS, nothing={"number": np.nan, "id": -1}))
    assert unpacked["id"].tolist() == [-1, 0, 1, 2, 3, 4]
    assert np.isnan(unpacked["number"][0]).all()
    assert not unpacked["flag"][0].any()
    np.testing.assert_array_equal(unpacked["number"][1:], ARRAYS["number"])
