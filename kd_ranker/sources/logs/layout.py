"""`config.data` of a log, read once and checked: the use of each column."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np
from ml_collections import ConfigDict

from kd_ranker.distillation.teacher_signal import LARGEST_SCORE
from kd_ranker.errors import UserError, check_choice

ROWS = ("candidate", "request")
SPLIT_BY = ("time", "request", "user", "column")
TIME_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}
OWNERS = ("user", "context", "item", "candidate")
# Events of the history have dense features, in lists aligned with it.
FEATURE_OWNERS = (*OWNERS, "event")
ENGINES = ("duckdb", "spark")
FEATURE_KINDS = ("dense", "category", "bag", "history")
STAGES = ("retrieved", "passed", "shown")
# Findings that make no dataset unless `data.allow` names them, see `findings`.
ALLOWABLE = (
    *("few_positives", "one_candidate", "one_label", "rejected", "teacher_coverage", "times"),
)
INCUMBENT_SIGNALS = ("score", "rank")
# Columns of ids and times, which a log must have; only that of users may be "".
IDENTIFYING = ("request", "time", "user", "item")
# Columns that a log may lack, with a value per candidate.
OPTIONAL = (
    *("stage", "position", "label_weight", "teacher_version", "teacher_weight"),
    *("incumbent", "propensity", "split"),
)
# Keys of `config.data` that are fields of `LogLayout` as they are.
_AS_GIVEN = (
    *("teacher_version", "teacher_signal", "incumbent_signal", "split", "validation_share"),
    *("test_share", "seed", "strict", "processes", "memory", "engine", "spark_master"),
)
_TEXT_FILE = r"\.([ct]sv|json|jsonl|ndjson)(\.gz)?$"
# A number beyond it cannot be stored in 32 bits.
LARGEST = float(np.finfo(np.float32).max)


def literal(text: str) -> str:
    """Return a text as SQL takes it."""
    return "'" + text.replace("'", "''") + "'"


@dataclasses.dataclass(frozen=True)
class Feature:
    """One entry of `config.data.features`; see `kd_ranker.config.features.feature`."""

    name: str
    of: str
    kind: str
    column: str
    hashed: bool
    size: int
    length: int
    standardise: bool
    cheap: bool
    place: int | None = None  # in the vectors of its column, of which each number is a feature

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
    """The part of the config on a log, checked.

    Fields that are not listed are keys of `config.data`, see `config/keys.py`. A log to score has
    `split` "" and `teacher_version` "": all of its requests are for the test.

    Attributes:
      path: of the log, or `data.sql` for one that a SELECT yields.
      sql: the SELECT; "" for the Parquet files at `path`.
      directory: `data.dir`.
      by_request: True if a row is a request with lists, rather than a candidate.
      columns: use -> its column; uses that the log lacks are left out.
      stages: text of the stage column -> 1 retrieved, 2 passed, 3 shown, as in `batch.Stage`.
      labels: a task -> its column.
      teacher: a task -> its column, for the tasks that have one.
      tasks: the tasks to keep, in the order of every T axis.
      units_per_second: of an integer time column.
      features: the features, in the config's order.
      spark_options: settings of its session, by name.
      longest: the most seconds between the first and the last row of a request.
      retrieved: the most candidates of a request.
      history_length: of the history feature; without one, `data.history_length`.
    """

    path: str
    sql: str
    directory: str
    by_request: bool
    columns: dict[str, str]
    stages: dict[str, int]
    labels: dict[str, str]
    teacher: dict[str, str]
    tasks: tuple[str, ...]
    teacher_version: str
    teacher_signal: str
    incumbent_signal: str
    units_per_second: int
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
    longest: int
    retrieved: int
    history_length: int

    def of(self, *owners: str, kind: str = "") -> list[Feature]:
        """The features of some owners, of all kinds or of one."""
        return [
            feature
            for feature in self.features
            if feature.of in owners and kind in ("", feature.kind)
        ]

    def of_kind(self, *kinds: str) -> list[Feature]:
        """The features of some kinds."""
        return [feature for feature in self.features if feature.kind in kinds]

    def categories(self, *owners: str) -> list[Feature]:
        """The categorical features of some owners: single values and bags."""
        return [feature for feature in self.of(*owners) if feature.kind in ("category", "bag")]

    @property
    def vocabularies(self) -> list[Feature]:
        """The categorical features with values in a vocabulary, not hashed."""
        return [of for of in self.categories(*OWNERS) if not of.hashed]

    @property
    def history(self) -> Feature | None:
        """The history, if the log has one."""
        return next(iter(self.of_kind("history")), None)

    def with_prefix(self, prefix: str) -> "LogLayout":
        """The layout of the log with a prefix before the names of all columns."""

        def named(columns: dict[str, str]) -> dict[str, str]:
            return {use: prefix + column for use, column in columns.items()}

        return dataclasses.replace(
            self,
            columns=named(self.columns),
            labels=named(self.labels),
            teacher=named(self.teacher),
            features=tuple(
                dataclasses.replace(feature, column=prefix + feature.column)
                for feature in self.features
            ),
        )

    def to_score(self, has_time: bool) -> "LogLayout":
        """The layout of a log to score: ids and features, and the time if it has one."""
        columns = {
            use: column
            for use, column in self.columns.items()
            if use in IDENTIFYING and (has_time or use != "time")
        }
        return dataclasses.replace(
            self, columns=columns, stages={}, labels={}, teacher={}, teacher_version="", split=""
        )

    @property
    def teacher_range(self) -> tuple[float, float]:
        """The bounds of the teacher's valid values."""
        scores = (-LARGEST_SCORE, LARGEST_SCORE)
        return {"probability": (0.0, 1.0), "rank": (0.0, LARGEST)}.get(self.teacher_signal, scores)

    @property
    def scored_tasks(self) -> tuple[str, ...]:
        """The tasks with a teacher column, in the order of the tasks."""
        return tuple(task for task in self.tasks if task in self.teacher)


def sql_of(data: ConfigDict) -> str:
    """Return the SELECT that yields a log: of text files at `data.path`, or `data.sql`."""
    if files := text_files(str(data.path)):
        return rows_of(map(reader_of, files))
    return str(data.sql).strip().rstrip(";")


def split_path(path: str) -> list[str]:
    """Return the paths in `data.path`, which commas separate."""
    return [of.strip() for of in path.split(",")]


def text_files(path: str) -> list[str]:
    """Return the paths in `data.path` if all name text files, else none."""
    paths = split_path(path)
    return paths if all(re.search(_TEXT_FILE, of, re.IGNORECASE) for of in paths) else []


def reader_of(path: str, texts: Sequence[str] = ()) -> str:
    """Return DuckDB's call that reads text files; types are those of all rows.

    Args:
      path: a file or a pattern.
      texts: columns of a CSV file to read as texts, whatever their values.
    """
    if not re.search(r"\.[ct]sv(\.gz)?$", path, re.IGNORECASE):
        return f"read_json({literal(path)}, sample_size = -1)"
    columns = ", ".join(f"{literal(of)}: 'VARCHAR'" for of in texts)
    types = f", types = {{{columns}}}" if texts else ""
    return f"read_csv({literal(path)}, sample_size = -1{types})"


def rows_of(readers: Iterable[str]) -> str:
    """Return the SELECT of the rows of all calls of `reader_of`."""
    return " UNION ALL BY NAME ".join(f"SELECT * FROM {reader}" for reader in readers)


def read_layout(data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> LogLayout:
    """Read `config.data`.

    Raises:
      UserError: a key holds a value that it cannot hold.
    """
    _check(data, tasks)
    features = tuple(
        feature
        for name, value in data.features.items()
        for feature in _numbers_of(_read_feature(name, value))
    )
    histories = [feature for feature in features if feature.kind == "history"]
    if len(histories) > 1:
        raise UserError(
            f"data.features has {len(histories)} of kind 'history' "
            f"({', '.join(feature.name for feature in histories)}); there is room for one"
        )
    if not histories and (of_events := [of.key for of in features if of.of == "event"]):
        raise UserError(
            f"data.features.{of_events[0]}.of='event', and no feature has kind 'history'; name the "
            "column of the items of these events"
        )
    _check_leaks(data, features)
    columns = {
        name: column
        for name, column in data.columns.items()
        if column and (name != "split" or data.split == "column")
    }
    return LogLayout(
        path=str(data.path) or "data.sql",
        sql=sql_of(data),
        directory=str(data.dir),
        by_request=data.rows == "request",
        columns=columns,
        stages=_read_stages(data.stages) if "stage" in columns else {},
        labels={task: data.labels[task] for task in tasks},
        teacher={task: data.teacher[task] for task in tasks if data.teacher.get(task)},
        tasks=tuple(tasks),
        units_per_second=TIME_UNITS[data.time_unit],
        features=features,
        allow=tuple(data.allow),
        spark_options=_read_options(data.spark_options),
        longest=int(data.longest_request),
        retrieved=int(funnel.retrieved),
        history_length=histories[0].length if histories else int(data.history_length),
        **{key: data[key] for key in _AS_GIVEN},
    )


def _check(data: ConfigDict, tasks: Sequence[str]) -> None:
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
    for key in ("columns", "stages", "labels", "teacher"):
        for name, value in data[key].items():
            if not isinstance(value, str):
                raise UserError(f"data.{key}.{name}={value!r} must be a text")
    for name in data.columns:
        check_choice("data.columns", name, (*IDENTIFYING, *OPTIONAL))
    if data.split == "user" and not data.columns.get("user"):
        raise UserError("data.split='user' needs data.columns.user; split by 'time' or 'request'")
    if data.split == "column" and not data.columns.get("split"):
        raise UserError("data.split='column' needs data.columns.split; name the column of splits")
    needed = [("columns", name) for name in IDENTIFYING if name != "user"]
    for section, name in (*needed, *(("labels", task) for task in tasks)):
        if not data[section].get(name):
            raise UserError(f"data.{section}.{name} is empty; name the column that holds it")
    for task in data.teacher:
        check_choice("data.teacher", task, data.labels)
    if data.validation_share + data.test_share >= 1:
        raise UserError(
            f"data.validation_share={data.validation_share} and data.test_share={data.test_share} "
            "leave no requests for training; lower one of them"
        )


def _check_leaks(data: ConfigDict, features: Sequence[Feature]) -> None:
    """Refuse features that hold the answer, or the outcome of a request."""
    # An early ranker may read the scores of the current one.
    names = [of for of in OPTIONAL if of != "incumbent" and data.columns.get(of)]
    answers = {data.columns[name]: f"columns.{name}" for name in names}
    for section in ("teacher", "labels"):
        answers |= {column: f"{section}.{task}" for task, column in data[section].items()}
    for feature in features:
        if use := answers.get(feature.column):
            raise UserError(
                f"data.features.{feature.name} reads column {feature.column!r}, which is that of "
                f"data.{use}: known only after the request; leave it out of data.features"
            )


def _read_stages(stages: ConfigDict) -> dict[str, int]:
    for name in stages:
        check_choice("data.stages", name, STAGES)
    texts = {text: 1 + STAGES.index(name) for name, text in stages.items() if text}
    if len(texts) < sum(bool(text) for text in stages.values()):
        raise UserError(f"data.stages={dict(stages)} gives two stages the same text")
    if "shown" not in stages or not stages.shown:
        raise UserError(
            "data.stages.shown is empty; give the text of the stage column for shown candidates"
        )
    return texts


def _numbers_of(feature: Feature) -> list[Feature]:
    """The numbers of a dense vector, each a feature; of others the feature itself."""
    if feature.kind != "dense" or feature.length == 1:
        return [feature]
    return [
        dataclasses.replace(feature, name=f"{feature.name}[{place}]", place=place)
        for place in range(feature.length)
    ]


def _read_options(options: Sequence[str]) -> dict[str, str]:
    for option in options:
        if "=" not in option:
            raise UserError(f"data.spark_options has {option!r}, which is no name=value")
    return dict(option.split("=", 1) for option in options)


def _read_feature(name: str, value: ConfigDict) -> Feature:
    key = f"data.features.{name}"
    names = (field.name for field in dataclasses.fields(Feature))
    known = [name for name in names if name not in ("name", "place")]
    if not isinstance(value, ConfigDict) or set(value) != set(known):
        raise UserError(f"{key} must be made by kd_ranker.config.features.feature")
    check_choice(f"{key}.of", value.of, FEATURE_OWNERS)
    check_choice(f"{key}.kind", value.kind, FEATURE_KINDS)
    if value.kind == "history" and value.of not in ("user", "context"):
        raise UserError(f"{key}.of={value.of!r}: a history is one of: user, context")
    if value.of == "event" and (value.kind != "dense" or value.standardise):
        raise UserError(
            f"{key}: a feature of events has kind 'dense' and standardise=False; the log holds its "
            "numbers as the models read them"
        )
    for number in ("size", "length"):
        if value[number] < 1:
            raise UserError(f"{key}.{number}={value[number]} must be at least 1")
    if value.kind == "category" and value.length != 1:
        raise UserError(f"{key}.length={value.length}: kind {value.kind!r} holds one value")
    fields = {field: value[field] for field in known} | {"column": value.column or name}
    return Feature(name=name, **fields)
