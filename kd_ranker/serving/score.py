"""Probabilities and values of a trained ranker, and a log that is written with them.

Scoring a log resumes where it stopped. Finished work is kept in a hidden folder inside the result's
folder: first the log as requests, then the scores piece by piece, then whole files of the log. The
name of the hidden folder contains a hash of all inputs that the numbers depend on.
"""

import contextlib
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32

from kd_ranker import manifest
from kd_ranker.batch import CandidateBatch, FeatureSpec, Items, Request
from kd_ranker.batches import cutting
from kd_ranker.errors import UserError
from kd_ranker.evaluation import funnel
from kd_ranker.evaluation.evaluate import Ranker
from kd_ranker.requests import lock
from kd_ranker.requests.columns import columns_of
from kd_ranker.requests.pool import Runner
from kd_ranker.requests.records import Dataset
from kd_ranker.sources.logs import unseen, write_back
from kd_ranker.sources.logs.encode import encode_requests
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.ordered import Piece, read_piece
from kd_ranker.sources.logs.unseen import Settled, Unseen
from kd_ranker.sources.logs.write_back import Scored
from kd_ranker.training.workdir import read_json, write_atomically

FILE = "scores.json"
"""Next to a complete scored log: the ranker that scored it, and the counts of its rows."""

_WORK, _READ, _SCORES = ".scoring-", "read", "scores"
_REMOVE = "remove that folder, and run this again"


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


def probabilities(
    ranker: Ranker,
    serve: str,
    requests: Iterable[Request],
    items: Items,
    spec: FeatureSpec,
    size: int,
    candidates: int,
) -> Iterator[tuple[Request, Float32[np.ndarray, "N T"]]]:
    """Yield requests with the probabilities of all their candidates, in the candidates' order.

    Args:
      ranker: the ranker.
      serve: the name of the probabilities to return.
      requests: the requests.
      items: the features and categories of the items.
      spec: the sizes of their features.
      size: the number of requests that are scored at a time.
      candidates: the largest number of candidates of a request.
    """
    requests = iter(requests)
    while chunk := [*itertools.islice(requests, size)]:
        # A last chunk of another size would need another compilation.
        filled = chunk + [chunk[-1]] * (size - len(chunk))
        batch = CandidateBatch(**cutting.full_fields(columns_of(filled, spec), candidates))
        served = ranker.serve(ranker.parameters, batch, items)
        of_each = np.asarray(served.probability[serve])
        for request, probability in zip(chunk, of_each, strict=False):
            yield request, probability[: len(request.item_id)]


def score_log(
    log: Log,
    layout: LogLayout,
    settled: Settled,
    trained: TrainedRanker,
    again: Callable[[], TrainedRanker] | None,
    runner: contextlib.AbstractContextManager[Runner],
    value_weights: Sequence[float],
    requests: int,
    output: Path | None,
) -> tuple[Scored, Unseen]:
    """Write a log with the probabilities and the value of a ranker for each candidate.

    Args:
      log: the log, from `open_unseen`.
      layout: the columns to read, from `open_unseen`.
      settled: the vocabularies and transforms of the ranker's dataset.
      trained: the ranker.
      again: opens the same ranker in another process, can be pickled; None if `runner` runs in
        this process.
      runner: a context manager that yields the runner for scoring.
      value_weights: one weight per task.
      requests: the number of requests that are scored at a time.
      output: the folder to write to; None takes one below `data.dir`, named after all of these.

    Returns:
      The scored log, and the counts and pieces of the log that was read.

    Raises:
      UserError: the log is unreadable or has no usable row, or the output folder is inside the
        log, contains something else or is locked by another process.
    """
    dataset, tasks = trained.dataset, trained.dataset.spec.tasks
    digest = _digest(log, layout, trained, value_weights, requests)
    output = _checked_output(output or _usual_output(layout, trained, digest), layout)
    says = (*(f"probability_{task}" for task in tasks), "value", "version")
    columns = write_back.added_columns(log, tuple(f"{trained.role}_{of}" for of in says))
    scored, paths = Scored(output, columns), write_back.output_paths(log, output)
    work = output / f"{_WORK}{digest}"
    with lock.hold(output):
        if _is_finished(output, work, digest):
            return scored, Unseen(*read_json(output / FILE, _REMOVE)["read"])
        with runner as run:
            read = _read(log, layout, settled, dataset.items, work)
            score = functools.partial(
                _scorer(trained, again), layout, value_weights, requests, read.largest, work
            )
            pieces = [(piece,) for piece in read.pieces if not _path(work, piece).exists()]
            for _ in run(score, pieces, "scoring"):
                pass
            write_back.write_files(
                log, layout, columns, trained.version, work / _SCORES, work, paths, run
            )
        description = {
            "ranker": trained.name,
            "serve": trained.serve,
            "version": trained.version,
            "columns": columns,
            "log": log.manifest,
            "read": read._replace(pieces=[]),
        }
        write_atomically(output / FILE, json.dumps(description, indent=2))
        written = (path.relative_to(output).as_posix() for path in paths)
        manifest.write(output, {"scores": digest}, [FILE, *written])
        shutil.rmtree(work)
    return scored, read


def _usual_output(layout: LogLayout, trained: TrainedRanker, digest: str) -> Path:
    dataset = trained.dataset.directory.parent.name
    name = f"{dataset}-{trained.role}-{trained.version}-{digest}"
    return Path(layout.directory) / write_back.SCORED_FOLDER / name


def _checked_output(output: Path, layout: LogLayout) -> Path:
    """Return the folder to write to; raise UserError if it is inside the log."""
    if output.resolve().is_relative_to(Path(layout.path).resolve()):
        raise UserError(
            f"{output} is inside the log and would become a part of it; give another --out"
        )
    return output


def _digest(
    log: Log,
    layout: LogLayout,
    trained: TrainedRanker,
    value_weights: Sequence[float],
    requests: int,
) -> str:
    """Return a hash of all inputs that the numbers depend on; see `score_log`."""
    made_of = [
        *(trained.version, trained.role, trained.serve, trained.dataset.identity["dataset"]),
        *(value_weights, requests, log.manifest, repr(layout.features), layout.columns),
        *(layout.by_request, layout.units_per_second, layout.retrieved),
        [metadata.version(package) for package in ("kd_ranker", "jax")],
    ]
    return manifest.digest(made_of)


def _is_finished(output: Path, work: Path, digest: str) -> bool:
    """Return True if a folder contains the result; raise UserError if it has other contents."""
    finished = (output / manifest.FILE).exists()
    if finished and manifest.check(output, _REMOVE) == {"scores": digest}:
        shutil.rmtree(work, ignore_errors=True)  # the leftovers of a run that was killed
        return True
    if finished or not (work.exists() or {path.name for path in output.iterdir()} <= lock.FILES):
        raise UserError(
            f"{output} holds something else than the scores of this log by this ranker; give "
            "another folder with --out"
        )
    return False


def _read(log: Log, layout: LogLayout, settled: Settled, items: Items, work: Path) -> Unseen:
    """Return the log as requests, and read them first if necessary."""
    folder, unfinished = work / _READ, work / f"{_READ}-unfinished"
    if not folder.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            unseen.read_unseen(log, layout, settled, items, unfinished)
        except UserError:
            shutil.rmtree(work)
            raise
        unfinished.rename(folder)
        (work / _SCORES).mkdir()
    return unseen.load_unseen(folder)


def _scorer(
    trained: TrainedRanker, again: Callable[[], TrainedRanker] | None
) -> Callable[..., None]:
    """Return `_score_piece` with a ranker, for this process or for others that reopen it."""
    if again:
        return functools.partial(_score_elsewhere, again, trained.version)
    return functools.partial(_score_piece, trained)


def _score_piece(
    trained: TrainedRanker,
    layout: LogLayout,
    value_weights: Sequence[float],
    size: int,
    largest: int,
    work: Path,
    piece: Piece,
) -> None:
    """Write the scores of a piece of a log with the places of its candidates, for `write_files`.

    See `score_log`; `largest` is the largest number of candidates of a request.
    """
    folder, spec = work / _READ, trained.dataset.spec
    blocks = encode_requests(layout, folder, piece)
    requests = itertools.chain.from_iterable(block.requests() for block in blocks)
    scored = probabilities(
        trained.ranker, trained.serve, requests, _items(folder), spec, size, largest
    )
    probability = np.concatenate([of_request for _, of_request in scored])
    value = funnel.value(jnp.asarray(probability), jnp.asarray(value_weights))
    _, candidates = read_piece(folder, piece, write_back.PLACE)
    scores = [*probability.T, np.asarray(value)]
    columns = {name: candidates[name] for name in write_back.PLACE}
    columns |= {f"score {number}": pa.array(of) for number, of in enumerate(scores)}
    path = _path(work, piece)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)


def _score_elsewhere(again: Callable[[], TrainedRanker], version: str, *arguments: Any) -> None:
    """Run `_score_piece` in a process that must first reopen the ranker."""
    trained = again()
    if trained.version != version:
        raise UserError(f"{trained.name} has changed while it scored; run this again")
    _score_piece(trained, *arguments)


@functools.lru_cache(maxsize=1)
def _items(folder: Path) -> Items:
    return jax.device_put(unseen.load_items(folder))


def _path(work: Path, piece: Piece) -> Path:
    return work / _SCORES / f"{piece.batch:06d}.parquet"
