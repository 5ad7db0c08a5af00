"""Score requests with a trained ranker: those of a dataset, or of a log that training never read.

The result is a table that its owner joins to the log or dataset by two columns:

    request, item         ids, as they are in the log; numbers of the dataset if it has no log
    probability_<task>    float32, one column per task
    value                 float32, what the ranker sorts by
    version               the ranker's exact weights

It is a folder of Parquet files: one per file of the log, or per split of the dataset. A request
with rows in several files is in the first of them. Scoring resumes where it stopped: finished parts
are kept in a hidden folder inside the result's folder. Its name contains a hash of all inputs that
the numbers depend on.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from kd_ranker import manifest
from kd_ranker.batch import CandidateBatch, Items
from kd_ranker.batches import cutting
from kd_ranker.errors import UserError
from kd_ranker.evaluation import funnel
from kd_ranker.evaluation.evaluate import Ranker
from kd_ranker.requests import lock
from kd_ranker.requests.columns import Columns
from kd_ranker.requests.pool import Runner
from kd_ranker.requests.records import Dataset
from kd_ranker.training.workdir import read_json, write_atomically

FILE = "scores.json"
"""Next to complete scores: the ranker that scored, and the counts of the rows of a log."""

_WORK, _PARTS = ".scoring-", "parts"


class TrainedRanker(NamedTuple):
    """A ranker that a run has trained.

    Attributes:
      name: its name in the run, for people.
      role: `teacher` or `student`.
      ranker: the ranker as the evaluation calls it.
      serve: the name of the probabilities that it ranks by.
      version: a name for its exact weights.
      dataset: the dataset that defines its ids, means and deviations.
    """

    name: str
    role: str
    ranker: Ranker
    serve: str
    version: str
    dataset: Dataset


class Part(NamedTuple):
    """Some requests, which are scored in one call.

    Attributes:
      columns: holds the requests.
      numbers: which of its requests they are.
      scored: the number of leading candidates of each request with scores to write.
      request: the ids of the requests.
      file: the number of the file to which each request belongs.
      item_names: the `value` and the `id` of each item, by id; None if ids have no other names.
      items: the features and categories of the items.
    """

    columns: Columns
    numbers: Int[np.ndarray, "n"]
    scored: Int[np.ndarray, "n"]
    request: pa.Array
    file: Int[np.ndarray, "n"]
    item_names: pa.Table | None
    items: Items


class Requests(NamedTuple):
    """Requests to score.

    Attributes:
      parts: the arguments of `read` for each part.
      read: (ranker, *arguments) -> `Part`; can be pickled.
      files: the names of the files to write.
      candidates: the largest number of candidates of a request.
      counts: what to record in `scores.json`.
    """

    parts: Sequence[tuple]
    read: Callable[..., Part]
    files: Sequence[str]
    candidates: int
    counts: Any = None


class How(NamedTuple):
    """The way in which requests are scored.

    Attributes:
      value_weights: one weight per task.
      requests: the number of requests that are scored at a time.
      runner: yields the runner for parts.
      reopen: opens the ranker in another process, can be pickled; None if `runner` runs here.
    """

    value_weights: Sequence[float]
    requests: int
    runner: AbstractContextManager[Runner]
    reopen: Callable[[], TrainedRanker] | None = None


def score(
    ranker: TrainedRanker,
    open_requests: Callable[[Path], Requests],
    how: How,
    output: Path,
    inputs: Any,
    finish: Callable[[Sequence[Path]], None] = lambda parts: None,
    replaces: bool = False,
) -> Any:
    """Write the scores of requests, see the top of this file.

    Args:
      ranker: the ranker.
      open_requests: called with a folder that is kept until the scores are complete.
      how: the way.
      output: the folder to write to.
      inputs: all that the requests depend on, as JSON.
      finish: called with the file of each part, before the manifest is written.
      replaces: whether other scores of the same dataset by the same ranker are replaced.

    Returns:
      `Requests.counts`, as JSON.

    Raises:
      UserError: the folder contains something else, or another process writes to it.
    """
    made_of = made_of_scores(ranker, how, inputs)
    work = output / f"{_WORK}{made_of['scores']}"
    with lock.hold(output):
        if not _is_finished(output, work, made_of, replaces):
            try:
                requests = open_requests(work)
            except UserError:
                shutil.rmtree(work, ignore_errors=True)
                raise
            parts = _score_parts(ranker, requests, how, work / _PARTS)
            _write_files(parts, requests.files, output)
            finish(parts)
            description = {
                "ranker": ranker.name,
                "serve": ranker.serve,
                "version": ranker.version,
                "columns": columns_of(ranker),
                "counts": requests.counts,
            }
            write_atomically(output / FILE, json.dumps(description, indent=2))
            names = (path.name for path in output.iterdir() if path.name[0] != ".")
            manifest.write(output, made_of, names)
            shutil.rmtree(work)
        return read_json(output / FILE, _remedy(output))["counts"]


def columns_of(ranker: TrainedRanker) -> list[str]:
    """Return the names of the columns of scores."""
    tasks = ranker.dataset.spec.tasks
    return ["request", "item", *(f"probability_{task}" for task in tasks), "value", "version"]


def made_of_scores(ranker: TrainedRanker, how: How, inputs: Any) -> manifest.MadeOf:
    """Return the fingerprints of all that scores depend on."""
    releases = [metadata.version(package) for package in ("kd_ranker", "jax")]
    of_ranker = [ranker.version, ranker.role, ranker.serve, list(how.value_weights), how.requests]
    dataset = ranker.dataset.identity["dataset"]
    return {
        "dataset": dataset,
        "ranker": ranker.version,
        "scores": manifest.digest([dataset, of_ranker, inputs, releases]),
    }


def _remedy(output: Path) -> str:
    return f"remove the folder {output} and run this again"


def _is_finished(output: Path, work: Path, made_of: manifest.MadeOf, replaces: bool) -> bool:
    """Test if a folder contains the result; raise UserError if it has other contents."""
    finished = (output / manifest.FILE).exists()
    if finished:
        found = manifest.read(output, _remedy(output))["made_of"]
        if found == made_of:
            manifest.check(output, _remedy(output))
            shutil.rmtree(work, ignore_errors=True)  # the leftovers of a run that was killed
            return True
        if replaces and {**found, "scores": ""} == {**made_of, "scores": ""}:
            (output / manifest.FILE).unlink()
            return False
    if finished or not (work.exists() or {path.name for path in output.iterdir()} <= lock.FILES):
        raise UserError(
            f"{output} holds something else than these scores by this ranker; remove it, or give "
            "another folder with --out"
        )
    return False


def _score_parts(
    ranker: TrainedRanker, requests: Requests, how: How, folder: Path
) -> Sequence[Path]:
    """Score all parts that an earlier run has not finished; return the file of each part."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:06d}.parquet" for number in range(len(requests.parts))]
    # Other processes open the ranker themselves, since its parameters are on devices.
    opened = how.reopen or (lambda: ranker)
    call = functools.partial(
        _score_part, opened, ranker.version, requests.read, how[:2], requests.candidates
    )
    missing = [
        (path, arguments)
        for path, arguments in zip(paths, requests.parts, strict=True)
        if not path.exists()
    ]
    with how.runner as run:
        for _ in run(call, missing, "scoring"):
            pass
    return paths


def _score_part(
    open_ranker: Callable[[], TrainedRanker],
    version: str,
    read: Callable[..., Part],
    weights_and_requests: tuple[Sequence[float], int],
    candidates: int,
    path: Path,
    arguments: tuple,
) -> None:
    """Write the scores of a part to a file that is complete or absent."""
    ranker = open_ranker()
    if ranker.version != version:
        raise UserError(f"{ranker.name} has changed while it scored; run this again")
    part, (weights, size) = read(ranker, *arguments), weights_and_requests
    batches = probabilities(ranker, part.columns, part.numbers, part.items, size, candidates)
    is_scored = np.arange(candidates) < part.scored[:, None]
    starts = range(0, len(part.numbers), size)
    probability = np.concatenate(
        [of[is_scored[at : at + size]] for at, of in zip(starts, batches, strict=True)]
    )
    value = funnel.value(jnp.asarray(probability), jnp.asarray(weights))
    owner = np.repeat(np.arange(len(part.numbers)), part.scored)
    scores = [*probability.T, np.asarray(value)]
    arrays = [part.request.take(pa.array(owner)), _items_of(part), *map(pa.array, scores)]
    columns = dict(zip(columns_of(ranker), [*arrays, pa.repeat(version, len(owner))], strict=True))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.table({"file": pa.array(part.file[owner]), **columns}), temporary)
    temporary.replace(path)


def _items_of(part: Part) -> pa.Array:
    """Return the item of each scored candidate."""
    candidates = part.columns.candidates.fields(part.numbers, part.scored)
    ids = np.asarray(candidates["item_id"])
    if part.item_names is None:
        return pa.array(ids)
    values = part.item_names["value"].combine_chunks()
    return values.take(pa.array(np.searchsorted(part.item_names["id"].to_numpy(), ids)))


def probabilities(
    ranker: TrainedRanker,
    columns: Columns,
    numbers: Int[np.ndarray, "n"],
    items: Items,
    requests: int,
    candidates: int,
) -> Iterator[Float[np.ndarray, "R N T"]]:
    """Yield the probabilities of the candidates of requests, `requests` of them at a time.

    Args:
      ranker: the ranker.
      columns: holds the requests.
      numbers: which of its requests.
      items: the features and categories of the items.
      requests: the number of requests in a batch; the last one yields fewer.
      candidates: N, to which candidates are padded; entries of padding have no meaning.
    """
    items = jax.device_put(items)
    index = np.arange(candidates)
    for start in range(0, len(numbers), requests):
        chunk = numbers[start : start + requests]
        # A last chunk of another size would need another compilation.
        filled = np.append(chunk, np.repeat(chunk[-1:], requests - len(chunk)))
        places = np.where(index < columns.kept[filled, None], index, -1)
        batch = CandidateBatch(**cutting.all_fields(columns, filled, places))
        served = ranker.ranker.serve(ranker.ranker.parameters, batch, items)
        yield np.asarray(served.probability[ranker.serve])[: len(chunk)]


def _write_files(parts: Sequence[Path], files: Sequence[str], output: Path) -> None:
    """Write the scores of each file of a log, or of each split, from those of all parts."""
    scores = ds.dataset([str(path) for path in parts])
    names = [name for name in scores.schema.names if name != "file"]
    for number, name in enumerate(files):
        own = scores.scanner(columns=names, filter=ds.field("file") == number)
        temporary = output / f".{name}"
        with pq.ParquetWriter(temporary, own.projected_schema, compression="zstd") as writer:
            for batch in own.to_batches():
                if batch.num_rows:
                    writer.write_batch(batch)
        temporary.replace(output / name)
