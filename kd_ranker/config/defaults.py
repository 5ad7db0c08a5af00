"""The parts of a config file: every key with its default, and features of a user's own log."""

import copy
from typing import Any

from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from kd_ranker.config.schema import keys_of
from kd_ranker.errors import UserError, check_choice
from kd_ranker.sources.logs.layout import EARLY_SCORES, IDENTIFYING, OPTIONAL


def get_config(source: str = "") -> ConfigDict:
    """The default config of a source; "" leaves out the keys that only one source has."""
    defaults = {name: copy.deepcopy(key.default) for name, key in keys_of(source).items()}
    config = ConfigDict(unflatten_dict(defaults, sep="."))
    config.data.name = source
    return config


def check_variant(variant: str, *known: str) -> None:
    """Raise UserError for a `:variant` that a config does not have; "" is the default."""
    if variant and variant not in known:
        names = ", ".join(f":{name}" for name in known) or "none"
        raise UserError(f"there is no variant :{variant}; the variants are: {names}")


def columns(**columns: str) -> ConfigDict:
    """Name the columns of a log, an entry of `config.data.columns` for each role; others are ""."""
    roles = (*IDENTIFYING, *OPTIONAL, EARLY_SCORES)
    for role in columns:
        check_choice("data.columns", role, roles)
    return ConfigDict({role: columns.get(role, "") for role in roles})


def feature(
    of: str,
    kind: str,
    column: str = "",
    hashed: bool = False,
    size: int = 100_000,
    length: int = 1,
    standardize: bool = True,
    cheap: bool = True,
) -> ConfigDict:
    """Describe one feature of a user's own log, an entry of `config.data.features`.

    Args:
      of: its owner: "user" or "context" (one value per request), "item" (one value per item, the
        same in every request), "candidate" (differs from request to request), or "event": a list
        with an entry for each event of the history, dense and not standardized.
      kind: "dense", a number, or a list of `length` of them, such as an embedding; "category", a
        whole number or text; "bag", an unordered list of these; or "history", a list of item
        ids, the most recent last, of the user.
      column: its column; "" is the feature's own name.
      hashed: for a category or bag, whether values are hashed into `size` buckets; otherwise each
        of the `size` most frequent values in training requests gets a number.
      size: see `hashed`.
      length: number of values to keep: the first of a bag, the last of a history. For a dense
        feature, its width.
      standardize: for a dense feature, whether to subtract the mean of training requests and divide
        by their standard deviation.
      cheap: for a dense item feature, whether the early ranker can afford it; if not, only the
        final ranker reads it.
    """
    return ConfigDict(locals())  # each argument by its name


def features(of: str, kind: str, *names: str, **options: Any) -> dict[str, ConfigDict]:
    """Describe features that differ in nothing but their names; see `feature`."""
    return {name: feature(of, kind, **options) for name in names}
