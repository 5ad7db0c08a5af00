"""Files of ranking research as a log: TREC runs with qrels, and LETOR lines with scores.

    TREC run      query Q0 document rank score tag
    qrels         query 0 document grade
    LETOR line    grade qid:query 1:0.5 2:0.25 ... # docid = document
    scores        one number per LETOR line, of the final ranker

`docs/datasets.md` describes stages, labels and columns. Errors name the file and the line.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.converted import Converter, connect, find_raw
from kd_ranker.sources.logs.files import line_of
from kd_ranker.sources.logs.sql import literal

SPLIT = "{split}"
"""In the name of a file: replaced by the word that `data.splits` has for a split."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_GRADE = r"(?P<grade>[-+]?\d+)(?:\.0*)?"


class _Layout(NamedTuple):
    """The layout of the lines of a file."""

    words: str  # for messages
    pattern: str  # a regular expression; its groups become columns of a table


_RUN = _Layout(
    "query Q0 document rank score tag",
    r"(?P<query>\S+)\s+\S+\s+(?P<document>\S+)\s+"
    rf"(?P<rank>{_NUMBER})\s+(?P<score>{_NUMBER})\s+\S+",
)
_QRELS = _Layout(
    "query 0 document grade",
    rf"(?P<query>\S+)\s+\S+\s+(?P<document>\S+)\s+{_GRADE}",
)
_LETOR = _Layout(
    "grade qid:query 1:number 2:number ...",
    rf"{_GRADE}\s+qid:(?P<query>\S+)(?P<pairs>(?:\s+\d+:{_NUMBER})*)\s*"
    r"(?:#(?:.*?docid\s*=\s*(?P<document>\S+))?.*)?",
)
_SCORE = _Layout("number", rf"(?P<score>{_NUMBER})")
_TIME = 1_600_000_000  # seconds; queries have no time, and a log needs one
_RESAMPLES = 2000


class Agreement(NamedTuple):
    """The share of a run's first documents that another run has among its first, in [0, 1].

    The mean over queries, with its 95% bootstrap interval over queries, and their number.
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
    with duckdb.connect() as con:
        _read_run(con, "one", [Path(first)])
        _read_run(con, "other", [Path(second)])
        matches = con.sql(f"""
            WITH sizes AS (SELECT query, least({k}, size, others) AS depth
                FROM (SELECT query, max(place) AS size FROM one GROUP BY query)
                JOIN (SELECT query, max(place) AS others FROM other GROUP BY query) USING (query))
            SELECT count(other.place) / depth AS share FROM sizes JOIN one USING (query)
            LEFT JOIN other ON one.query = other.query AND one.document = other.document
                AND other.place <= greatest({within}, depth)
            WHERE one.place <= depth GROUP BY sizes.query, depth ORDER BY sizes.query""")
        shares = matches.fetchnumpy()["share"]
    if not len(shares):
        raise UserError(f"{first} and {second} share no query; give runs of the same queries")
    draws = np.random.default_rng(0).choice(shares, (_RESAMPLES, len(shares))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Agreement(float(np.mean(shares)), float(low), float(high), len(shares))


def _read(
    con: duckdb.DuckDBPyConnection, name: str, paths: Sequence[Path], layout: _Layout
) -> list[int]:
    """Make a table of the lines of files that are not blank.

    Its columns `part` and `line` number the files from 0 and their lines from 1.

    UserError names a line of another layout, and one with a document that its query has already.

    Returns:
      The number of lines of each file.
    """
    pattern = rf"^\s*{layout.pattern}\s*$"
    groups = list(re.compile(pattern).groupindex)
    numbers: list[int] = []
    for part, path in enumerate(paths):
        insert = f"CREATE OR REPLACE TABLE {name} AS" if part == 0 else f"INSERT INTO {name}"
        try:
            created = con.execute(
                f"""{insert} SELECT {part} AS part, line,
                    unnest(regexp_extract(text, $pattern, {groups}))
                FROM (SELECT row_number() OVER () AS line, text FROM read_csv($path,
                    columns = {{'text': 'VARCHAR'}}, auto_detect = false, header = false,
                    delim = '', quote = '', escape = '', strict_mode = false))
                WHERE regexp_matches(text, '\\S')""",
                {"path": str(path), "pattern": pattern},
            )
        except duckdb.Error as error:
            raise UserError(
                f"{path} cannot be read as plain text in UTF-8: {line_of(error)}"
            ) from error
        numbers += created.fetchone() or ()
        if not numbers[-1]:
            raise UserError(f"{path} is empty; fetch or write it again")
    _check(con, paths, f"not “{layout.words}”", f"FROM {name} WHERE {groups[0]} = ''")
    if "document" in groups:
        twice = f"""FROM (SELECT part, max(line) AS line FROM {name} WHERE document <> ''
            GROUP BY part, query, document HAVING count(*) > 1)"""
        _check(con, paths, "its query has this document already", twice)
    return numbers


def _check(con: duckdb.DuckDBPyConnection, paths: Sequence[Path], fault: str, lines: str) -> None:
    """Raise UserError with the file and number of the first of the lines that are at fault."""
    for part, line in con.sql(f"SELECT part, line {lines} ORDER BY ALL LIMIT 1").fetchall():
        raise UserError(f"{paths[part]}, line {line}: {fault}")


def _read_run(con: duckdb.DuckDBPyConnection, name: str, paths: Sequence[Path]) -> None:
    """Make a table of a TREC run; the order is that of scores, and of ranks if these are equal."""
    _read(con, name, paths, _RUN)
    con.execute(f"""
        CREATE OR REPLACE TABLE {name} AS SELECT part, query, document, score::DOUBLE AS score,
            row_number() OVER (PARTITION BY part, query
                ORDER BY score::DOUBLE DESC, rank::DOUBLE, line) AS place FROM {name}""")


def _files(data: ConfigDict, *names: str) -> list[list[Path]]:
    """Return the files with each name, one per split; a single one if no name has `SPLIT`."""
    has_splits = any(SPLIT in name for name in names)
    words = [data.splits[split] for split in SPLITS] if has_splits else [""]
    folder = Path(data.path).absolute()
    return [[folder / name.replace(SPLIT, word) for word in words] for name in names]


def _find(data: ConfigDict, *names: str) -> list[Path]:
    """Find the files with these names, of all splits; each of them once."""
    paths = dict.fromkeys(str(path) for path in itertools.chain(*_files(data, *names)))
    return find_raw(data, paths, "the ranking files; data.splits has the words of {split}")


def _columns(data: ConfigDict, has_splits: bool) -> str:
    """SQL for the columns of both kinds of files: a query's number makes its time."""
    labels = "".join(
        f", (grade::INT >= {grade})::TINYINT AS grade_{grade}" for grade in data.grades
    )
    split = f", {list(SPLITS)}[part + 1] AS split" if has_splits else ""
    return f"""query AS request, {_TIME} + number AS time{split}, document AS item,
        grade::INT AS grade{labels}"""


def _find_letor(data: ConfigDict) -> list[Path]:
    if data.scores:
        return _find(data, data.documents, data.scores)
    return _find(data, data.documents)


def _write_letor(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per document; all of them count as shown."""
    documents, scores = _files(data, data.documents, data.scores)
    number = int(data.num_features)
    if not data.sparse:
        wrong = f"places <> range(1, {number + 1})"
        features = "numbers"
    else:
        wrong = f"len(list_intersect(places, range(1, {number + 1}))) <> len(places)"
        features = f"""list_transform(range(1, {number + 1}),
            lambda place: coalesce(numbers[list_position(places, place)], 0))::FLOAT[]"""
    with connect(data, folder) as con:
        num_lines = _read(con, "lines", documents, _LETOR)
        apart = """
            FROM (SELECT part, line, query, lag((part, query)) OVER (ORDER BY part, line) AS
            before, row_number() OVER (PARTITION BY query ORDER BY part, line) AS turn FROM lines)
            WHERE turn > 1 AND before <> (part, query)"""
        _check(con, documents, "its query was before others, or in an earlier split", apart)
        if data.scores:
            num_scores = _read(con, "scores", scores, _SCORE)
        else:
            con.execute("CREATE TABLE scores AS SELECT NULL AS score FROM lines")
            num_scores = num_lines
        con.execute("""
            CREATE TABLE documents AS SELECT lines.* EXCLUDE pairs, score::DOUBLE AS score,
                regexp_extract_all(pairs, '(\\d+):', 1)::BIGINT[] AS places,
                regexp_extract_all(pairs, ':(\\S+)', 1)::FLOAT[] AS numbers
            FROM lines POSITIONAL JOIN scores""")
        which = "some of 1" if data.sparse else "1"
        fault = f"its features are not {which} to data.num_features={number}"
        _check(con, documents, fault, f"FROM documents WHERE {wrong}")
        for part, path in enumerate(documents):
            if num_lines[part] != num_scores[part]:
                raise UserError(
                    f"{scores[part]} has {num_scores[part]} scores for {num_lines[part]} lines of "
                    f"{path}; give one score per line"
                )
        ranks = ", score::FLOAT AS final_score, final_rank" if data.scores else ""
        con.sql(f"""
            WITH placed AS (SELECT *, min(line) OVER of_query AS first,
                row_number() OVER (of_query ORDER BY line) - 1 AS place,
                row_number() OVER (of_query ORDER BY score DESC, line) AS final_rank
                FROM documents WINDOW of_query AS (PARTITION BY part, query)),
            numbered AS (SELECT * REPLACE (if(document = '', query || '-' || place, document) AS
                document), dense_rank() OVER (ORDER BY part, first) AS number FROM placed)
            SELECT {_columns(data, len(documents) > 1)}, 'shown' AS stage,
                {features} AS features{ranks}
            FROM numbered ORDER BY number, line""").write_parquet(str(folder / "log.parquet"))


def _find_trec(data: ConfigDict) -> list[Path]:
    if data.final and data.final not in data.runs:
        raise UserError(
            f"data.final={data.final!r} is not one of data.runs: {', '.join(data.runs)}"
        )
    return _find(data, data.qrels, *data.runs.values())


def _write_trec(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per document of a run, of the queries that have a graded one among these."""
    qrels, *runs = _files(data, data.qrels, *data.runs.values())
    with connect(data, folder) as con:
        _read(con, "qrels", qrels, _QRELS)
        for turn, (name, paths) in enumerate(zip(data.runs, runs, strict=True)):
            _read_run(con, "run", paths)
            known = con.sql("SELECT DISTINCT part FROM run SEMI JOIN qrels USING (part, query)")
            known_parts = {part for (part,) in known.fetchall()}
            for part, path in enumerate(paths):
                if part not in known_parts:
                    raise UserError(
                        f"{path}: {qrels[part]} has none of its queries; name files of the same "
                        "queries in data.runs and data.qrels"
                    )
            insert = "CREATE TABLE runs AS" if turn == 0 else "INSERT INTO runs"
            con.execute(f"""{insert} SELECT {literal(name)} AS run, {turn} AS turn, * FROM run""")
        con.execute("""
            CREATE TABLE numbered AS SELECT part, query,
                row_number() OVER (ORDER BY part, min(line)) AS number
            FROM qrels SEMI JOIN (FROM qrels SEMI JOIN runs USING (part, query, document)) AS judged
            USING (part, query) GROUP BY part, query""")
        ((left_out,),) = con.sql(
            "SELECT count(DISTINCT query) FROM runs ANTI JOIN numbered USING (query)"
        ).fetchall()
        if left_out:
            logging.warning("left out %d queries of the runs without graded documents", left_out)
        run_columns = []
        for run in data.runs:
            is_run = f"FILTER (run = {literal(run)})"
            run_columns.append(f'max(score) {is_run}::FLOAT AS "{run}_score"')
            run_columns.append(f'max(place) {is_run}::FLOAT AS "{run}_rank"')
        passed = f'"{data.final}_rank" IS NOT NULL' if data.final else "false"
        con.sql(f"""
            WITH listed AS (SELECT part, query, document, min((turn, place)) AS first,
                {", ".join(run_columns)}
                FROM runs GROUP BY ALL)
            SELECT {_columns(data, len(qrels) > 1)}, CASE WHEN grade IS NOT NULL THEN 'shown'
                WHEN {passed} THEN 'passed' ELSE 'retrieved' END AS stage,
                listed.* EXCLUDE (part, query, document, first)
            FROM listed JOIN numbered USING (part, query)
            LEFT JOIN qrels USING (part, query, document)
            ORDER BY number, first""").write_parquet(str(folder / "log.parquet"))


_SHARED = ("splits", "grades")
LETOR = Converter(
    ("documents", "scores", "num_features", "sparse", *_SHARED), _find_letor, _write_letor
)
TREC = Converter(("qrels", "runs", "final", *_SHARED), _find_trec, _write_trec)
