"""`config.data` of a log, read once and checked: the use of each column."""

import dataclasses
import glob
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kd_ranker.distillation.teacher_signal import LARGEST_SCORE
from kd_ranker.errors import UserError, check_choice
from kd_ranker.sources.logs.sql import literal
from kd_ranker.sources.logs.times import check_format

ROWS = ("candidate", "request")
SPLIT_BY = ("time", "request", "user", "column")
NO_PLACE = -1  # a position that means none
OPEN = "?"  # in a first config: a column that the user has to settle
TIME_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}
OWNERS = ("user", "context", "item", "candidate")
# Events of the history have dense features, in lists aligned with it.
FEATURE_OWNERS = (*OWNERS, "event")
ENGINES = ("duckdb", "spark")
FEATURE_KINDS = ("dense", "category", "bag", "history")
STAGES = ("retrieved", "passed", "shown")
# Findings that make no dataset unless `data.allow` names them, see `findings`.
ALLOWABLE = (
    *("constant_teacher", "few_positives", "one_candidate", "one_label", "rejected"),
    *("teacher_coverage", "times"),
)
INCUMBENT_SIGNALS = ("score", "rank")
# Columns of ids and times, which a log must have; only that of users may be "".
IDENTIFYING = ("request", "time", "user", "item")
# Columns that a log may lack, with a value per candidate.
OPTIONAL = (
    *("stage", "position", "label_weight", "teacher_version", "teacher_weight"),
    *("incumbent", "propensity", "split"),
)
EARLY_SCORES = "early_scores"
"""The role of several columns, in one text with commas."""

PARQUET = (".parquet", ".pq")
"""The ends of the files that are read in a folder."""

_CSV_FILE = r"\.[ct]sv(\.gz)?$"
_TEXT_FILE = rf"{_CSV_FILE}|\.(json|jsonl|ndjson)(\.gz)?$"
# A number beyond it cannot be stored in 32 bits.
LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Feature:
    """One entry of `config.data.features`; see `kd_ranker.config.defaults.feature`."""

    name: str
    of: str
    kind: str
    column: str
    hashed: bool
    size: int
    length: int
    standardize: bool
    cheap: bool
    place: int | None = None  # in the vectors of its column; each number is a feature

    @property
    def key(self) -> str:
        """The name in `config.data.features`."""
        return self.name if self.place is None else self.name.rpartition("[")[0]

    @property
    def of_request(self) -> bool:
        """True if it is the same for all candidates of a request."""
        return self.of in ("user", "context", "event")


@dataclasses.dataclass(frozen=True)
class LogLayout:
    """The part of the config on a log, checked: keys of `config.data`, see `config/keys.py`.

    A log to score has `split` "" and `teacher_version` "": all of its requests are for the test.
    """

    path: str  # or `data.sql` for a log that a SELECT yields
    sql: str  # the SELECT; "" for the Parquet files at `path`
    directory: str
    by_request: bool
    columns: dict[str, str]  # use -> its column; uses that the log lacks are left out
    early_scores: tuple[str, ...]  # columns of scores that are known before the final ranker runs
    stages: dict[str, int]  # text -> 1 retrieved, 2 passed, 3 shown, as in `batch.Stage`
    labels: dict[str, str]  # task -> its column
    teacher: dict[str, str]  # task -> its column, for the tasks that have one
    tasks: tuple[str, ...]  # those to keep, in the order of every T axis
    teacher_version: str
    teacher_signal: str
    incumbent_signal: str
    time_format: str  # of a time column of texts; "" is ISO 8601
    units_per_second: int  # of a time column of numbers
    features: tuple[Feature, ...]
    split: str
    validation_share: float
    test_share: float
    seed: int
    allow: tuple[str, ...]
    strict: bool
    processes: int
    memory: float
    engine: str
    spark_master: str
    spark_options: dict[str, str]
    longest: int  # seconds between the first and the last row of a request, at most
    retrieved: int  # the most candidates of a request
    history_length: int

    def of(self, *owners: str, kind: str = "") -> list[Feature]:
        """The features of some owners or of all, and of one kind or of all."""
        features = []
        for feature in self.features:
            if owners and feature.of not in owners:
                continue
            if kind in ("", feature.kind):
                features.append(feature)
        return features

    def categories(self, *owners: str) -> list[Feature]:
        """The categorical features of some owners or of all: single values and bags."""
        return [feature for feature in self.of(*owners) if feature.kind in ("category", "bag")]

    @property
    def vocabularies(self) -> list[Feature]:
        """The categorical features with values in a vocabulary, not hashed."""
        return [feature for feature in self.categories() if not feature.hashed]

    @property
    def history(self) -> Feature | None:
        """The history, if the log has one."""
        return next(iter(self.of(kind="history")), None)

    def to_score(self, has_time: bool) -> "LogLayout":
        """The layout of a log to score: ids and features, and the time if it has one."""
        columns = {use: self.columns[use] for use in IDENTIFYING if use in self.columns}
        if not has_time:
            columns.pop("time", None)
        return dataclasses.replace(
            self,
            columns=columns,
            early_scores=(),
            stages={},
            labels={},
            teacher={},
            teacher_version="",
            split="",
        )

    @property
    def teacher_range(self) -> tuple[float, float]:
        """The bounds of the teacher's valid values."""
        if self.teacher_signal == "probability":
            return (0.0, 1.0)
        if self.teacher_signal == "rank":
            return (0.0, LARGEST)
        return (-LARGEST_SCORE, LARGEST_SCORE)

    @property
    def facts(self) -> dict[str, str]:
        """Columns of candidates for the evaluation only: field of the log -> its column."""
        facts = {
            use: self.columns[use] for use in ("incumbent", "propensity") if use in self.columns
        }
        return facts | {early_score(column): column for column in self.early_scores}

    @property
    def scored_tasks(self) -> tuple[str, ...]:
        """The tasks with a teacher column, in the order of the tasks."""
        return tuple(task for task in self.tasks if task in self.teacher)


def early_score(column: str) -> str:
    """Return the field of a log's early score."""
    return f"early_score:{column}"


def split_at_commas(texts: str) -> list[str]:
    """Return the paths, columns or texts of a stage that a value of the config holds.

    >>> split_at_commas("ranked, filtered")
    ['ranked', 'filtered']
    """
    return list(filter(None, map(str.strip, texts.split(","))))


def is_text_log(path: str) -> bool:
    """Return True if all paths in `data.path` name text files."""
    files = split_at_commas(path)
    return bool(files) and all(re.search(_TEXT_FILE, file, re.IGNORECASE) for file in files)


def sql_of(data: ConfigDict) -> str:
    """Return the SELECT that yields a log: of text files at `data.path`, or `data.sql`."""
    if is_text_log(str(data.path)):
        return sql_of_texts(str(data.path))
    return str(data.sql).strip().rstrip(";")


def sql_of_texts(
    path: str, as_texts: Sequence[str] = (), options: Mapping[str, str] | None = None
) -> str:
    """Return the SELECT of the text files at `data.path`, with types by all of their rows.

    Columns `as_texts` of CSV files are texts, whatever their values. `options` are further ones of
    DuckDB's `read_csv`, as SQL.
    """
    of_all = "sample_size = -1"
    of_csv = {**(options or {})}
    if as_texts:
        types = ", ".join(f"{literal(column)}: 'VARCHAR'" for column in as_texts)
        of_csv["types"] = f"{{{types}}}"
    csv_options = ", ".join([of_all, *(f"{name} = {value}" for name, value in of_csv.items())])
    selects = []
    for file in split_at_commas(path):
        if re.search(_CSV_FILE, file, re.IGNORECASE):
            selects.append(f"SELECT * FROM read_csv({literal(file)}, {csv_options})")
        else:
            selects.append(f"SELECT * FROM read_json({literal(file)}, {of_all})")
    return " UNION ALL BY NAME ".join(selects)


def patterns_of_parquet(path: str) -> str:
    """Return `data.path` with a pattern of Parquet files in place of each folder."""
    patterns = []
    for file in split_at_commas(path):
        is_folder = not glob.has_magic(file) and not file.endswith(PARQUET)
        patterns.append(f"{file.rstrip('/')}/**/*{PARQUET[0]}" if is_folder else file)
    return ",".join(patterns)


def read_layout(data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> LogLayout:
    """Read `config.data`.

    Raises:
      UserError: a key holds a value that it cannot hold.
    """
    _check(data, tasks)
    features: list[Feature] = []
    for name in data.features:
        features += _read_features(data, name)
    histories = [feature for feature in features if feature.kind == "history"]
    if len(histories) > 1:
        names = ", ".join(feature.name for feature in histories)
        raise UserError(
            f"data.features has {len(histories)} of kind 'history' ({names}); there is room for one"
        )
    event_keys = [feature.key for feature in features if feature.of == "event"]
    if event_keys and not histories:
        raise UserError(
            f"data.features.{event_keys[0]}.of='event', and no feature has kind 'history'; add one "
            "for the column with the items of these events"
        )
    columns = {
        use: column
        for use, column in data.columns.items()
        if column and use != EARLY_SCORES and (use != "split" or data.split == "column")
    }
    # Some fields are keys of `data` as they are.
    fields: dict[str, Any] = {
        field.name: data.get(field.name) for field in dataclasses.fields(LogLayout)
    }
    fields |= dict(
        path=str(data.path) or "data.sql",
        sql=sql_of(data),
        directory=str(data.dir),
        by_request=data.rows == "request",
        columns=columns,
        early_scores=tuple(split_at_commas(data.columns.get(EARLY_SCORES, ""))),
        stages=_read_stages(data.stages, "position" in columns) if "stage" in columns else {},
        labels={task: data.labels[task] for task in tasks},
        teacher={task: data.teacher[task] for task in tasks if data.teacher.get(task)},
        tasks=tuple(tasks),
        time_format=str(data.get("time_format", "")),
        units_per_second=TIME_UNITS[data.time_unit],
        features=tuple(features),
        allow=tuple(data.allow),
        spark_options=dict(_split_option(option) for option in data.spark_options),
        longest=int(data.longest_request),
        retrieved=int(funnel.retrieved),
        history_length=histories[0].length if histories else int(data.history_length),
    )
    return LogLayout(**fields)


def _split_option(option: str) -> tuple[str, str]:
    name, _, value = option.partition("=")
    return name, value


def _check(data: ConfigDict, tasks: Sequence[str]) -> None:
    """Refuse values that do not make a log, whatever its features."""
    if not data.path and not data.sql:
        raise UserError(
            "data.path is empty; give a Parquet file, a directory or a glob of them, with "
            "--config.data.path=…, or a SELECT with --config.data.sql=…"
        )
    if data.path and data.sql:
        raise UserError("data.path and data.sql are both set; set one of them to ''")
    if sql_of(data) and data.engine != "duckdb":
        raise UserError(
            f"data.sql and text files need data.engine='duckdb', and it is {data.engine!r}"
        )
    check_format(data.get("time_format", ""))
    if data.get("time_format") and data.engine != "duckdb":
        raise UserError(
            f"data.time_format needs data.engine='duckdb', and it is {data.engine!r}; or write the "
            "times as ISO 8601"
        )
    names = {"columns": (*IDENTIFYING, *OPTIONAL, EARLY_SCORES), "stages": STAGES}
    for section in ("columns", "stages", "labels", "teacher"):
        for name, text in data[section].items():
            check_choice(f"data.{section}", name, names.get(section, data.labels))
            if not isinstance(text, str):
                raise UserError(f"data.{section}.{name}={text!r} must be a text")
    split_by = {"user": "user", "column": "split"}.get(data.split)
    if split_by and not data.columns.get(split_by):
        raise UserError(f"data.split={data.split!r} needs data.columns.{split_by}; name its column")
    needed = {f"data.columns.{use}": data.columns.get(use) for use in IDENTIFYING if use != "user"}
    needed |= {f"data.labels.{task}": data.labels.get(task) for task in tasks}
    for key, column in needed.items():
        if not column:
            raise UserError(f"{key} is empty; name the column that holds it")
    if data.validation_share + data.test_share >= 1:
        raise UserError(
            f"data.validation_share={data.validation_share} and data.test_share={data.test_share} "
            "leave no requests for training; lower one of them"
        )


def _read_stages(stages: ConfigDict, has_position: bool) -> dict[str, int]:
    """Return the stage of each text; those of the shown may lack where positions tell them."""
    texts: dict[str, int] = {}
    for name, of_stage in stages.items():
        for text in split_at_commas(of_stage):
            if text in texts:
                raise UserError(
                    f"data.stages={dict(stages)} gives two stages the same text; give each its own"
                )
            texts[text] = 1 + STAGES.index(name)
    if not stages.get("shown") and not ("passed" in stages and "shown" not in stages):
        raise UserError(
            "data.stages.shown is empty; give the text of the stage column for shown candidates"
        )
    if "shown" not in stages and not has_position:
        raise UserError(
            "data.stages has no text for shown candidates; add it, or name data.columns.position: "
            "candidates with a position then count as shown"
        )
    return texts


def _read_features(data: ConfigDict, name: str) -> list[Feature]:
    """Read an entry of `data.features`: a feature, or one per number of a dense vector."""
    key, value = f"data.features.{name}", data.features[name]
    known = {field.name for field in dataclasses.fields(Feature)} - {"name", "place"}
    if not isinstance(value, ConfigDict) or set(value) != known:
        raise UserError(f"{key} is no feature; write it with kd.configs.feature(of, kind)")
    feature = Feature(name, **{**value, "column": value.column or name})
    check_choice(f"{key}.of", feature.of, FEATURE_OWNERS)
    check_choice(f"{key}.kind", feature.kind, FEATURE_KINDS)
    if feature.kind == "history" and feature.of not in ("user", "context"):
        raise UserError(f"{key}.of={feature.of!r}: of a history, it is one of: user, context")
    if feature.of == "event" and (feature.kind != "dense" or feature.standardize):
        raise UserError(
            f"{key}: a feature of events has kind 'dense' and standardize=False; the log holds its "
            "numbers as the models read them"
        )
    for number in ("size", "length"):
        if value[number] < 1:
            raise UserError(f"{key}.{number}={value[number]} must be at least 1")
    if feature.kind == "category" and feature.length != 1:
        raise UserError(
            f"{key}.length={feature.length}: kind {feature.kind!r} holds one value; leave length "
            "out, or use kind 'bag'"
        )
    # These hold the answer, or the outcome of a request. An early ranker may read the scores of the
    # current one.
    for section in ("columns", "labels", "teacher"):
        for use, column in data[section].items():
            is_known = section == "columns" and use in (*IDENTIFYING, "incumbent", EARLY_SCORES)
            if column == feature.column and not is_known:
                raise UserError(
                    f"{key} reads column {column!r}, which is that of data.{section}.{use}: known "
                    "only after the request; leave it out of data.features"
                )
    if feature.kind != "dense" or feature.length == 1:
        return [feature]
    return [
        dataclasses.replace(feature, name=f"{name}[{place}]", place=place)
        for place in range(feature.length)
    ]
