"""The datasets that `config.data.name` can name.

To add one, write a module with `TASKS` and `open_source(data, tasks, funnel) -> Source`, and name
it in `SOURCES`. A public dataset needs only a `Converter` of its files to a log.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from kd_ranker.requests.source import Source
from kd_ranker.sources import (
    cascade,
    filmsearch,
    in_memory,
    kuairand,
    movielens,
    ranking_files,
    recflow,
)
from kd_ranker.sources.logs import source as parquet


class SourceEntry(NamedTuple):
    """One source: its labels, how to open it, and how to know its datasets again.

    Attributes:
      tasks: the tasks that it has labels for; None for those of `config.data.labels`.
      open_source: (config.data, tasks, config.funnel) -> the source. That of `parquet` also takes
        the dataset that `data.extends` names.
      version: raised whenever the code yields other requests for the same config.
      check_unchanged: (config.data, a dataset's folder) -> None, or UserError where the raw files
        have changed since that was made; the default does not look.
      simulated: there are no raw files, so that opening it takes no time.
    """

    tasks: Sequence[str] | None
    open_source: Callable[..., Source]
    version: int = 1
    check_unchanged: Callable[[ConfigDict, Path], None] = lambda data, directory: None
    simulated: bool = False

    def tasks_of(self, data: ConfigDict) -> Sequence[str]:
        """Return the tasks that have labels."""
        return tuple(data.labels) if self.tasks is None else self.tasks


_CONVERTERS = {
    **{f"movielens_{size}": movielens.CONVERTER for size in movielens.SIZES},
    **{f"kuairand_{variant}": kuairand.CONVERTER for variant in kuairand.VARIANTS},
    "recflow": recflow.CONVERTER,
    "filmsearch": filmsearch.CONVERTER,
    "letor": ranking_files.LETOR,
    "trec": ranking_files.TREC,
}

SOURCES: dict[str, SourceEntry] = {
    "cascade": SourceEntry(cascade.TASKS, cascade.open_source, simulated=True),
    "parquet": SourceEntry(
        None, parquet.open_source, version=2, check_unchanged=parquet.check_unchanged
    ),
    in_memory.NAME: SourceEntry(None, in_memory.open_source),
    **{
        name: SourceEntry(
            None, converter.open_source, version=2, check_unchanged=converter.check_unchanged
        )
        for name, converter in _CONVERTERS.items()
    },
}
