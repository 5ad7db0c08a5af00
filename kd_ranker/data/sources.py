"""The datasets that `config.data.name` can name.

To add one, write a module with `TASKS` and `open_source(data, tasks, funnel) -> Source`, and name
it in `SOURCES`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from kd_ranker.data import cascade, movielens
from kd_ranker.data.request import Source


class SourceEntry(NamedTuple):
    """One source.

    Attributes:
      tasks: the tasks that it has labels for.
      open_source: (config.data, tasks, config.funnel) -> the source.
      version: raised whenever the source's code yields other requests for the same config, so that
        datasets of the older code are not taken for its own.
    """

    tasks: Sequence[str]
    open_source: Callable[[ConfigDict, Sequence[str], ConfigDict], Source]
    version: int = 1


SOURCES: dict[str, SourceEntry] = {
    "cascade": SourceEntry(cascade.TASKS, cascade.open_source),
    "movielens_100k": SourceEntry(movielens.TASKS, movielens.open_source),
    "movielens_1m": SourceEntry(movielens.TASKS, movielens.open_source),
    "movielens_32m": SourceEntry(movielens.TASKS, movielens.open_source),
}
