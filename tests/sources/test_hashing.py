import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kd_ranker.sources.hashing import hash_into, murmur64, splitmix64

ids = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1)


def shifted(bits: int, by: int) -> int:
    return bits ^ bits >> by


@given(ids)
def test_hashes_are_those_that_are_published(numbers):
    """Both restated in Python's whole numbers."""
    bits = np.array(numbers, np.int64).view(np.uint64)
    for murmur, splitmix, number in zip(murmur64(bits), splitmix64(bits), bits, strict=True):
        expected = shifted(int(number), 33) * 0xFF51AFD7ED558CCD % 2**64
        expected = shifted(expected, 33) * 0xC4CEB9FE1A85EC53 % 2**64
        assert murmur == shifted(expected, 33)
        expected = (int(number) + 0x9E3779B97F4A7C15) % 2**64
        expected = shifted(expected, 30) * 0xBF58476D1CE4E5B9 % 2**64
        expected = shifted(expected, 27) * 0x94D049BB133111EB % 2**64
        assert splitmix == shifted(expected, 31)


def test_ids_are_spread_evenly():
    counts = np.bincount(hash_into(np.arange(100_000), 10), minlength=10)
    # 10,000 of each; a binomial's standard deviation is 95.
    assert (abs(counts - 10_000) < 500).all()
