"""The configs that experiments start from: every key with its default."""

import copy

from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from kd_ranker.config.schema import keys_of
from kd_ranker.errors import UserError


def get_config(source: str = "") -> ConfigDict:
    """The default config of a source.

    Args:
      source: a value of `data.name`; "" leaves out the keys that only one source has.
    """
    defaults = {name: copy.deepcopy(key.default) for name, key in keys_of(source).items()}
    config = ConfigDict(unflatten_dict(defaults, sep="."))
    config.data.name = source
    return config


def check_variant(variant: str, *known: str) -> None:
    """Raises UserError for a `:variant` that a config does not have; "" is the default."""
    if variant and variant not in known:
        names = ", ".join(f":{name}" for name in known) or "none"
        raise UserError(f"there is no variant :{variant}; the variants are: {names}")
