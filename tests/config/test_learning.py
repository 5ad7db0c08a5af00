"""What students and teachers may learn from which log; `test_commands` has the rest."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from kd_ranker.config import checks
from kd_ranker.configs import cascade
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import columns_of
from kd_ranker.requests.request import SPLITS
from tests.random_batches import SPEC
from tests.requests.random_requests import random_source

REQUESTS = list(itertools.islice(random_source().requests("train"), 3))


def each(**fields):
    """The requests with fields that are computed from each of them."""
    return [
        dataclasses.replace(of, **{name: make(of) for name, make in fields.items()})
        for of in REQUESTS
    ]


def of_one_stage(size):
    """The requests as a log has them that records one stage only, of `size(request)` candidates."""
    return each(
        num_passed=size,
        user_label=lambda of: np.zeros((size(of), 3), np.uint8),
        label_weight=lambda of: np.ones(size(of), np.float32),
    )


OLDER, UNWRITTEN, WRONG = REQUESTS
NO_TEACHER = [
    dataclasses.replace(OLDER, teacher_version="v0"),
    dataclasses.replace(UNWRITTEN, teacher_weight=np.zeros_like(UNWRITTEN.teacher_weight)),
    dataclasses.replace(WRONG, teacher_probability=np.full_like(WRONG.teacher_probability, 1.5)),
]
ALL_SHOWN = of_one_stage(lambda of: len(of.item_id))
NOTHING_SHOWN = of_one_stage(lambda of: 0)
PASSED_ARE_SHOWN = each(num_passed=lambda of: len(of.user_label))
LIKE_UNSCORED = each(
    teacher_probability=lambda of: np.where([True, False, True], of.teacher_probability, np.nan)
)


def config_with(**changes):
    config = cascade("small")
    config.distill.mode = "aux"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def check(*members, log=REQUESTS, signal="probability"):
    checks.check_students(members)
    spec = dataclasses.replace(SPEC, teacher_signal=signal, teacher_version="v1")
    dataset = SimpleNamespace(spec=spec, columns={"train": columns_of(log, spec)})
    checks.check_teacher_signals(dataset, members)


LOGGED, STAGE = {"teacher__source": "logged"}, {"teacher__signal": "stage"}
RANKS = {"signal": "rank"}
TOPK, NONE = {"distill__loss": "topk"}, {"distill__mode": "none"}
ORDER = "needs the teacher's probabilities, and stages are an order; choose distill"
PASSED, HARD = {"teacher__stage": "passed"}, {"batch__sampler": "hard"}


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        # Positions where a loss needs probabilities.
        (LOGGED, RANKS, r"distill\.loss=bce needs .* its positions; .*softmax.*distill\.mode=none"),
        (LOGGED | {"distill__loss": "softmax"}, RANKS, None),
        (LOGGED | {"distill__loss": "topk:stage"}, RANKS, None),
        (LOGGED | NONE, RANKS, None),
        ({}, RANKS, None),
        (LOGGED, {}, None),
        # Stages where a loss needs probabilities, each term with its own signal.
        (STAGE, {}, f"distill.loss=bce {ORDER}.loss of: approx_ndcg"),
        (STAGE | LOGGED | {"distill__loss": "mse_logit"}, {}, f"distill.loss=mse_logit {ORDER}"),
        (STAGE | {"distill__loss": "bce:logged"}, {}, None),
        (STAGE | NONE, {}, None),
        ({"distill__loss": "bce:stage"}, {}, f"distill.loss=bce {ORDER}"),
        ({"distill__terms": ("bce", "softmax:stage")}, {}, None),
        ({"distill__terms": ("softmax", "bce:stage")}, {}, f"distill.terms=bce {ORDER}.terms of"),
        # Stages that do not differ.
        ({"distill__terms": ("bce", "topk:stage")}, {}, None),
        ({"distill__terms": ("bce", "topk:stage")}, {"log": ALL_SHOWN}, "signal stage is constant"),
        (STAGE | TOPK, {"log": NOTHING_SHOWN}, "the signal stage is constant: all candidates of a"),
        ({}, {"log": ALL_SHOWN}, None),
        (STAGE | TOPK, {"log": [*ALL_SHOWN, REQUESTS[0]]}, None),
        # A teacher without candidates of its stage.
        (PASSED, {"log": PASSED_ARE_SHOWN}, r"^teacher\.stage=passed: in the training .* has pass"),
        ({"teacher__stage": "shown"}, {"log": NOTHING_SHOWN}, r"^teacher\.stage=shown: "),
        (PASSED, {"log": [*PASSED_ARE_SHOWN, REQUESTS[0]]}, None),
        (PASSED | NONE, {"log": PASSED_ARE_SHOWN}, None),
        (PASSED | STAGE | TOPK, {"log": PASSED_ARE_SHOWN}, None),
        # A log without a teacher, or without its number of a task.
        (LOGGED, {"log": NO_TEACHER}, "the signal logged is missing: no training request"),
        ({}, {"log": NO_TEACHER}, None),
        (LOGGED | STAGE | TOPK, {"log": NO_TEACHER}, None),
        (LOGGED, {"log": LIKE_UNSCORED}, "value_weights gives like a weight, and no training"),
        (LOGGED | {"value_weights": (1.0, 0.0, 4.0)}, {"log": LIKE_UNSCORED}, None),
        ({}, {"log": LIKE_UNSCORED}, None),
        # A sampler without its scores.
        (HARD, {"log": NO_TEACHER}, r"batch\.sampler=hard needs teacher .*funnel or uniform$"),
        (HARD, {}, None),
        # Nothing to learn from.
        ({"distill__user_weight": 0.0, "distill__weight": 0.0}, {}, "leave a student nothing"),
        ({"distill__user_weight": 0.0, "distill__term_weights": (0.0,)}, {}, "leave a student"),
        ({"distill__user_weight": 0.5, "distill__weight": 0.0}, {}, None),
        (NONE | {"distill__user_weight": 0.0, "distill__weight": 0.0}, {}, None),
    ],
)
def test_a_student_learns_from_a_log_that_has_its_signals(changes, how, message):
    config = config_with(**changes)
    # The baseline needs nothing of it.
    members = [config_with(**changes | NONE), config]
    if message is None:
        check(*members, **how)
        return
    with pytest.raises(UserError, match=message) as caught:
        check(*members, **how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_needs_a_label(split):
    def dataset_of(weight, requests=REQUESTS):
        without = [
            dataclasses.replace(of, label_weight=np.full_like(of.label_weight, weight))
            for of in requests
        ]
        columns = dict.fromkeys(SPLITS, columns_of(REQUESTS, SPEC))
        columns[split] = columns_of(without, SPEC)
        return SimpleNamespace(columns=columns, spec=dataclasses.replace(SPEC, dataset="cascade"))

    checks.check_labels(dataset_of(0.5))
    for dataset in (dataset_of(0), dataset_of(1, NOTHING_SHOWN)):
        with pytest.raises(UserError, match=f"^no {split} request of cascade has a user label; "):
            checks.check_labels(dataset)


def test_a_final_ranker_learns_from_a_log_only_if_that_holds_probabilities():
    config = cascade("small")
    config.teacher.log_weight = 1.0
    spec = dataclasses.replace(SPEC, teacher_version="v1")
    checks.check_teacher_log(config, SimpleNamespace(spec=spec))
    for change in ({"teacher_signal": "rank"}, {"teacher_version": ""}):
        dataset = SimpleNamespace(spec=dataclasses.replace(spec, **change))
        with pytest.raises(UserError, match=r"teacher\.log_weight=1 needs teacher probabilities"):
            checks.check_teacher_log(config, dataset)
        checks.check_teacher_log(cascade("small"), dataset)
