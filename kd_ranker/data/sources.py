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
    """The tasks that a source has labels for, and how to open it."""

    tasks: Sequence[str]
    open_source: Callable[[ConfigDict, Sequence[str], ConfigDict], Source]


SOURCES: dict[str, SourceEntry] = {
    "cascade": SourceEntry(cascade.TASKS, cascade.open_source),
    "movielens_100k": SourceEntry(movielens.TASKS, movielens.open_source),
}
