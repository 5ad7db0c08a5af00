"""Which configs are valid, and the line that names what is wrong with the others."""

import dataclasses
import functools
import itertools
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from kd_ranker import configs
from kd_ranker.config import checks
from kd_ranker.config.keys import DATA_KEYS, KEYS, Bound
from kd_ranker.config.runs import sweep_runs
from kd_ranker.configs import cascade, parquet
from kd_ranker.requests.request import SPLITS
from kd_ranker.requests.row_files import columns_of
from kd_ranker.sources.registry import SOURCES
from tests.faults import fault_of
from tests.random_batches import SPEC
from tests.requests.random_requests import random_source

VARIANTS = {
    "cascade": ("", "small"),
    "sweeps.cascade": ("", "paper", "live", "sizes", "small"),
    "recflow": ("", "small", "lcron"),
    "kuairand": ("", "1k", "27k"),
    "letor": ("", "mslr", "istella_scores"),
    "movielens": ("", "1m", "32m"),
    "ebnerd": ("",),
    "trec": ("",),
}


def config_with(changes):
    config = cascade("small")
    config.update_from_flattened_dict(changes)
    return config


def check(config):
    checks.validate(config)
    checks.check_students(sweep_runs(config).values())


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name, variants in VARIANTS.items() for variant in variants],
)
def test_the_configs_are_valid(name, variant):
    get_config = functools.reduce(getattr, name.split("."), configs)
    check(get_config(variant) if variant else get_config())


ALL_KEYS = [*KEYS.values(), *(key for keys in DATA_KEYS.values() for key in keys.values())]


def test_defaults_are_valid_and_keys_are_described():
    for key in ALL_KEYS:
        if key.name != "data.name":
            key.check(key.default)
        assert key.help, key.name
        assert not key.help.endswith("."), key.name
        assert key.influences, key.name
        assert key.sweep, key.name
        assert isinstance(key.allowed, Bound) <= (key.type in (int, float)), key.name


@pytest.mark.parametrize(
    "changes",
    [
        {"distill.loss": "ranknet", "distill.top_k": 32},
        {"distill.loss": "topk", "distill.top_k": 31},
        # A sweep's runs may be spread so that the requests fit.
        {"batch.requests": 6, "parallel.runs": 4},
        {"sweep.modes": (), "sweep.weights": (), "sweep.seeds": ()},
    ],
)
def test_values_at_the_limit_are_valid(changes):
    check(config_with(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill.mode": "auxx"}, "distill.mode='auxx' does not exist; choose one of: aux, none"),
        ({"data.name": "netflix"}, ", ".join(sorted(SOURCES))),
        ({"distill.loss": "bce + l2"}, "'bce + l2': loss='l2' does not exist; choose one of"),
        ({"distill.loss": "bce:rank"}, "'bce:rank': signal='rank' does not exist; choose one of"),
        ({"distill.loss": "bce+"}, "'bce+': loss='' does not exist; choose one of"),
        ({"distill.loss": "x * bce"}, "'x * bce': the weight 'x' is not a number of at least 0"),
        ({"distill.loss": "-1 * bce"}, "the weight '-1' is not a number of at least 0"),
        ({"distill.loss": "nan * bce"}, "the weight 'nan' is not a number of at least 0"),
        ({"distill.serve": "nope"}, "distill.serve='nope' does not exist; choose one of: blend"),
        ({"data.history_length": 10**22}, "history_length has 10000000000000000000000; it takes"),
        ({"seed": 2**63}, "seed has 9223372036854775808; it takes whole numbers below 2^63"),
        ({"distill.weight": float("nan")}, "distill.weight has nan; it takes numbers ≥ 0"),
        ({"student.hidden": (16, -1)}, "student.hidden has -1; it takes whole numbers > 0"),
        ({"sweep.seeds": (0, 0.5)}, "sweep.seeds has 0.5; it takes whole numbers"),
        ({"sweep.seeds": (True,)}, "sweep.seeds has True"),
        ({"distill.loss": "topk", "distill.top_k": 32}, "top_k=32 takes in all batch.candidates"),
        ({"train.unshown_margin": 1.0}, "train.unshown_margin has 1.0; it takes numbers in [0, 1)"),
        ({"train.unshown_margin": -0.1}, "train.unshown_margin has -0.1; it takes numbers in [0,"),
        ({"tasks": ("watch", "buy", "like")}, "'buy' does not exist; choose one of: like, share"),
        ({"tasks": ("like", "like", "share")}, "must name one task or more, none of them twice"),
        ({"value_weights": (0.0, 0.0, 0.0)}, "('watch', 'like', 'share'), not all 0"),
        ({"sweep.part": "1.5"}, "sweep.part='1.5' must be plan"),
        (
            {"sweep.halving": (5, 20)},
            "sweep.halving=(5, 20) must be before the last step of every run, and one takes 20",
        ),
        (
            {"sweep.halving": (5,), "sweep.whole_repeats": True},
            "sweep.halving compares settings over their repeats; leave one of them out",
        ),
        (
            {"sweep.search": "random", "sweep.ranges.distill.weight": (3.0, 0.3)},
            "sweep.ranges.distill.weight=(3.0, 0.3) must be two numbers, the smaller one first",
        ),
        (
            {"sweep.search": "random", "sweep.ranges.optimizer.learning_rate": (0.0, 0.1)},
            "sweep.ranges.optimizer.learning_rate=(0.0, 0.1) is drawn by its logarithm; begin abov",
        ),
        (
            {"sweep.ranges.train.steps": (100, 300)},
            "sweep.ranges.train.steps=(100, 300) is for sweep.search='random' or 'optuna'; set one",
        ),
        ({"data.dir": "gs://bucket/data"}, "datasets need a folder of this machine"),
        ({"parallel.devices": 99}, "parallel.devices=99, but there are 8; 0 takes all"),
        ({"parallel.runs": 3}, "=3 does not divide the 8 devices"),
        ({"parallel.runs": 2, "sweep.axes.batch.requests": (8, 6)}, "=6 cannot be shared by 4"),
        ({"teacher.batch.requests": 9}, "teacher.batch.requests=9 cannot be shared by 8 devices"),
        ({"parallel.runs": 2, "parallel.mapping": "pmap"}, "take 'auto' or 'shard_map'"),
        ({"parallel.processes": True, "parallel.devices": 2}, "parallel.devices=2 some of them"),
        ({"funnel.passed": 200}, "each must be at most the next"),
        ({"funnel.report_at": (10, 101)}, "above funnel.retrieved=100; leave that"),
        ({"costs.student.candidate": 0.1}, "costs.teacher.candidate=0 takes FLOPs; set that as"),
        (
            {
                "costs.teacher.candidate": 2.0, "costs.student.candidate": 0.1,
                "sweep.axes.student.width": (8, 16),
            },
            "costs.student.candidate=0.1 is of one student, and the runs of the sweep have several",
        ),
    ],
)  # fmt: skip
def test_each_fault_is_one_line_that_says_what_to_change(changes, message):
    assert message in fault_of(check, config_with(changes))


@pytest.mark.parametrize(
    ("get_config", "changes", "message"),
    [
        (cascade, {"exploration": 1.5}, "data.exploration has 1.5; it takes numbers in [0, 1]"),
        (parquet, {"split": "item"}, "choose one of: column, request, time, user"),
        (parquet, {"extends": "old", "split": "user"}, "data.extends needs data.split='time'"),
    ],
)  # fmt: skip
def test_a_fault_of_a_source_is_one_line_before_it_is_opened(get_config, changes, message):
    config = get_config()
    config.data.update(changes)
    assert message in fault_of(check, config)


def test_a_single_students_batch_is_shared_by_all_devices():
    config = config_with({"batch.requests": 6})
    fault = fault_of(checks.validate, config, single=True)
    assert "batch.requests=6 cannot be shared by 8 devices; take a mult" in fault
    config.update_from_flattened_dict({"parallel.devices": 3, "teacher.batch.requests": 9})
    checks.validate(config, single=True)


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no tpu (set JAX_PLATFORMS='')")])
def test_a_platform_that_is_not_there_is_one_line(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    fault = fault_of(check, config_with({}))
    assert fault.startswith("JAX_PLATFORMS=")
    assert fault.endswith("here and the CPU, as in JAX_PLATFORMS=cuda,cpu")


def test_a_config_file_has_all_keys_and_no_others():
    config = cascade()
    config.distill.wieght = 3.0
    fault = fault_of(check, config)
    assert "'distill.wieght' does not exist; did you mean 'distill.weight'?" in fault
    fault = fault_of(checks.check_key, config, "data.teacher.like")
    assert """name all tasks at once: --config.data.teacher="{'like': 'COLUMN'}\"""" in fault
    del config.distill["wieght"], config.train["steps"]
    assert "lacks train.steps: it is of another version" in fault_of(check, config)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("bogus", "docs/config.md lists the keys"),
        ("train.step", "did you mean 'train.steps'?"),
        ("affine", "did you mean 'distill.affine'?"),
        ("learning_rate", "'optimizer.learning_rate' or 'teacher.optimizer.learning_rate'"),
    ],
)
def test_an_unknown_key_is_named_whole_with_a_hint(key, hint):
    fault = fault_of(checks.check_key, config_with({}), key)
    assert fault.startswith(f"config key {key!r} does not exist; ")
    assert hint in fault


def test_an_unknown_variant_names_those_that_exist():
    assert "no variant :huge; the variants are: :items, :small" in fault_of(cascade, "huge")


# Logs that students and teachers may learn from; `test_commands` has the rest.

REQUESTS = list(itertools.islice(random_source().requests("train"), 3))


def with_one_stage(request, size):
    """The request as in a log that records one stage only, of `size` candidates."""
    return dataclasses.replace(
        request,
        num_passed=size,
        user_label=np.zeros((size, 3), np.uint8),
        label_weight=np.ones(size, np.float32),
    )


def without_scores_of_like(request):
    probability = np.where([True, False, True], request.teacher_probability, np.nan)
    return dataclasses.replace(request, teacher_probability=probability)


OLDER, UNWRITTEN, WRONG = REQUESTS
NO_TEACHER = [
    dataclasses.replace(OLDER, teacher_version="v0"),
    dataclasses.replace(UNWRITTEN, teacher_weight=np.zeros_like(UNWRITTEN.teacher_weight)),
    dataclasses.replace(WRONG, teacher_probability=np.full_like(WRONG.teacher_probability, 1.5)),
]
ALL_SHOWN = [with_one_stage(request, len(request.item_id)) for request in REQUESTS]
NOTHING_SHOWN = [with_one_stage(request, 0) for request in REQUESTS]
PASSED_ARE_SHOWN = [
    dataclasses.replace(request, num_passed=len(request.user_label)) for request in REQUESTS
]
LIKE_UNSCORED = [without_scores_of_like(request) for request in REQUESTS]


def check_with_log(*changes_of_runs, log=REQUESTS, signal="probability"):
    runs = [config_with({"distill.mode": "aux"} | changes) for changes in changes_of_runs]
    checks.check_students(runs)
    spec = dataclasses.replace(SPEC, teacher_signal=signal, teacher_version="v1")
    dataset = SimpleNamespace(spec=spec, columns={"train": columns_of(log, spec)})
    checks.check_teacher_signals(dataset, runs)


LOGGED = {"teacher.source": "logged"}
STAGE = {"distill.loss": "bce:stage"}
RANKS = {"signal": "rank"}
TOPK_STAGE = {"distill.loss": "topk:stage"}
NONE = {"distill.mode": "none"}
ORDER = "bce needs the teacher's probabilities, and stages are an order; take one of: adr_mse"
PASSED = {"teacher.stage": "passed"}
HARD = {"batch.sampler": "hard"}
MARGIN = {"train.unshown_weight": 0.1, "train.unshown_margin": 0.2}
SHOWN = {"teacher.stage": "shown"}


@pytest.mark.parametrize(
    ("changes", "log", "message"),
    [
        # Positions where a loss needs probabilities.
        (LOGGED, RANKS, r"'bce': bce needs .* its positions; .*softmax.*distill\.mode=none"),
        (LOGGED | {"distill.loss": "softmax"}, RANKS, None),
        (LOGGED | {"distill.loss": "topk:stage"}, RANKS, None),
        (LOGGED, {}, None),
        # Stages where a loss needs probabilities, each term with its own signal.
        (STAGE, {}, f"distill.loss='bce:stage': {ORDER}"),
        ({"distill.loss": "bce:scores"}, {}, None),
        ({"distill.loss": "softmax + bce:stage"}, {}, rf"'softmax \+ bce:stage': {ORDER}"),
        # Stages that do not differ.
        ({"distill.loss": "bce + topk:stage"}, {}, None),
        ({"distill.loss": "bce + topk:stage"}, {"log": ALL_SHOWN}, "signal stage is constant"),
        (TOPK_STAGE, {"log": NOTHING_SHOWN}, "the signal stage is constant: all candidates of a"),
        (TOPK_STAGE, {"log": [*ALL_SHOWN, REQUESTS[0]]}, None),
        # A teacher without candidates of its stage.
        (PASSED, {"log": PASSED_ARE_SHOWN}, r"^teacher\.stage=passed: in the training .* has pass"),
        (PASSED, {"log": [*PASSED_ARE_SHOWN, REQUESTS[0]]}, None),
        # A log without a teacher, or without its number of a task.
        (LOGGED, {"log": NO_TEACHER}, "the signal scores is missing: no training request"),
        (LOGGED | TOPK_STAGE, {"log": NO_TEACHER}, None),
        (LOGGED, {"log": LIKE_UNSCORED}, "value_weights gives like a weight, and no training"),
        (LOGGED | {"value_weights": (1.0, 0.0, 4.0)}, {"log": LIKE_UNSCORED}, None),
        # A sampler without its scores.
        (HARD, {"log": NO_TEACHER}, r"batch\.sampler=hard needs teacher .*funnel or uniform$"),
        (HARD, {}, None),
        # A margin without negatives, without scores of them, or without probabilities.
        (MARGIN, {}, None),
        (NONE | MARGIN | LOGGED, {}, None),
        (MARGIN | {"train.unshown_weight": 0.0}, {}, "=0.2 drops unshown .*unshown_weight=0 uses"),
        (MARGIN | SHOWN, {}, "=0.2 needs .*of unshown candidates, and teacher.stage=shown leaves"),
        (NONE | MARGIN | LOGGED, RANKS, "=0.2 compares .*probabilities, and the log .*positions"),
        (NONE | MARGIN | LOGGED, {"log": NO_TEACHER}, "signal scores is missing"),
        (NONE | MARGIN | PASSED, {"log": PASSED_ARE_SHOWN}, r"^teacher\.stage=passed: in the"),
        # Nothing to learn from.
        ({"distill.user_weight": 0.0, "distill.weight": 0.0}, {}, "leave a student nothing"),
        (NONE | {"distill.user_weight": 0.0, "distill.weight": 0.0}, {}, None),
    ],
)
def test_a_student_learns_from_a_log_that_has_its_signals(changes, log, message):
    # The baseline needs nothing of it.
    baseline = changes | NONE | {"train.unshown_margin": 0.0}
    if message is None:
        check_with_log(baseline, changes, **log)
    else:
        assert re.search(message, fault_of(check_with_log, baseline, changes, **log))


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_needs_a_label(split):
    def dataset_of(weight, requests=REQUESTS):
        weighted = [
            dataclasses.replace(request, label_weight=np.full_like(request.label_weight, weight))
            for request in requests
        ]
        columns = dict.fromkeys(SPLITS, columns_of(REQUESTS, SPEC))
        columns[split] = columns_of(weighted, SPEC)
        return SimpleNamespace(columns=columns, spec=dataclasses.replace(SPEC, dataset="cascade"))

    checks.check_labels(dataset_of(0.5))
    for dataset in (dataset_of(0), dataset_of(1, NOTHING_SHOWN)):
        fault = fault_of(checks.check_labels, dataset)
        assert fault.startswith(f"no {split} request has a user label; ")


def test_a_teacher_learns_from_a_log_only_by_its_probabilities():
    config = cascade("small")
    config.teacher.log_weight = 1.0
    spec = dataclasses.replace(SPEC, teacher_version="v1")
    checks.check_teacher_log(config, SimpleNamespace(spec=spec))
    for change in ({"teacher_signal": "rank"}, {"teacher_version": ""}):
        dataset = SimpleNamespace(spec=dataclasses.replace(spec, **change))
        fault = fault_of(checks.check_teacher_log, config, dataset)
        assert "teacher.log_weight=1 needs teacher probabilities" in fault
        checks.check_teacher_log(cascade("small"), dataset)
