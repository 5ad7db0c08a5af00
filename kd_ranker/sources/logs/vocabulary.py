"""Writes the id that each user, item and value of the log got."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kd_ranker.batch import FeatureSpec
from kd_ranker.errors import UserError
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.numbered import Numbered

VOCABULARIES_FOLDER = "vocabularies"


def write_vocabularies(engine: Engine, numbered: Numbered, spec: FeatureSpec, folder: Path) -> None:
    """Writes `user.parquet`, `item.parquet` and `feature-<name>.parquet`.

    Each has the columns `value`, as in the log, and `id`: in [0, num_users) and [0, num_items);
    that of a feature is its category id. Hashed features have no file, nor is there an entry for
    the values that share a feature's first category id: rare, unheard-of and missing ones.
    """
    folder.mkdir()
    names = (category.name for category in spec.categories)
    starts = dict(zip(names, spec.category_starts, strict=True))
    tables = {"user": (numbered.users, 0), "item": (numbered.items, 0)}
    tables |= {f"feature:{name}": (of, starts[name]) for name, of in numbered.values.items()}
    for name, (table, start) in tables.items():
        known = table.filter(table.id.notnull()).order_by("id")
        ids = (known.id + start).cast("int32")
        pq.write_table(engine.fetch(known.select("value", id=ids)), _path(folder, name))


def read_vocabulary(directory: Path, name: str) -> pa.Table:
    """The `value` and `id` of `user`, `item` or `feature:<name>`, by id, beside a dataset.

    Raises:
      UserError: it is gone.
    """
    path = _path(directory / VOCABULARIES_FOLDER, name)
    if not path.exists():
        raise UserError(
            f"{path}, which says what was given which id, is gone; put it back, or remove "
            f"{directory} and make it anew with: python -m experiments.prepare_data"
        )
    # Not by way of a path alone, which pyarrow takes for a dataset.
    with pq.ParquetFile(path) as parquet:
        return parquet.read()


def _path(folder: Path, name: str) -> Path:
    file = "".join(c if f"a{c}".isidentifier() or c in ".-" else "-" for c in name)
    return folder / f"{file}.parquet"
