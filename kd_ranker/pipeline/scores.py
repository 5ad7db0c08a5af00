"""The folder of a ranker's scores: Parquet files that their owner joins by two columns.

    request, item         ids, as they are in the log; numbers of the dataset if it has no log
    probability_<task>    float32, one column per task
    value                 float32, what the ranker sorts by
    version               the ranker's exact weights

It has one file per file of the log, or per split of the dataset. A request with rows in several
files is in the first of them. Until all are complete, they are in a hidden folder inside the
result's folder, and a run that was killed resumes at the first one that is missing. The name of
that folder contains a hash of all inputs that the numbers depend on.
"""

import contextlib
import itertools
import json
import operator
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.batch import Items
from kd_ranker.batches import cutting
from kd_ranker.errors import UserError
from kd_ranker.evaluation import funnel
from kd_ranker.pipeline.trained import TrainedRanker
from kd_ranker.progress import counted
from kd_ranker.requests import lock
from kd_ranker.requests.columns import Columns
from kd_ranker.training.workdir import read_json

FILE = "scores.json"
"""Next to complete scores: the ranker that scored, and the counts of the rows of a log."""


class Scored(NamedTuple):
    """The folder of the scores of a ranker, in Parquet files."""

    directory: Path

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of all files."""
        return tuple(pq.read_schema(next(self.directory.glob("*.parquet"))).names)

    def __str__(self) -> str:
        return f"scores: {self.directory}\ntheir columns: {', '.join(self.columns)}"


class Part(NamedTuple):
    """Requests whose scores go to the same file."""

    path: Path  # of the file
    request_ids: pa.Array
    columns: Columns
    numbers: Int[np.ndarray, "n"]  # the requests' places in the columns
    scored: Int[np.ndarray, "n"]  # how many candidates of each are scored, the first ones
    # Where the probabilities are stored for training, too: a column of a dataset, and their rows.
    column: Float32[np.ndarray, "rows T"] | None = None
    rows: Int[np.ndarray, "sum"] | None = None


class Scorer(NamedTuple):
    """A ranker, with items and sizes."""

    ranker: TrainedRanker
    config: ConfigDict
    items: Items
    candidates: int  # the most that a request has
    item_names: pa.Table | None  # `value` and `id`, ordered by id; None if ids have no names

    def write(
        self, work: Path, parts: Iterable[Part], counts: Mapping[str, Any] | None = None
    ) -> None:
        """Write the scores of each file (its parts follow each other) and a description."""
        counted_parts = counted(parts, "scoring", unit="part")
        for path, parts_of_file in itertools.groupby(counted_parts, operator.attrgetter("path")):
            tables = map(self.score, parts_of_file)
            first = next(tables)
            unfinished = path.with_name(f".{path.name}")
            with pq.ParquetWriter(unfinished, first.schema, compression="zstd") as writer:
                for table in itertools.chain([first], tables):
                    if len(table):
                        writer.write_table(table)
            unfinished.replace(path)
        description = {
            "ranker": self.ranker.title,
            "serve": self.ranker.serve,
            "counts": counts,
        }
        (work / FILE).write_text(json.dumps(description, indent=2))

    def score(self, part: Part) -> pa.Table:
        """Score the candidates of a part; return a row per candidate."""
        probability = np.concatenate([*self._probabilities(part)])
        if part.column is not None:
            part.column[part.rows] = probability
        # Of NumPy: JAX would compile a program for each number of candidates.
        weights = np.array(self.config.value_weights, np.float32)
        value: Any = funnel.value(probability, weights)  # type: ignore[arg-type]
        request_index = np.repeat(np.arange(len(part.numbers)), part.scored)
        columns = {
            "request": part.request_ids.take(pa.array(request_index)),
            "item": self._items_of(part),
        }
        for task, of_task in zip(self.ranker.dataset.spec.tasks, probability.T, strict=True):
            columns[f"probability_{task}"] = pa.array(of_task)
        columns["value"] = pa.array(value)
        columns["version"] = pa.repeat(self.ranker.version, len(probability))
        return pa.table(columns)

    def _probabilities(self, part: Part) -> Iterator[Float32[np.ndarray, "scored T"]]:
        """Yield those of the scored candidates, batch by batch; the first has no candidates."""
        ranker = self.ranker.ranker
        slots = np.arange(self.candidates)
        size = cutting.batch_size(self.config.evaluation.requests, len(part.numbers))
        yield np.zeros((0, len(self.ranker.dataset.spec.tasks)), np.float32)
        for start in range(0, len(part.numbers), size):
            requests = part.numbers[start : start + size]
            # A last batch of another size would need another compilation.
            filled = np.append(requests, np.repeat(requests[-1:], size - len(requests)))
            retrieved = part.columns.counts.retrieved[filled, None]
            places = np.where(slots < retrieved, slots, -1)
            batch = cutting.whole_batch(part.columns, filled, places)
            served = ranker.serve(ranker.parameters, batch, self.items)
            probability = np.asarray(served.probability[self.ranker.serve])[: len(requests)]
            yield probability[slots < part.scored[start : start + size, None]]

    def _items_of(self, part: Part) -> pa.Array:
        """The item of each scored candidate, as it is in the log."""
        ids = np.asarray(part.columns.candidates.fields(part.numbers, part.scored)["item_id"])
        if self.item_names is None:
            return pa.array(ids)
        places = np.searchsorted(self.item_names["id"].to_numpy(), ids)
        return self.item_names["value"].combine_chunks().take(pa.array(places))


def paths_like(files: Iterable[str], work: Path) -> list[Path]:
    """Return the file for the scores of each file of a log, or of each split."""
    return [work / f"{number:05d}-{Path(file).stem}.parquet" for number, file in enumerate(files)]


def scores_provenance(
    config: ConfigDict, ranker: TrainedRanker, inputs: Any
) -> manifest.Provenance:
    """Return the provenance of all that scores depend on; `inputs` are JSON."""
    releases = [metadata.version(package) for package in ("kd_ranker", "jax")]
    numbers = [list(config.value_weights), config.evaluation.requests]
    dataset = ranker.dataset.provenance["dataset"]
    of_ranker = [ranker.version, ranker.role, ranker.serve, *numbers]
    return {
        "dataset": dataset,
        "ranker": ranker.version,
        "scores": manifest.digest([dataset, of_ranker, inputs, releases]),
    }


@contextlib.contextmanager
def writing(
    output: Path, provenance: manifest.Provenance, replaces: bool = False
) -> Iterator[Path | None]:
    """Yield a hidden folder for the files of scores, which then move to `output`.

    It stays if the run is killed. None is yielded if the scores are finished. With `replaces`,
    other scores of the same dataset by the same ranker are replaced; all else is a UserError.
    """
    work = output / f".scoring-{provenance['scores']}"
    with lock.hold(output):
        finished = (output / manifest.FILE).exists()
        before = manifest.read(output, _remedy(output))["provenance"] if finished else {}
        if before == provenance:
            manifest.check(output, _remedy(output))
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed at its end
            yield None
            return
        if finished:
            is_ours = replaces and {**before, "scores": ""} == {**provenance, "scores": ""}
        else:
            is_ours = work.exists() or {path.name for path in output.iterdir()} <= lock.FILES
        if not is_ours:
            raise UserError(
                f"{output} holds something else than these scores by this ranker; remove it, or "
                "give another folder with --out"
            )
        work.mkdir(exist_ok=True)
        try:
            yield work
        except UserError:
            shutil.rmtree(work)
            raise
        (output / manifest.FILE).unlink(missing_ok=True)
        files = [path for path in work.iterdir() if path.name[0] != "."]
        # Tables first: a run that is killed here makes those that have moved again.
        for path in sorted(files, key=lambda path: path.suffix != ".parquet"):
            path.replace(output / path.name)
        manifest.write(output, provenance, [path.name for path in files])
        shutil.rmtree(work)


def counts_of(output: Path) -> dict[str, Any]:
    """Read the counts of the rows of a log that has scores in a folder."""
    return read_json(output / FILE, _remedy(output))["counts"]


def _remedy(output: Path) -> str:
    return f"remove the folder {output} and run this again"
