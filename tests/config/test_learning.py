"""What students and teachers may learn from which log; `test_commands` has the rest."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from kd_ranker import api
from kd_ranker.config import checks
from kd_ranker.configs import cascade
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import columns_of
from kd_ranker.requests.request import SPLITS
from tests.random_batches import SPEC
from tests.requests.random_requests import random_source

REQUESTS = list(itertools.islice(random_source().requests("train"), 3))


def config_with(**changes):
    config = cascade("small")
    config.distill.mode = "aux"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def check_all(config, *members, signal="probability", log=REQUESTS):
    members = members or (config,)
    checks.check_students(members)
    spec = dataclasses.replace(SPEC, teacher_signal=signal, teacher_version="v1")
    dataset = SimpleNamespace(spec=spec, columns={"train": columns_of(log, spec)})
    checks.check_teacher_signals(dataset, members)


def check(*modes, source="logged", signal="rank", loss="bce", learns_from="logged"):
    config = config_with(teacher__source=source, teacher__signal=learns_from, distill__loss=loss)
    members = []
    for mode in modes:
        members.append(config.copy_and_resolve_references())
        members[-1].distill.mode = mode
    check_all(config, *members, signal=signal)


@pytest.mark.parametrize("mode", ["aux", "shared"])
def test_a_loss_that_needs_probabilities_is_refused_where_positions_were_logged(mode):
    with pytest.raises(UserError) as caught:
        check("none", mode)
    message = str(caught.value)
    assert "\n" not in message
    assert "distill.loss=bce" in message
    assert "distill.mode=none" in message


def test_each_of_several_terms_is_held_against_its_own_signal():
    check_all(config_with(distill__terms=("bce", "softmax:stage")))
    with pytest.raises(UserError, match=r"distill\.terms=bce needs .* stages are an order"):
        check_all(config_with(distill__terms=("softmax", "bce:stage")))


def test_a_loss_is_held_against_the_signal_that_it_names():
    check_all(config_with(distill__loss="topk:stage"), signal="rank")
    check_all(config_with(distill__loss="bce:logged", teacher__signal="stage"))
    with pytest.raises(UserError, match=r"distill\.loss=bce needs .* stages are an order"):
        check_all(config_with(distill__loss="bce:stage"))


@pytest.mark.parametrize("source", ["live", "logged"])
@pytest.mark.parametrize("loss", ["bce", "mse_logit", "mse_margin"])
def test_a_loss_that_needs_probabilities_is_refused_where_stages_are_the_signal(source, loss):
    with pytest.raises(UserError) as caught:
        check("none", "aux", source=source, signal="probability", loss=loss, learns_from="stage")
    message = str(caught.value)
    assert "\n" not in message
    assert f"distill.loss={loss} needs the teacher's probabilities" in message
    assert "and stages are an order; choose one of: distill.loss=approx_ndcg" in message
    check("none", source=source, loss=loss, learns_from="stage")
    check("aux", source=source, loss="softmax", learns_from="stage")


def test_a_loss_is_not_refused_without_need():
    check("none")
    check("aux", source="live")
    check("aux", signal="probability")


def test_a_loss_of_the_order_takes_positions_and_is_what_the_message_offers(monkeypatch):
    monkeypatch.setitem(checks.LOSSES, "order", checks.LOSSES["softmax"])
    check("aux", loss="order")
    with pytest.raises(UserError, match=r"choose one of: .*distill\.loss=order"):
        check("aux")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"distill__weight": 0.0}, "distill.weight"),
        ({"distill__term_weights": (0.0,)}, "distill.term_weights"),
        ({"distill__terms": ("bce", "topk"), "distill__term_weights": (0.0, 0.0)}, "term_weights"),
    ],
)
def test_a_student_has_something_to_learn_from(changes, key, tmp_path):
    config = config_with(distill__user_weight=0.0, **changes)
    with pytest.raises(UserError, match=rf"distill.user_weight=0 and .*{key}=0 leave a student of"):
        api.train(config, tmp_path / "refused")
    check_all(config_with(distill__user_weight=0.5, **changes))
    check_all(config_with(**changes | {"distill__mode": "none", "distill__user_weight": 0.0}))
    check_all(config_with(distill__user_weight=0.0, distill__term_weights=()))


def test_a_sweep_has_no_student_without_anything_to_learn_from(tmp_path):
    axes = {
        "sweep__modes": ("none", "aux"),
        "sweep__weights": (0.0, 1.0),
        "sweep__axes__distill__user_weight": (1.0, 0.0),
    }
    for command in (api.sweep, api.run):
        with pytest.raises(UserError, match=r"user_weight=0 and distill\.weight=0 leave a"):
            command(config_with(**axes), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def shown(request, of_all):
    """The request as a log has it that tells of no stage but one."""
    number = len(request.item_id) if of_all else 0
    return dataclasses.replace(
        request,
        num_passed=number,
        user_label=np.zeros((number, 3), np.uint8),
        label_weight=np.ones(number, np.float32),
    )


@pytest.mark.parametrize("of_all", [True, False])
def test_stages_that_a_log_lacks_are_no_signal(of_all):
    config = config_with(distill__terms=("bce", "topk:stage"))
    check_all(config)
    log = [shown(request, of_all) for request in REQUESTS]
    with pytest.raises(UserError, match="the signal stage is constant: all candidates of a"):
        check_all(config, log=log)
    check_all(config_with(distill__loss="bce"), log=log)
    check_all(config_with(distill__mode="none", teacher__signal="stage"), log=log)
    check_all(config, log=[*log, REQUESTS[0]])


@pytest.mark.parametrize("source", ["live", "logged"])
def test_a_teacher_needs_candidates_of_its_stage(source):
    def passed_are_shown(request):
        return dataclasses.replace(request, num_passed=len(request.user_label))

    log = [passed_are_shown(request) for request in REQUESTS]
    passed = config_with(teacher__stage="passed", teacher__source=source)
    check_all(passed)
    check_all(passed, log=[*log, REQUESTS[0]])
    with pytest.raises(
        UserError, match=r"^teacher\.stage=passed: in the training .* has passed as"
    ):
        check_all(passed, log=log)
    of_shown = config_with(teacher__stage="shown", teacher__source=source)
    nothing_shown = [shown(request, of_all=False) for request in REQUESTS]
    with pytest.raises(UserError, match=r"^teacher\.stage=shown: "):
        check_all(of_shown, log=nothing_shown)
    # Neither mode none nor stages need a teacher.
    check_all(config_with(teacher__stage="passed", distill__mode="none"), log=log)
    stages = config_with(teacher__stage="passed", distill__loss="topk", teacher__signal="stage")
    check_all(stages, log=log)
    check_all(config_with(teacher__stage="retrieved", teacher__source=source), log=log)


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
    nothing_shown = [shown(request, of_all=False) for request in REQUESTS]
    for dataset in (dataset_of(0), dataset_of(1, nothing_shown)):
        with pytest.raises(UserError, match=f"^no {split} request of cascade has a user label; "):
            checks.check_labels(dataset)


def test_a_teacher_that_a_log_lacks_is_no_signal():
    config = config_with(teacher__source="logged")
    check_all(config)
    older, unwritten, wrong = REQUESTS
    log = [
        dataclasses.replace(older, teacher_version="v0"),
        dataclasses.replace(unwritten, teacher_weight=np.zeros_like(unwritten.teacher_weight)),
        dataclasses.replace(
            wrong, teacher_probability=np.full_like(wrong.teacher_probability, 1.5)
        ),
    ]
    with pytest.raises(UserError, match="the signal logged is missing: no training request"):
        check_all(config, log=log)
    check_all(config_with(teacher__source="live"), log=log)
    stage = {"distill__loss": "topk", "teacher__signal": "stage"}
    check_all(config_with(teacher__source="logged", **stage), log=log)


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


def test_a_task_that_counts_in_the_value_must_have_been_scored():
    lacking = [
        dataclasses.replace(
            request,
            teacher_probability=np.where([True, False, True], request.teacher_probability, np.nan),
        )
        for request in REQUESTS
    ]
    check_all(config_with(value_weights=(1.0, 0.0, 4.0), teacher__source="logged"), log=lacking)
    weighted = config_with(value_weights=(1.0, 2.0, 4.0), teacher__source="logged")
    with pytest.raises(UserError, match="value_weights gives like the weight 2, and no training"):
        check_all(weighted, log=lacking)
    weighted.teacher.source = "live"
    check_all(weighted, log=lacking)
