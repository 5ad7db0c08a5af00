"""The page of keys, and what the table of keys must keep to."""

import pytest

from kd_ranker.config import schema
from kd_ranker.config.key import Bound, TermNames
from kd_ranker.config.keys import DATA_KEYS, KEYS

EVERY = [*KEYS.values(), *(key for keys in DATA_KEYS.values() for key in keys.values())]


@pytest.mark.parametrize("key", EVERY, ids=lambda key: key.name)
def test_a_default_is_allowed_and_an_influence_known(key):
    assert key.influences in schema.INFLUENCES
    assert key.sweep in ("no", "members", "cohorts")
    assert key.help
    assert not key.help.endswith(".")
    values = key.default if isinstance(key.default, tuple) else (key.default,)
    for value in values:
        if isinstance(key.allowed, Bound):
            assert key.allowed.holds(value)
        elif isinstance(key.allowed, TermNames):
            key.allowed.check(key.name, value)
        elif key.allowed is not None and value:
            assert value in key.allowed


def test_the_numbers_of_losses_are_keys_that_a_sweep_varies():
    for name in ("temperature", "top_k", "numbers"):
        assert KEYS[f"distill.{name}"].sweep == "members"
