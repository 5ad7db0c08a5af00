"""Files of ranking research as a log: TREC runs with qrels, and LETOR lines with scores.

    TREC run      query Q0 document rank score tag
    qrels         query 0 document grade
    LETOR line    grade qid:query 1:0.5 2:0.25 ... # docid = document
    scores        one number per LETOR line, of the final ranker

`docs/ranking_files.md` describes stages, labels and columns. Errors name the file and the line.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from absl import logging
from jaxtyping import Float, Float32
from ml_collections import ConfigDict
from scipy.stats import rankdata

from kd_ranker.batch import Stage
from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.converted import Converter, write_rows

SPLIT = "{split}"
"""In the name of a file: replaced by the word that `data.splits` has for a split."""

Run = dict[str, dict[str, float]]
"""Query -> document -> score, the best document first."""

Value = TypeVar("Value")

_RUN = "query Q0 document rank score tag"
_QRELS = "query 0 document grade"
_DOCUMENT = re.compile(r"docid\s*=\s*(\S+)")
_LARGEST = float(np.finfo(np.float32).max)
_TIME = 1_600_000_000  # seconds; queries have no time, and a log needs one
_RESAMPLES = 2000


class Agreement(NamedTuple):
    """The share of a run's first documents that another run has among its first.

    Attributes:
      mean: over queries, in [0, 1].
      low: the lower end of its 95% bootstrap interval over queries.
      high: the upper end.
      queries: their number.
    """

    mean: float
    low: float
    high: float
    queries: int


def agreement(first: Path | str, second: Path | str, k: int = 10, within: int = 0) -> Agreement:
    """Compare two runs, such as two runs of the same final ranker: `survival@within` of one.

    The share of the first run's first k documents in the second run's first `within`. It is the
    survival that an exact copy of the final ranker reaches. Only queries of both runs count; with
    n < k documents in a run, n takes the place of k.

    Args:
      first: the file of a run.
      second: the file of another one.
      k: the number of documents to find.
      within: the number of documents to search, at least k; 0 takes k.

    Raises:
      UserError: a file is missing or malformed, the runs share no query, or k or `within` is out
        of its range.
    """
    if k < 1 or 0 != within < k:
        raise UserError(f"k={k}, within={within}: k must be at least 1, and within 0 or at least k")
    one, other = read_run(Path(first)), read_run(Path(second))
    shares = []
    for query in sorted(one.keys() & other.keys()):
        depth = min(k, len(one[query]), len(other[query]))
        wanted = {*itertools.islice(one[query], depth)}
        found = {*itertools.islice(other[query], max(within, depth))}
        shares.append(len(wanted & found) / depth)
    if not shares:
        raise UserError(f"{first} and {second} share no query")
    draws = np.random.default_rng(0).choice(shares, (_RESAMPLES, len(shares))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Agreement(float(np.mean(shares)), float(low), float(high), len(shares))


def read_run(path: Path) -> Run:
    """Read a TREC run; the order of documents is that of scores, and of ranks if these are equal.

    Raises:
      UserError: a line has another number of columns, a rank or score is not a number, or a
        document occurs twice.
    """
    places = _by_query(
        path, _RUN, lambda where, rank, score, _: (-_number(where, score), _number(where, rank))
    )
    return {
        query: {document: -place[0] for document, place in sorted(of.items(), key=itemgetter(1))}
        for query, of in places.items()
    }


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Read qrels: query -> document -> grade.

    Raises:
      UserError: as of `read_run`, or a grade is not a whole number.
    """
    return _by_query(path, _QRELS, _grade)


def _by_query(path: Path, layout: str, value: Callable[..., Value]) -> dict[str, dict[str, Value]]:
    """Query -> document -> `value` of the line's place and of the columns after the document."""
    found: dict[str, dict[str, Value]] = {}
    for where, line in _lines(path):
        columns, number = line.split(), len(layout.split())
        if len(columns) != number:
            raise UserError(f"{where}: {len(columns)} columns; expected {number}: {layout}")
        query, _, document, *rest = columns
        of_query = found.setdefault(query, {})
        if document in of_query:
            raise UserError(f"{where}: query {query} has document {document} already")
        of_query[document] = value(where, *rest)
    return found


class Document(NamedTuple):
    """A LETOR line.

    Attributes:
      where: its file and line number, for messages.
      query: the text after `qid:`.
      name: the text after `docid =`; "" without one.
      grade: of its relevance.
      features: its numbers.
    """

    where: str
    query: str
    name: str
    grade: int
    features: Float32[np.ndarray, "features"]


def read_letor(path: Path, num_features: int, sparse: bool = False) -> Iterator[Document]:
    """Read LETOR lines in the order of the file.

    Args:
      path: of the file.
      num_features: of each line; indices start at 1.
      sparse: True if a line may omit features that are 0.

    Raises:
      UserError: a line has other features, or a part of it is not a number.
    """
    for where, line in _lines(path):
        body, _, comment = line.partition("#")
        grade, query, pairs = (*body.split(maxsplit=2), "", "", "")[:3]
        prefix, _, query = query.partition(":")
        if prefix != "qid" or not query:
            raise UserError(f"{where}: expected: grade qid:query 1:number 2:number ...")
        name = _DOCUMENT.search(comment)
        yield Document(
            where,
            query,
            name[1] if name else "",
            _grade(where, grade),
            _features(where, pairs, num_features, sparse),
        )


def _features(where: str, pairs: str, number: int, sparse: bool) -> Float32[np.ndarray, "features"]:
    """The numbers of index:number pairs; those omitted are 0."""
    try:
        given = [pair.split(":") for pair in pairs.split()]
        index = [int(place) for place, _ in given]
        value = np.array([value for _, value in given], float)
    except ValueError as error:
        raise UserError(f"{where}: a feature is not index:number ({error})") from error
    every = range(1, number + 1)
    known = {*index} if sparse else every
    if index != [of for of in every if of in known]:
        raise UserError(
            f"{where}: {len(index)} features, the largest index is {max(index, default=0)}; "
            f"data.num_features={number} expects {'some of ' * sparse}1 to {number} in order"
        )
    if not (np.abs(value) <= _LARGEST).all():
        raise UserError(f"{where}: a feature is not a finite number of 32 bits")
    features = np.zeros(number, np.float32)
    features[np.array(index, int) - 1] = value
    return features


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not blank, each after its place.

    Raises:
      UserError: the file is missing, empty, or not text in UTF-8.
    """
    empty = True
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    empty = False
                    yield f"{path}, line {number}", line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as plain text in UTF-8: {error}") from error
    if empty:
        raise UserError(f"{path} is empty")


def _number(where: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = np.nan
    if not abs(number) <= _LARGEST:
        raise UserError(f"{where}: {text!r} is not a finite number of 32 bits")
    return number


def _grade(where: str, text: str) -> int:
    number = _number(where, text)
    if number % 1:
        raise UserError(f"{where}: grade {text} is not a whole number")
    return int(number)


def _splits_of(data: ConfigDict, *names: str) -> list[str]:
    """The splits of files with these names; one "" if no name has `SPLIT`."""
    return [*SPLITS] if any(SPLIT in name for name in names) else [""]


def _path(data: ConfigDict, name: str, split: str) -> Path:
    return Path(data.path) / name.replace(SPLIT, data.splits[split] if split else "")


def _existing(data: ConfigDict, *names: str) -> list[Path]:
    """The files with these names, of all splits.

    Raises:
      UserError: one of them does not exist, or a key is missing or contradicts the names.
    """
    if not data.path:
        raise UserError("data.path is empty; set it to the folder of the ranking files")
    if {*data.splits} != {*SPLITS}:
        raise UserError(f"data.splits names {', '.join(data.splits)}; it needs {', '.join(SPLITS)}")
    splits = _splits_of(data, *names)
    if splits != [""] and data.split != "column":
        raise UserError(f"data.split={data.split!r}, but a name has {SPLIT}; set data.split=column")
    paths = dict.fromkeys(_path(data, name, split) for name in names for split in splits)
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} does not exist; see data.path and data.splits")
    return [*paths]


def _check_alike(*names: str) -> None:
    """Raise UserError if some of the names have `SPLIT` and others do not."""
    if len({SPLIT in name for name in names}) > 1:
        raise UserError(f"{', '.join(names)}: put {SPLIT} in all of these names, or in none")


def _numbered(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Give the rows of queries a time; a query belongs to one split, and one place of a file.

    Args:
      rows: each after the place of its query in a file.
    """
    seen: dict[str, str] = {}
    for number, (where, row) in enumerate(rows, start=1):
        query, split = row["request"], row["split"]
        place = f"{where}, split {split}" if split else where
        if query in seen:
            raise UserError(f"{place}: query {query} was there before, at {seen[query]}")
        seen[query] = place
        yield row | {"time": _TIME + number}


def _labels(data: ConfigDict, grade: Float[np.ndarray, "n"]) -> dict[str, np.ndarray]:
    """The grades, and a label for each of `data.grades`: NaN where the grade is."""
    labels = {least: np.where(np.isnan(grade), np.nan, grade >= least) for least in data.grades}
    columns = {"grade": grade, **{f"grade_{least}": label for least, label in labels.items()}}
    return {name: column.astype(np.float32) for name, column in columns.items()}


def _names(query: str, documents: Sequence[Document]) -> pa.Array:
    """The names of a query's documents; raises UserError for one that occurs twice."""
    names: dict[str, None] = {}
    for place, document in enumerate(documents):
        name = document.name or f"{query}-{place}"
        if name in names:
            raise UserError(f"{document.where}: query {query} has document {name} already")
        names[name] = None
    return pa.array([*names])


def _letor_rows(data: ConfigDict) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row per query of LETOR files; all of its documents count as shown."""
    for split in _splits_of(data, data.documents, data.scores):
        scored = _scored(data, split)
        for query, group in itertools.groupby(scored, lambda pair: pair[0].query):
            documents, scores = zip(*group, strict=True)
            row = {"request": query, "split": split, "item": _names(query, documents)}
            row["stage"] = np.full(len(documents), Stage.SHOWN, np.int8)
            row |= _labels(data, np.array([of.grade for of in documents], float))
            row["features"] = np.stack([of.features for of in documents])
            if data.scores:
                row["final_score"] = np.array(scores, np.float32)
                row["final_rank"] = rankdata(-np.array(scores, float), "ordinal")
            yield documents[0].where, row


def _scored(data: ConfigDict, split: str) -> Iterator[tuple[Document, float]]:
    """The lines of a LETOR file with their scores; NaN if `data.scores` is ""."""
    path = _path(data, data.documents, split)
    documents = read_letor(path, int(data.num_features), bool(data.sparse))
    if not data.scores:
        yield from ((document, np.nan) for document in documents)
        return
    scores = _path(data, data.scores, split)
    for document, line in itertools.zip_longest(documents, _lines(scores)):
        if line is None:
            raise UserError(f"{document.where}: no score; {scores} has fewer lines")
        if document is None:
            raise UserError(f"{line[0]}: no document; {path} has fewer lines")
        yield document, _number(line[0], line[1].strip())


def _trec_rows(data: ConfigDict) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row per query that has a graded document in a run, with the documents of all runs."""
    known: set[str] = set()
    in_runs: set[str] = set()
    for split in _splits_of(data, data.qrels, *data.runs.values()):
        path = _path(data, data.qrels, split)
        qrels = read_qrels(path)
        runs = {}
        for name, of_split in data.runs.items():
            file = _path(data, of_split, split)
            run = runs[name] = read_run(file)
            if not run.keys() & qrels.keys():
                raise UserError(
                    f"{file}: query {next(iter(run))} is not in {path}, and neither is any other "
                    "query of this run"
                )
            in_runs |= run.keys()
        for query, grades in qrels.items():
            lists = {name: run.get(query, {}) for name, run in runs.items()}
            names = [*dict.fromkeys(itertools.chain.from_iterable(lists.values()))]
            if grades.keys() & names:
                known.add(query)
                row = {"request": query, "split": split, "item": pa.array(names)}
                yield str(path), row | _of_lists(data, lists, names, grades)
    if left_out := len(in_runs - known):
        logging.warning("left out %d queries of the runs without graded documents", left_out)


def _of_lists(
    data: ConfigDict, lists: dict[str, dict[str, float]], names: list[str], grades: dict[str, int]
) -> dict[str, Any]:
    """The columns of a query's documents: the stage, labels, and each run's scores and ranks."""
    grade = np.array([grades.get(name, np.nan) for name in names], float)
    final = lists[data.final] if data.final else {}
    passed = np.array([name in final for name in names])
    stage = np.where(passed, Stage.PASSED, Stage.RETRIEVED)
    columns = {"stage": np.where(np.isnan(grade), stage, Stage.SHOWN).astype(np.int8)}
    columns |= _labels(data, grade)
    for run, scores in lists.items():
        place = {name: rank for rank, name in enumerate(scores, start=1)}
        for column, of in (("score", scores), ("rank", place)):
            values = [of.get(name, np.nan) for name in names]
            columns[f"{run}_{column}"] = np.array(values, np.float32)
    return columns


def _find_letor(data: ConfigDict) -> list[Path]:
    names = [data.documents, *([data.scores] if data.scores else [])]
    _check_alike(*names)
    return _existing(data, *names)


def _find_trec(data: ConfigDict) -> list[Path]:
    if data.final and data.final not in data.runs:
        raise UserError(
            f"data.final={data.final!r} is not one of data.runs: {', '.join(data.runs)}"
        )
    if SPLIT not in data.qrels:
        _check_alike(*data.runs.values())
    return _existing(data, data.qrels, *data.runs.values())


def _write_letor(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    write_rows(folder / "log.parquet", _numbered(_letor_rows(data)))


def _write_trec(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    write_rows(folder / "log.parquet", _numbered(_trec_rows(data)))


LETOR = Converter(
    ("documents", "scores", "splits", "grades", "num_features", "sparse"),
    _find_letor,
    _write_letor,
    version=2,
)
TREC = Converter(("qrels", "runs", "final", "splits", "grades"), _find_trec, _write_trec, version=2)
