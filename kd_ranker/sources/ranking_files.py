"""Files of ranking research as a log: TREC runs with qrels, and LETOR lines with scores.

    TREC run      query Q0 document rank score tag
    qrels         query 0 document grade
    LETOR line    grade qid:query 1:0.5 2:0.25 ... # docid = document
    scores        one number per LETOR line, of the final ranker

`docs/ranking_files.md` describes stages, labels and columns. Errors name the file and the line.
"""

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
from kd_ranker.sources.logs.layout import literal

SPLIT = "{split}"
"""In the name of a file: replaced by the word that `data.splits` has for a split."""


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_GRADE = r"(?P<grade>[-+]?\d+)(?:\.0*)?"
# What a line has, for messages -> a regular expression; its groups become columns of a table.
_LAYOUTS = {
    "query Q0 document rank score tag": r"(?P<query>\S+)\s+\S+\s+(?P<document>\S+)\s+"
    rf"(?P<rank>{_NUMBER})\s+(?P<score>{_NUMBER})\s+\S+",
    "query 0 document grade": rf"(?P<query>\S+)\s+\S+\s+(?P<document>\S+)\s+{_GRADE}",
    "grade qid:query 1:number 2:number ...": rf"{_GRADE}\s+qid:(?P<query>\S+)"
    rf"(?P<pairs>(?:\s+\d+:{_NUMBER})*)\s*(?:#(?:.*?docid\s*=\s*(?P<document>\S+))?.*)?",
    "number": rf"(?P<score>{_NUMBER})",
}
_RUN, _QRELS, _LETOR, _SCORE = _LAYOUTS
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
        for name, path in (("one", first), ("other", second)):
            _read_run(con, name, Path(path))
        found = con.sql(f"""
            WITH sizes AS (SELECT query, least({k}, size, others) AS depth
                FROM (SELECT query, max(place) AS size FROM one GROUP BY query)
                JOIN (SELECT query, max(place) AS others FROM other GROUP BY query) USING (query))
            SELECT count(other.place) / depth AS share FROM sizes JOIN one USING (query)
            LEFT JOIN other ON one.query = other.query AND one.document = other.document
                AND other.place <= greatest({within}, depth)
            WHERE one.place <= depth GROUP BY sizes.query, depth ORDER BY sizes.query""")
        shares = found.fetchnumpy()["share"]
    if not len(shares):
        raise UserError(f"{first} and {second} share no query")
    draws = np.random.default_rng(0).choice(shares, (_RESAMPLES, len(shares))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Agreement(float(np.mean(shares)), float(low), float(high), len(shares))


def _read(con: duckdb.DuckDBPyConnection, name: str, path: Path, layout: str) -> None:
    """Make a table of the lines of a file that are not blank, from one of `_LAYOUTS`.

    UserError names a line of another layout, and one with a document that its query has already.
    """
    pattern = rf"^\s*{_LAYOUTS[layout]}\s*$"
    groups = [*re.compile(pattern).groupindex]
    try:
        con.execute(
            f"""CREATE OR REPLACE TABLE {name} AS SELECT line, unnest(regexp_extract(text, $pattern,
                {groups})) FROM (SELECT row_number() OVER () AS line, text FROM read_csv($path,
                    columns = {{'text': 'VARCHAR'}}, auto_detect = false, header = false,
                    delim = '', quote = '', escape = '', strict_mode = false))
                WHERE regexp_matches(text, '\\S')""",
            {"path": str(path), "pattern": pattern},
        )
    except duckdb.Error as error:
        raise UserError(
            f"{path} cannot be read as plain text in UTF-8: {line_of(error)}"
        ) from error
    _check(con, path, f"not “{layout}”", f"SELECT line FROM {name} WHERE {groups[0]} = ''")
    if "document" in groups:
        twice = f"""SELECT max(line) AS line FROM {name} WHERE document <> ''
            GROUP BY query, document HAVING count(*) > 1"""
        _check(con, path, "its query has this document already", twice)
    if not con.sql(f"FROM {name}").limit(1).fetchall():
        raise UserError(f"{path} is empty")


def _check(con: duckdb.DuckDBPyConnection, path: Path, fault: str, lines: str) -> None:
    """Raise UserError with the number of the first of the lines that SQL finds at fault."""
    ((line,),) = con.sql(f"SELECT min(line) FROM ({lines})").fetchall()
    if line:
        raise UserError(f"{path}, line {line}: {fault}")


def _read_run(con: duckdb.DuckDBPyConnection, name: str, path: Path) -> None:
    """Make a table of a TREC run; the order is that of scores, and of ranks if these are equal."""
    _read(con, name, path, _RUN)
    con.execute(f"""
        CREATE OR REPLACE TABLE {name} AS SELECT query, document, score::DOUBLE AS score,
            row_number() OVER (PARTITION BY query
                ORDER BY score::DOUBLE DESC, rank::DOUBLE, line) AS place FROM {name}""")


def _splits_of(*names: str) -> Sequence[str]:
    """The splits of files with these names; one "" if no name has `SPLIT`."""
    return SPLITS if any(SPLIT in name for name in names) else [""]


def _name(data: ConfigDict, name: str, split: str) -> str:
    return name.replace(SPLIT, data.splits[split]) if split else name


def _find(data: ConfigDict, *names: str) -> list[Path]:
    """The files with these names, of all splits."""
    found = [_name(data, name, split) for name in names for split in _splits_of(name)]
    return find_raw(data, found, "the ranking files; data.splits has the words of {split}")


def _columns(data: ConfigDict, has_splits: bool) -> str:
    """SQL for the columns of both kinds of files: a query's number makes its time."""
    labels = "".join(f", (grade >= {least})::TINYINT AS grade_{least}" for least in data.grades)
    split = ", split" if has_splits else ""
    return f"query AS request, {_TIME} + number AS time{split}, document AS item, grade{labels}"


def _find_letor(data: ConfigDict) -> list[Path]:
    return _find(data, data.documents, *([data.scores] if data.scores else []))


def _write_letor(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per document; all of them count as shown."""
    splits, number = _splits_of(data.documents, data.scores), int(data.num_features)
    if data.sparse:
        wrong = f"len(list_intersect(places, range(1, {number + 1}))) <> len(places)"
        features = f"""list_transform(range(1, {number + 1}),
            lambda place: coalesce(numbers[list_position(places, place)], 0))"""
    else:
        wrong, features = f"places <> range(1, {number + 1})", "numbers"
    with connect(data, folder) as con:
        con.execute("""
            CREATE TABLE documents (part INT, split VARCHAR, line BIGINT, query VARCHAR,
                document VARCHAR, grade INT, features FLOAT[], score DOUBLE)""")
        for part, split in enumerate(splits):
            path = Path(data.path) / _name(data, data.documents, split)
            _read(con, "lines", path, _LETOR)
            apart = """SELECT line FROM (SELECT *, lag(query) OVER (ORDER BY line) AS before,
                row_number() OVER (PARTITION BY query ORDER BY line) AS turn FROM lines)
                WHERE turn > 1 AND before <> query"""
            _check(con, path, "its query was there before, with others between", apart)
            earlier = "SELECT line FROM lines SEMI JOIN documents USING (query)"
            _check(con, path, "its query is in the file of an earlier split too", earlier)
            con.execute("""
                CREATE OR REPLACE TABLE lines AS SELECT * EXCLUDE pairs,
                    regexp_extract_all(pairs, '(\\d+):', 1)::BIGINT[] AS places,
                    regexp_extract_all(pairs, ':(\\S+)', 1)::FLOAT[] AS numbers FROM lines""")
            fault = (
                f"its features are not {'some of ' * data.sparse}1 to data.num_features={number}"
            )
            _check(con, path, fault, f"SELECT line FROM lines WHERE {wrong}")
            con.execute("CREATE OR REPLACE TABLE scores AS SELECT line, NULL AS score FROM lines")
            if data.scores:
                scores = Path(data.path) / _name(data, data.scores, split)
                _read(con, "scores", scores, _SCORE)
                ((lines, others),) = con.sql(
                    "SELECT (SELECT count(*) FROM lines), (SELECT count(*) FROM scores)"
                ).fetchall()
                if lines != others:
                    raise UserError(f"{scores} has {others} scores for {lines} lines of {path}")
            con.execute(f"""
                INSERT INTO documents SELECT {part}, '{split}', lines.line, query, document,
                    grade::INT, {features}, score::DOUBLE FROM lines POSITIONAL JOIN scores""")
        ranks = ", score::FLOAT AS final_score, final_rank" if data.scores else ""
        con.sql(f"""
            WITH placed AS (SELECT *, min(line) OVER of_query AS first,
                row_number() OVER (of_query ORDER BY line) - 1 AS place,
                row_number() OVER (of_query ORDER BY score DESC, line) AS final_rank
                FROM documents WINDOW of_query AS (PARTITION BY part, query)),
            numbered AS (SELECT * REPLACE (if(document = '', query || '-' || place, document) AS
                document), dense_rank() OVER (ORDER BY part, first) AS number FROM placed)
            SELECT {_columns(data, splits is SPLITS)}, 'shown' AS stage, features{ranks}
            FROM numbered ORDER BY number, line""").write_parquet(str(folder / "log.parquet"))


def _find_trec(data: ConfigDict) -> list[Path]:
    if data.final and data.final not in data.runs:
        raise UserError(
            f"data.final={data.final!r} is not one of data.runs: {', '.join(data.runs)}"
        )
    return _find(data, data.qrels, *data.runs.values())


def _write_trec(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per document of a run, of the queries that have a graded one among these."""
    splits = _splits_of(data.qrels, *data.runs.values())
    with connect(data, folder) as con:
        con.execute("""
            CREATE TABLE qrels (part INT, split VARCHAR, line BIGINT, query VARCHAR,
                document VARCHAR, grade INT);
            CREATE TABLE runs (part INT, run VARCHAR, turn INT, query VARCHAR,
                document VARCHAR, score DOUBLE, place INT)""")
        for part, split in enumerate(splits):
            path = Path(data.path) / _name(data, data.qrels, split)
            _read(con, "lines", path, _QRELS)
            con.execute(f"INSERT INTO qrels SELECT {part}, '{split}', * FROM lines")
            for turn, (name, of_split) in enumerate(data.runs.items()):
                run = Path(data.path) / _name(data, of_split, split)
                _read_run(con, "run", run)
                if not con.sql("FROM run SEMI JOIN lines USING (query)").limit(1).fetchall():
                    raise UserError(f"{run}: {path} has none of its queries")
                con.execute(f"INSERT INTO runs SELECT {part}, {literal(name)}, {turn}, * FROM run")
        con.execute("""
            CREATE TABLE numbered AS SELECT part, split, query,
                row_number() OVER (ORDER BY part, min(line)) AS number
            FROM qrels SEMI JOIN (FROM qrels SEMI JOIN runs USING (part, query, document)) AS judged
            USING (part, query) GROUP BY part, split, query""")
        ((left_out,),) = con.sql(
            "SELECT count(DISTINCT query) FROM runs ANTI JOIN numbered USING (query)"
        ).fetchall()
        if left_out:
            logging.warning("left out %d queries of the runs without graded documents", left_out)
        of_runs = ", ".join(
            f"max({of}) FILTER (run = {literal(run)})::FLOAT AS {name}"
            for run in data.runs
            for name, of in ((f'"{run}_score"', "score"), (f'"{run}_rank"', "place"))
        )
        passed = f'"{data.final}_rank" IS NOT NULL' if data.final else "false"
        con.sql(f"""
            WITH listed AS (SELECT part, query, document, min((turn, place)) AS first, {of_runs}
                FROM runs GROUP BY ALL)
            SELECT {_columns(data, splits is SPLITS)}, CASE WHEN grade IS NOT NULL THEN 'shown'
                WHEN {passed} THEN 'passed' ELSE 'retrieved' END AS stage,
                listed.* EXCLUDE (part, query, document, first)
            FROM listed JOIN numbered USING (part, query)
            LEFT JOIN qrels USING (part, query, document, split)
            ORDER BY number, first""").write_parquet(str(folder / "log.parquet"))


LETOR = Converter(
    ("documents", "scores", "splits", "grades", "num_features", "sparse"),
    _find_letor,
    _write_letor,
)
TREC = Converter(("qrels", "runs", "final", "splits", "grades"), _find_trec, _write_trec)
