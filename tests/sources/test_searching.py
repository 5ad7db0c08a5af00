import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kd_ranker.sources.searching import look_up


@given(st.lists(st.integers(-5, 5)), st.lists(st.integers(-7, 7)))
def test_keys_are_found_where_they_are(known, wanted):
    keys = np.unique(np.array(known, np.int64))
    place, found = look_up(keys, np.array(wanted, np.int64))
    assert found.tolist() == [key in known for key in wanted]
    assert place.tolist() == [
        sorted(set(known)).index(key) if key in known else 0 for key in wanted
    ]
