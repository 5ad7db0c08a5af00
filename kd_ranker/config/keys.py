"""The table of all config keys, with the values, the meaning and the influence of each.

Each key is declared only here. Defaults, checks, sweep axes, columns that identify runs, and the
page `docs/config.md` derive from this table; see `schema`.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple, cast

from ml_collections import ConfigDict

from kd_ranker.batch import TEACHER_SIGNALS
from kd_ranker.batches.samplers import SAMPLERS
from kd_ranker.batches.training import ORDERS
from kd_ranker.distillation.losses import LOSSES, USER_LOSSES
from kd_ranker.distillation.modes import MODES
from kd_ranker.distillation.teacher_signal import SCORES, SIGNALS
from kd_ranker.distillation.terms import check_terms
from kd_ranker.embedding.row_optimizers import ROW_OPTIMIZERS
from kd_ranker.errors import UserError, check_choice
from kd_ranker.models.model import COMPUTE_DTYPES
from kd_ranker.models.student import HISTORIES, STUDENTS
from kd_ranker.models.teacher import TEACHERS
from kd_ranker.rivals.registry import RIVALS
from kd_ranker.sources import in_memory, kuairand
from kd_ranker.sources.logs import layout
from kd_ranker.sources.registry import SOURCES
from kd_ranker.tracking.registry import TRACKERS
from kd_ranker.training.mapping import MAPPINGS, TABLES
from kd_ranker.training.optimizers import OPTIMIZERS, SCHEDULES
from kd_ranker.training.specs import TEACHER_STAGES

# The first link of the chain that a key changes, and with it all that follows. `report` is how
# trained rankers are measured, and `nothing` changes no number.
Influence = Literal["dataset", "teacher", "student", "report", "nothing"]

# A key may differ between a sweep's runs, or only between its cohorts; the runs of a cohort
# share their batches.
Sweep = Literal["no", "runs", "cohorts"]


class Bound(NamedTuple):
    """A condition on a finite number."""

    text: str
    holds: Callable[[Any], bool]


ANY = Bound("", lambda number: True)
POSITIVE = Bound("> 0", lambda number: number > 0)
NOT_NEGATIVE = Bound("≥ 0", lambda number: number >= 0)
SHARE = Bound("in [0, 1]", lambda number: 0 <= number <= 1)
BELOW_ONE = Bound("in [0, 1)", lambda number: 0 <= number < 1)
INSIDE_ONE = Bound("in (0, 1)", lambda number: 0 < number < 1)
HISTORY = Bound("in [1, 100000]", lambda number: 1 <= number <= 100_000)

_KINDS = {
    str: "names",
    int: "whole numbers",
    float: "numbers",
    bool: "True or False",
    dict: "dicts of values by key",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Key:
    """One config key; everything else about it derives from these fields.

    Attributes:
      name: the sections and the key, as in `--config.NAME=value`.
      default: its value unless a config file sets another; it determines the type. An empty
        `ConfigDict` if users choose the names within.
      help: its meaning in one line.
      allowed: a bound of its numbers, `NOT_NEGATIVE` if None, or the names that it takes. For a
        tuple it applies to each element.
      check_text: raises UserError unless it is a text of allowed names.
      influences: the first thing that it changes.
      sweep: how a sweep may vary it.
      element: the type of a tuple's elements, if the default is empty.
      swept: of an axis, the key that it varies.
      label: its name among runs and in the report, if that is not its last part.
      column: the column of `results.csv` that contains it, possibly with other keys. A key without
        one that a sweep may vary has a column under its own name.
      tuned: True if validation chooses the best of its values. The values of the other keys make
        different students, or different methods of teaching them, which are compared.
      logarithmic: True if a search draws its logarithm, where it draws from a range.
      switch: True if 0 turns something off: 0 and the other values make different methods.
      may_differ: True if sweeps that differ in it can share a report. Keys that a sweep varies, and
        keys that influence nothing, may always differ.
      later: True if datasets were made before the key existed. Their names hold at its default.
    """

    name: str
    default: Any
    help: str
    allowed: Bound | Collection[str] | None = None
    check_text: Callable[[str], None] | None = None
    influences: Influence | None = None
    sweep: Sweep | None = None
    element: type | None = None
    swept: "Key | None" = None
    label: str = ""
    column: str = ""
    tuned: bool = False
    logarithmic: bool = False
    switch: bool = False
    may_differ: bool = False
    later: bool = False

    @property
    def type(self) -> type:
        """The type of its value, or of the elements of a tuple."""
        if isinstance(self.default, tuple):
            return self.element or type(self.default[0])
        return type(self.default)

    @property
    def short(self) -> str:
        """Its name among runs and in the report."""
        return self.label or self.name.rpartition(".")[2]

    @property
    def is_seed(self) -> bool:
        """True for seeds: their values are repeats of one setting."""
        return self.name.rpartition(".")[2] == "seed"

    @property
    def of_distillation(self) -> bool:
        """True if a student that does not distil has no use for it."""
        return self.name.startswith("distill.") and self.name != "distill.mode"

    @property
    def title(self) -> str:
        """The column of `results.csv` that contains it, if a sweep may vary it."""
        return self.column or self.name

    @property
    def bound(self) -> Bound | None:
        """The bound of its numbers; None if it takes no numbers."""
        if self.type not in (int, float):
            return None
        return self.allowed if isinstance(self.allowed, Bound) else NOT_NEGATIVE

    def check(self, value: Any) -> None:
        """Raise UserError unless the key may have `value`."""
        if self.swept:
            swept = dataclasses.replace(self.swept, name=self.name)
            for element in value:
                swept.check(element)
        elif not isinstance(self.default, tuple):
            self._check_one(value)
        elif not isinstance(value, (tuple, list)):
            raise UserError(f"{self.name} has {value!r}; it takes tuples")
        else:
            for element in value:
                self._check_one(element)

    def _check_one(self, value: Any) -> None:
        types = (int, float) if self.type is float else self.type
        # bool is an int to Python, and no number to anyone else.
        valid = isinstance(value, types) and isinstance(value, bool) == (self.type is bool)
        takes = _KINDS.get(self.type, "names of your own")
        if bound := self.bound:
            valid = valid and math.isfinite(value) and bound.holds(value)
            takes = f"{takes} {bound.text}".rstrip()
        if not valid:
            raise UserError(f"{self.name} has {value!r}; it takes {takes}")
        if self.type is int and abs(value) >= 2**63:
            raise UserError(f"{self.name} has {value!r}; it takes whole numbers below 2^63")
        if isinstance(value, str) and self.check_text:
            self.check_text(value)
        elif isinstance(value, str) and self.allowed is not None:
            check_choice(self.name, value, cast("Collection[str]", self.allowed))


def section(
    name: str, *keys: Key, influences: Influence, sweep: Sweep = "no", tuned: bool = False
) -> tuple[Key, ...]:
    """The keys of a section, "" for the root, under their whole names.

    The other arguments are defaults for keys that do not set them.
    """
    return tuple(
        dataclasses.replace(
            key,
            name=f"{name}.{key.name}" if name else key.name,
            influences=key.influences or influences,
            sweep=key.sweep or sweep,
            tuned=key.tuned or tuned,
        )
        for key in keys
    )


TEACHER_SOURCES = ("live", "logged")
LAUNCHERS = ("local", "ray")
SEARCHES = ("grid", "random", "optuna")
# The classes of `optuna.samplers`.
OPTUNA_SAMPLERS = {"tpe": "TPESampler", "gp": "GPSampler"}
# The parts of a sweep that are not cohorts.
PLAN = "plan"
JOIN = "join"


# The keys that students and teachers share, each named within its section.


def _batch(requests: int, candidates: int, passed_share: float) -> tuple[Key, ...]:
    return (
        Key("requests", requests, "requests per batch, over all devices", POSITIVE),
        Key("candidates", candidates, "candidates per request of a batch", POSITIVE),
        Key("passed_share", passed_share, "share of the passed in slots left by the shown; "
            "sampler hard: of the highest scores", SHARE),
        Key("negative_rate", 1.0, "share of the shown without a positive label to keep", SHARE),
        Key("seed", 0, "of the order of the data and the draws of candidates", label="data",
            column="data_seed", may_differ=True),
        Key("order", "shuffled", "of the requests of an epoch: at random, or by time", ORDERS),
        Key("sampler", "funnel",
            "the draw of a request's candidates: by kind (funnel), each as likely (uniform), or "
            "those not shown that the teacher scores highest (hard)", SAMPLERS),
    )  # fmt: skip


_MODEL = (
    Key("width", 32, "numbers of an embedding", POSITIVE),
    Key("table_scale", 0.05, "standard deviation of fresh embedding rows"),
    Key("user_rows", 0, "rows that user ids are hashed into; 0: one row per id"),
    Key("item_rows", 0, "rows that item ids are hashed into; 0: one row per id"),
    Key("category_rows", 0, "rows that all category ids are hashed into; 0: one row per id"),
    Key("compute_dtype", "float32", "of the arithmetic; fast_float32: float32, but the device "
        "chooses the precision of matrix products; parameters stay float32", COMPUTE_DTYPES),
)  # fmt: skip

_OPTIMIZER = (
    Key("name", "adam", "optimizer of the dense parameters", OPTIMIZERS, label="optimizer"),
    Key("learning_rate", 2e-3, "peak rate of the dense parameters", label="rate",
        column="learning_rate", logarithmic=True),
    Key("weight_decay", 0.0, "decoupled decay of the dense parameters", logarithmic=True),
    Key("table_name", "adam", "optimizer of the embedding rows", ROW_OPTIMIZERS),
    Key("table_learning_rate", 2e-3, "peak rate of the embedding rows", logarithmic=True),
    Key("table_weight_decay", 0.0, "decoupled decay of the embedding rows", logarithmic=True),
    Key("schedule", "cosine", "of the rates over the steps; cosine ends at 0", SCHEDULES),
    Key("warmup_steps", 50, "steps in which the rates rise to their peaks"),
)  # fmt: skip

_TRAIN = (
    Key("steps", 1500, "train steps", POSITIVE, tuned=True),
    Key("warm_start", "", "workdir of a finished run on this dataset, or on one that it extends: "
        "the parameters to start with", sweep="no"),
    Key("log_every", 50, "steps from one line of metrics to the next", POSITIVE,
        influences="nothing", sweep="no"),
    Key("checkpoint_every", 500, "steps from one checkpoint to the next", POSITIVE,
        influences="nothing", sweep="no"),
    Key("eval_every", 500, "steps from one evaluation to the next; 0: only at the end",
        influences="nothing", sweep="no"),
    Key("eval_limit", 64, "requests of an evaluation on the way", POSITIVE, influences="nothing",
        sweep="no"),
    Key("early_stopping", (), "steps between evaluations, and the number of them without a better "
        "one after which a run stops with its best state, as (100, 5); () takes all steps",
        POSITIVE, element=int, sweep="no"),
    Key("profile", (), "the first step and the number of steps of a trace for XProf or Perfetto; "
        "(): 4 steps from the 10th; (1, 0): none", element=int, influences="nothing", sweep="no"),
)  # fmt: skip

_ALL = (
    section(
        "",
        Key("seed", 0, "of the initialization, of students and teacher", influences="teacher",
            sweep="runs", column="seed"),
        Key("tasks", ("watch", "like", "share"), "the user actions to predict"),
        Key("value_weights", (1.0, 2.0, 4.0), "one per task: a ranker sorts by the weighted sum of "
            "probabilities", influences="report"),
        Key("launcher", "local", "where a sweep's cohorts train: here, or on a cluster of Ray",
            LAUNCHERS, influences="nothing"),
        Key("registered_by", "", "a Python file that other processes execute first, and with "
            "--trust also score and export, because it registers a part of the run; set to the "
            "file of --config, unless that is one of the package", influences="nothing"),
        Key("tracker", "tensorboard", "where scalars go beside metrics.jsonl; mlflow and wandb are "
            "extras", TRACKERS, influences="nothing"),
        Key("compilation_cache", "auto", "folder that keeps compiled programs for later processes; "
            "auto: one of this user; \"\": none", influences="nothing"),
        influences="dataset",
    ),
    section(
        "data",
        Key("name", "", "the source", SOURCES),
        Key("path", "", "raw files, where the dataset is made from some", may_differ=True),
        Key("dir", "datasets", "folder of built datasets", influences="nothing"),
        Key("seed", 0, "of the dataset itself, apart from what is trained on it"),
        Key("history_length", 20, "events of a user's history", HISTORY),
        Key("processes", 1, "threads that read a log and write its dataset", POSITIVE,
            influences="nothing"),
        influences="dataset",
    ),
    section(
        "funnel",
        Key("retrieved", 2000, "candidates of a request", POSITIVE),
        Key("passed", 200, "candidates that the early ranker passes", POSITIVE),
        Key("shown", 10, "candidates that the final ranker shows", POSITIVE),
        Key("report_at", (10, 50, 100, 200, 400), "the k of survival@k and its like", POSITIVE,
            influences="report", may_differ=True),
        Key("targets", (0.95, 0.97, 0.98, 0.99, 0.995, 0.999), "shares of the value to keep, for "
            "passed_for_99 and its like", INSIDE_ONE, influences="report", may_differ=True),
        influences="dataset",
    ),
    section(
        "batch",
        *_batch(requests=32, candidates=128, passed_share=0.5),
        influences="student",
        sweep="cohorts",
    ),
    section(
        "student",
        Key("name", "multi_interest", "the architecture", STUDENTS, label="student"),
        Key("interests", 4, "user embeddings a request", POSITIVE),
        Key("hidden", (64,), "units of each hidden layer", POSITIVE),
        Key("history", "none", "of the user's history: nothing, or the mean of its events",
            HISTORIES),
        *_MODEL,
        influences="student",
        sweep="runs",
    ),
    section(
        "distill",
        Key("mode", "shared", "how the student learns from user labels and teacher labels", MODES,
            column="mode"),
        Key("loss", "bce", "against the teacher, a sum of terms: \"softmax + 0.5 * softmax:stage\" "
            f"has two losses, signals after a colon ({', '.join(SIGNALS)}; without one, {SCORES}) "
            "and a weight; the sizes of losses differ", LOSSES, check_text=check_terms,
            column="distill_loss"),
        Key("weight", 1.0, "λ in user loss + λ · distillation loss", column="distill_weight",
            tuned=True, logarithmic=True),
        Key("user_weight", 1.0, "on the user loss; 0: learn only from the teacher"),
        Key("temperature", 1.0, "softens student and teacher in a loss", POSITIVE,
            column="temperature", tuned=True),
        Key("top_k", 10, "losses topk, dftopk, rank_distil: k, out of a request's in the batch",
            POSITIVE, tuned=True),
        Key("numbers", (), "own numbers of the losses of your own, in order; () takes the defaults",
            ANY, element=float, tuned=True),
        Key("affine", True, "mode shared: a learned scale and offset between the two labels"),
        Key("serve", "user", "mode aux: the heads that rank (user, teacher, blend)", sweep="no",
            may_differ=True),
        influences="student",
        sweep="runs",
    ),
    section("optimizer", *_OPTIMIZER, influences="student", sweep="runs", tuned=True),
    section(
        "train",
        *_TRAIN,
        Key("user_loss", "bce", "on user labels; bce+softmax: the sum of both", USER_LOSSES,
            column="user_loss"),
        Key("unshown_weight", 0.0, "label weight of an unshown candidate as a negative of every "
            "task; 0: not used", label="unshown", column="unshown_weight", tuned=True, switch=True,
            logarithmic=True),
        Key("unshown_margin", 0.0, "an unshown candidate is no negative of a task if the teacher's "
            "probability is above 1 − margin times its mean over the shown; 0: all are negatives",
            BELOW_ONE, tuned=True, switch=True),
        influences="student",
        sweep="runs",
    ),
    section(
        "teacher",
        Key("source", "live", "of its labels: scored in the step, or logged with the dataset",
            TEACHER_SOURCES),
        Key("workdir", "", "of train_teacher; with source logged, \"\" takes the dataset's logs",
            may_differ=True),
        Key("stage", "retrieved", "the candidates with teacher labels in training", TEACHER_STAGES,
            sweep="cohorts"),
        Key("flops_per_candidate", 0.0, "of a logged teacher from elsewhere; 0: those of the model "
            "that teacher.* describes", influences="report"),
        influences="student",
    ),
    section(
        "costs",
        Key("teacher.candidate", 0.0,
            "of a candidate, in your own unit, for the savings; 0: FLOPs are the unit"),
        Key("teacher.request", 0.0, "of a request, in addition to its candidates"),
        Key("student.candidate", 0.0,
            "of a candidate; 0: the teacher's times the ratio of their FLOPs"),
        Key("student.request", 0.0, "of a request, in addition to its candidates"),
        Key("rivals", ConfigDict(), "of a candidate, by the family of a rival, or of incumbent",
            later=True),
        influences="report",
    ),
    section(
        "report",
        Key("margin", 0.002, "relative loss of user value that counts as none in choosing methods"),
        influences="report",
    ),
    section(
        "teacher",
        Key("log_weight", 0.0, "weight in its training of the loss on logged teacher "
            "probabilities; 0: only user labels"),
        Key("name", "final_ranker", "the architecture", TEACHERS),
        Key("attention_hidden", 16, "units of the attention over the history", POSITIVE),
        Key("cross_layers", 2, "cross layers"),
        Key("experts", 4, "experts of the mixture", POSITIVE),
        Key("expert_hidden", 64, "hidden units of an expert", POSITIVE),
        *_MODEL,
        influences="teacher",
    ),
    section(
        "teacher.batch",
        *_batch(requests=128, candidates=10, passed_share=1.0),
        influences="teacher",
    ),
    section("teacher.optimizer", *_OPTIMIZER, influences="teacher", tuned=True),
    section("teacher.train", *_TRAIN, influences="teacher"),
    section(
        "evaluation",
        Key("requests", 16, "requests of a batch", POSITIVE, influences="nothing"),
        Key("limit", 0, "requests of a split to read; 0 reads all"),
        influences="report",
    ),
    section(
        "parallel",
        Key("mapping", "auto", "of a step over devices; auto: shard_map on TPUs and where pmap "
            "cannot, else pmap", MAPPINGS),
        Key("devices", 0, "devices to use; 0 takes all"),
        Key("runs", 0, "of these, the number to spread a sweep's runs over, while the others "
            "share the requests; 0: by their numbers"),
        Key("tables", "replicated", "replicated: each device holds all tables and items; sharded: "
            "of those that share requests, each holds a share of the rows", TABLES),
        Key("processes", False,
            "several processes train as one; Slurm, Open MPI, a pod or variables define them"),
        Key("deterministic", False,
            "on GPUs, the same bits each time that a step is taken, which costs sorts"),
        Key("row_kernel", False,
            "on TPUs, Adam updates rows of tables in a Pallas kernel; never timed on a chip"),
        influences="nothing",
    ),
    section(
        "ray",
        Key("address", "auto", "of the cluster; auto: that of this machine"),
        Key("cpus", 1, "CPU cores of a task"),
        Key("gpus", 0, "GPUs of a task"),
        Key("retries", 3, "times that a task may lose its machine"),
        influences="nothing",
    ),
    section(
        "sweep",
        Key("runs", (), "the list of runs, each a dict of values by key; the function sweep of a "
            "config file yields them", element=dict),
        Key("modes", (), "values of distill.mode, for each run; () leaves it to the runs, and "
            "without any takes all modes", MODES, element=str),
        Key("weights", (), "values of distill.weight, for each run; () leaves it to the runs",
            element=float),
        Key("seeds", (), "values of seed, for each run; () leaves it to the runs", element=int),
        Key("search", "grid", "the settings of each method: all combinations of the values of its "
            "tuned keys, random draws of them, or rounds of draws by a sampler of Optuna, an extra",
            SEARCHES),
        Key("draws", 8, "settings of each method that a search draws", POSITIVE),
        Key("draw_seed", 0, "of a search"),
        Key("round", 4, "with optuna, settings of each method that are drawn and train together",
            POSITIVE),
        Key("sampler", "tpe", "of Optuna; gp needs the package torch",
            OPTUNA_SAMPLERS),
        Key("rivals", (), "rankers of other architectures to compare with the students",
            RIVALS, element=str, may_differ=True, later=True),
        Key("halving", (), "steps after which the worse half of each method's settings stops, by "
            "train.eval_limit validation requests; () for none", POSITIVE, element=int,
            influences="student"),
        Key("cohort_size", 0, "runs that train in one program; 0: as many as memory allows"),
        Key("whole_repeats", False, "each seed also sets the order of the data, and has a separate "
            "teacher", influences="student", may_differ=True),
        Key("extend", False, "add the runs that a finished sweep does not have yet"),
        Key("part", "", "of a sweep of several runs: plan settles the cohorts, a number trains one "
            "of them, join measures and joins all"),
        influences="nothing",
    ),
)  # fmt: skip

KEYS: dict[str, Key] = {key.name: key for keys in _ALL for key in keys}
"""The keys of every config, by name. A program may add keys for its own models and losses."""


def _of_source(*keys: Key) -> dict[str, Key]:
    return {key.name: key for key in section("data", *keys, influences="dataset")}


_CASCADE = _of_source(
    Key("num_users", 4000, "users", POSITIVE),
    Key("num_items", 8000, "items", POSITIVE),
    Key("num_topics", 8, "topics of items, and of users' interests", POSITIVE),
    Key("taste", 0.0, "weight of personal taste, beyond interests and session"),
    Key("noise", 1.0, "scale of the errors of the production final ranker", later=True),
    Key(
        "hint",
        0.0,
        "correlation of one more feature of candidates with the final ranker's order",
        SHARE,
        later=True,
    ),
    Key("train_requests", 12000, "requests of the training split"),
    Key("validation_requests", 500, "requests of the validation split", POSITIVE),
    Key("test_requests", 500, "requests of the test split"),
    Key("exploration", 0.3, "share of the shown slots filled at random from the passed", SHARE),
    Key("fault_missing", 0.02, "share of the teacher probabilities never written", SHARE),
    Key("fault_nan", 0.01, "share of them that is NaN", SHARE),
    Key("fault_out_of_range", 0.01, "share of them that lies outside [0, 1]", SHARE),
    Key("fault_version", 0.05, "share of the requests that an older teacher scored", SHARE),
)

_LOG = _of_source(
    Key("sql", "", "in place of data.path: a SELECT that DuckDB runs; its rows are the log",
        may_differ=True),
    Key("extends", "", "data.dir of the dataset that the new files of the log extend; \"\" reads "
        "the whole log", influences="nothing"),
    Key("title", "", "name of the log in the report; \"\": parquet", influences="nothing"),
    Key("rows", "candidate", "one row per candidate, or one per request with lists", layout.ROWS),
    Key("columns", ConfigDict(), "column by role; request, time and item are required"),
    Key("stages", ConfigDict(), "texts of the stage column by stage; commas between them"),
    Key("labels", ConfigDict(), "column by task: 0 or 1, for shown candidates"),
    Key("teacher", ConfigDict(), "column by task of the teacher that was logged"),
    Key("teacher_version", "", "the only version of the teacher that counts; \"\" takes all"),
    Key("teacher_signal", "probability", "content of the teacher's columns", TEACHER_SIGNALS),
    Key("incumbent_signal", "score", "content of the incumbent's column: scores, higher first, or "
        "positions, smallest first", layout.INCUMBENT_SIGNALS),
    Key("time_unit", "s", "of a time column of numbers", layout.TIME_UNITS),
    Key("time_format", "", "of a time column of texts, as for strptime; \"\": ISO 8601"),
    Key("features", ConfigDict(), "feature by name, see `kd_ranker.config.defaults.feature`"),
    Key("split", "time", "what decides the split of a request", layout.SPLIT_BY),
    Key("validation_share", 0.1, "share of the requests for the validation", INSIDE_ONE),
    Key("test_share", 0.1, "share of the requests for the test", INSIDE_ONE),
    Key("allow", (), "expected findings, which do not prevent a dataset", layout.ALLOWABLE,
        element=str, influences="nothing"),
    Key("longest_request", 3600, "seconds between the first and the last row of a request"),
    Key("strict", False, "end the build at the first row at fault"),
    Key("infer", False, "write a first config for the log in place of the dataset",
        influences="nothing"),
    Key("memory", 4.0, "GiB that the engine which reads the log holds in memory; more goes to disk",
        POSITIVE, influences="nothing"),
    Key("engine", "duckdb", "what reads the log: in this process, or for one that outgrows it",
        layout.ENGINES, influences="nothing"),
    Key("spark_master", "local[*]", "where Spark works, as `spark://host:7077`",
        influences="nothing"),
    Key("spark_options", (), "settings of Spark's session, as `spark.executor.memory=8g`",
        element=str, influences="nothing"),
)  # fmt: skip

# A public dataset is converted to a log, and the converter knows its rows.
_OWN = ("data.infer", "data.extends", "data.sql", "data.rows", "data.stages", "data.time_format")
_CONVERTED = {name: key for name, key in _LOG.items() if name not in _OWN} | _of_source(
    Key("split", "column", "what decides the split of a request; column: the converter of the "
        "files, or a hash of the request where these have no splits", layout.SPLIT_BY),
)  # fmt: skip

_RATINGS = _CONVERTED | _of_source(
    Key("ratings_per_request", 8,
        "the least ratings of a request, of the last one of a user half of it", POSITIVE),
    Key("validation_share", 0.1,
        "share of each user's ratings, those before the test ones, for the validation", INSIDE_ONE),
    Key("validation_requests_per_user", 1,
        "validation requests a user, the earliest ones; 0 takes all"),
    Key("test_share", 0.2, "share of each user's ratings, the last ones, for the test", BELOW_ONE),
    Key("test_requests_per_user", 1, "test requests a user, the earliest ones; 0 takes all"),
)  # fmt: skip

_SAMPLED_RATINGS = _RATINGS | _of_source(
    Key("negatives", 500, "candidates drawn from items that the user had not rated; 0 takes all"),
    Key("max_users", 0, "users, drawn at random, who make requests; 0 takes all"),
)  # fmt: skip

_KUAIRAND = _CONVERTED | _of_source(
    Key("session_minutes", 30, "the pause that ends a session", POSITIVE),
    Key("random_session_minutes", 720, "the same of random impressions, which are few", POSITIVE),
    Key("impressions_per_request", 10, "the most impressions of one request", POSITIVE),
    Key("negatives", 90, "candidates that were not shown"),
    Key("test", "random", "videos shown at random, or those that the app's policies chose",
        kuairand.TESTS),
    Key("validation_from", "2022-04-22", "the first day of the validation, in Beijing"),
    Key("test_from", "2022-04-29", "the first day of the test, in Beijing"),
    Key("train_requests", 200_000, "training requests, drawn uniformly; 0 takes all"),
    Key("validation_requests", 5_000, "validation requests, drawn uniformly; 0 takes all"),
    Key("test_requests", 10_000, "test requests, drawn uniformly; 0 takes all"),
    Key("max_users", 0, "users to keep of the logs; 0 keeps all"),
)  # fmt: skip

_RECFLOW = _CONVERTED | _of_source(
    Key("train_days", (), "days of the training split, like 2024-02-17", element=str),
    Key("validation_days", (), "days of the validation split", element=str),
    Key("test_days", (), "days of the test split", element=str),
    Key("max_requests_per_day", 0, "requests to draw of each day; 0 takes all"),
    Key("of_each_stage", 0,
        "candidates of each of rank_pos, rank_neg, coarse_neg, prerank_neg; 0 takes all rows"),
)  # fmt: skip

_RANKING_FILES = _CONVERTED | _of_source(
    Key("splits", ConfigDict(dict(train="train", validation="vali", test="test")),
        "the word that replaces {split} in the names of files, by split"),
    Key("grades", (1,), "a label per number: is the grade at least this?", element=int),
)  # fmt: skip

_LETOR = _RANKING_FILES | _of_source(
    Key("documents", "{split}.txt", "the files of LETOR lines, below data.path"),
    Key("scores", "", "the files of the final ranker's scores, one per line; \"\": none"),
    Key("num_features", 46, "features of a document", POSITIVE),
    Key("sparse", False, "lines may omit features that are 0"),
)  # fmt: skip

_TREC = _RANKING_FILES | _of_source(
    Key("qrels", "qrels.txt", "the file of grades, below data.path"),
    Key("runs", ConfigDict(), "the run files by names of your own"),
    Key("final", "", "the run of the final ranker; \"\": none"),
)  # fmt: skip

_GIVEN = _of_source(Key("labels", ConfigDict(), "the tasks of the requests, each by its name"))

DATA_KEYS: dict[str, dict[str, Key]] = {
    "cascade": _CASCADE,
    "movielens_100k": _RATINGS,
    "movielens_1m": _SAMPLED_RATINGS,
    "movielens_32m": _SAMPLED_RATINGS,
    **{f"kuairand_{variant}": _KUAIRAND for variant in kuairand.VARIANTS},
    "filmsearch": _CONVERTED,
    "letor": _LETOR,
    "trec": _TREC,
    "recflow": _RECFLOW,
    "parquet": _LOG,
    in_memory.NAME: _GIVEN,
}
"""By `data.name`, the keys of `config.data` that only this source has."""
