"""The configs that experiments start from: every key with its default."""

from ml_collections import ConfigDict

from kd_ranker.config.schema import keys_of
from kd_ranker.errors import UserError


def get_config(source: str = "") -> ConfigDict:
    """The default config of a source.

    Args:
      source: a value of `data.name`; "" leaves out the keys that only one source has.
    """
    config = ConfigDict()
    for name, key in keys_of(source).items():
        *sections, last = name.split(".")
        holder = config
        for section in sections:
            if section not in holder:
                holder[section] = ConfigDict()
            holder = holder[section]
        holder[last] = (
            ConfigDict(key.default) if isinstance(key.default, ConfigDict) else key.default
        )
    config.data.name = source
    return config


def check_variant(variant: str, *known: str) -> None:
    """Raises UserError for a `:variant` that a config does not have; "" is the default."""
    if variant and variant not in known:
        names = ", ".join(f":{name}" for name in known) or "none"
        raise UserError(f"there is no variant :{variant}; the variants are: {names}")
