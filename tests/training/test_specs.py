import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_ranker.batch import Stage
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.training import optimizers, specs
from kd_ranker.training.state import LiveTeacher
from tests.random_batches import SPEC
from tests.training.steps import config_of

NONE, AUX, SHARED = ({"distill__mode": mode} for mode in ("none", "aux", "shared"))
STAGES = AUX | {"distill__loss": "softmax:stage"}
UNSHOWN = NONE | {"train__unshown_weight": 0.1}
FAR_UNSHOWN = UNSHOWN | {"train__unshown_margin": 0.2}
POOLS = NONE | {"student__history": "mean"}


def stacks_of(runs):
    runs = {name: config_of(**changes) for name, changes in runs.items()}
    return specs.student_stacks(runs, SPEC)


def stack_of(**changes):
    (stack,) = stacks_of({"": changes})
    return stack


@pytest.mark.parametrize(
    ("runs", "teacher", "expected"),
    [
        ([NONE], None, (Stage.SHOWN, None, False)),
        ([SHARED], None, (Stage.SHOWN, Stage.PASSED, False)),
        ([NONE, AUX], None, (Stage.SHOWN, Stage.PASSED, False)),
        ([NONE, AUX], Stage.SHOWN, (Stage.SHOWN, None, True)),
        ([NONE, AUX], Stage.PASSED, (Stage.PASSED, None, True)),
        ([SHARED], Stage.RETRIEVED, (Stage.RETRIEVED, None, True)),
        # Stages and unshown negatives are of all candidates, and need no teacher.
        ([STAGES], None, (Stage.RETRIEVED, None, False)),
        ([STAGES, AUX], None, (Stage.RETRIEVED, Stage.PASSED, False)),
        ([STAGES, AUX], Stage.SHOWN, (Stage.RETRIEVED, None, True)),
        ([NONE, UNSHOWN], None, (Stage.RETRIEVED, None, False)),
        ([SHARED, UNSHOWN], Stage.PASSED, (Stage.RETRIEVED, None, True)),
        # A margin needs the scores, whatever the mode.
        ([FAR_UNSHOWN], None, (Stage.RETRIEVED, Stage.PASSED, False)),
        ([UNSHOWN, FAR_UNSHOWN], Stage.PASSED, (Stage.RETRIEVED, None, True)),
        ([NONE, POOLS], None, (Stage.SHOWN, None, True)),
    ],
)
def test_a_batch_needs_what_some_run_has_a_use_for(runs, teacher, expected):
    model, _ = specs.teacher_model(config_of(), SPEC)
    live = LiveTeacher(model, teacher) if teacher else None
    stacks = stacks_of(dict(enumerate(runs)))
    assert specs.needs(stacks, live, Stage.PASSED) == expected


def test_a_teacher_may_learn_from_the_log_by_its_user_logits():
    config = config_of()
    config.teacher.log_weight = 2.0

    stack = specs.teacher_stack(config, SPEC)

    (term,) = stack.hyperparameters.terms
    assert term.loss == "bce"
    assert term.signal == "scores"
    assert specs.needs([stack], None) == (Stage.SHOWN, Stage.RETRIEVED, True)
    assert stack.hyperparameters.user_weight == 1
    assert stack.hyperparameters.distill_weight == 2
    mode = stack.train_spec.mode
    logits = np.zeros((2, 3, 3))
    assert mode.user_logits(logits, {}) is logits
    assert mode.teacher_logits(logits, {}) is logits


def test_a_teacher_learns_from_labels_by_default():
    stack = specs.teacher_stack(config_of(), SPEC)

    assert specs.needs([stack], None) == (Stage.SHOWN, None, True)


@pytest.mark.parametrize("row_kernel", [True, False])
def test_teacher_and_students_take_the_kernel_of_the_config(row_kernel):
    config = config_of(parallel__row_kernel=row_kernel)
    (students,) = specs.student_stacks({"": config}, SPEC)
    teacher = specs.teacher_stack(config, SPEC)
    assert students.train_spec.row_kernel == teacher.train_spec.row_kernel == row_kernel


def names_of_stacks(**runs):
    return [stack.names for stack in stacks_of(runs)]


def test_runs_that_differ_in_traced_numbers_are_one_stack(monkeypatch):
    monkeypatch.setitem(LOSSES, "bce", LOSSES["bce"]._replace(numbers={"own": 1.0}))
    changes = {
        "seed": 3, "train__steps": 7, "distill__weight": 2.0, "distill__temperature": 3.0,
        "distill__top_k": 4, "distill__user_weight": 0.5,
        "distill__numbers": (6.0,),
        "train__unshown_weight": 0.7, "train__unshown_margin": 0.25,
        "optimizer__learning_rate": 0.1,
        "optimizer__weight_decay": 0.3, "optimizer__table_learning_rate": 0.2,
        "optimizer__table_weight_decay": 0.4,
    }  # fmt: skip
    assert {key.replace("__", ".") for key in changes} == set(specs.TRACED_KEYS)
    first = {"train__unshown_weight": 0.6, "train__unshown_margin": 0.1}
    runs = {key: first | {key: value} for key, value in changes.items()}
    assert names_of_stacks(first=first, **runs) == [("first", *changes)]
    numbers = stack_of(distill__mode="aux", **changes).hyperparameters
    numbers = [float(leaf[0]) for leaf in jax.tree.leaves(numbers)]
    assert sorted(numbers) == pytest.approx([0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1, 2, 3, 4, 6, 7])


def test_a_margin_of_zero_is_another_stack():
    runs = {
        f"margin{margin}": UNSHOWN | {"train__unshown_margin": margin} for margin in (0.0, 0.1, 0.3)
    }
    without, with_margin = stacks_of(runs)
    assert without.names == ("margin0.0",)
    assert with_margin.names == ("margin0.1", "margin0.3")
    assert not without.train_spec.drops_near_shown
    assert with_margin.train_spec.drops_near_shown
    np.testing.assert_allclose(with_margin.hyperparameters.unshown_margin, [0.1, 0.3])


@pytest.mark.parametrize(
    ("changes", "needed"),
    [(NONE, False), (UNSHOWN, False), (FAR_UNSHOWN, True), (STAGES, False), (AUX, True)],
)
def test_a_student_that_drops_negatives_by_scores_needs_them(changes, needed):
    assert specs.needs_scores(config_of(**changes)) == needed
    assert specs.learn_from_scores(stacks_of({"": changes})) == needed


def terms_of_stack(**changes):
    """The terms of the loss of a stack of one."""
    terms = stack_of(**changes).hyperparameters.terms
    return [(term.loss, term.signal, float(term.weight[0])) for term in terms]


def test_the_terms_of_a_student_are_those_of_its_config():
    text = "softmax + 0.5 * topk:stage"
    expected = [("softmax", "scores", 1.0), ("topk", "stage", 0.5)]
    assert terms_of_stack(distill__mode="aux", distill__loss=text) == expected


def test_a_mode_without_a_teacher_has_no_terms():
    assert terms_of_stack(distill__mode="none", distill__loss="softmax") == []


def test_weights_of_terms_are_traced_and_terms_are_not():
    losses = {"a": "softmax + topk:stage", "b": "softmax + 0.3 * topk:stage", "c": "softmax + topk"}
    runs = {name: AUX | {"distill__loss": loss} for name, loss in losses.items()}

    stack, second = stacks_of(runs)

    assert stack.names == ("a", "b")
    assert second.names == ("c",)
    weights = [term.weight for term in stack.hyperparameters.terms]
    np.testing.assert_allclose(weights, [[1.0, 1.0], [1.0, 0.3]])


@pytest.mark.parametrize(("mode", "weight"), [("none", 1), ("shared", 0), ("aux", 0)])
def test_without_a_teacher_the_user_weight_is_ignored(mode, weight):
    changes = {"distill__mode": mode, "distill__user_weight": 0.0}

    student = stack_of(**changes)
    teacher = specs.teacher_stack(config_of(**changes), SPEC)

    assert student.hyperparameters.user_weight == weight
    assert teacher.hyperparameters.user_weight == 1


@pytest.mark.parametrize(
    "change",
    [
        {"distill__mode": "aux"},
        {"distill__loss": "softmax"},
        {"distill__affine": False},
        {"distill__loss": "softmax:stage"},
        {"distill__loss": "bce + softmax"},
        {"student__name": "two_tower"},
        {"student__width": 4},
        {"student__hidden": (8, 8)},
        {"student__interests": 3},
        {"student__history": "mean"},
        {"optimizer__name": "sgd"},
        {"optimizer__table_name": "adagrad"},
        {"optimizer__schedule": "constant"},
        {"optimizer__warmup_steps": 1},
        {"train__unshown_weight": 0.5},
        {"train__user_loss": "softmax"},
    ],
)
def test_runs_that_differ_otherwise_are_separate_stacks(change):
    assert names_of_stacks(a={}, b=change, c={"seed": 1}) == [("a", "c"), ("b",)]


def constant_by_optax(warmup, _):
    return optax.warmup_constant_schedule(0.0, 1.0, max(warmup, 1))


def cosine_by_optax(warmup, steps):
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, min(warmup, steps // 2), steps)


OPTAX_SCHEDULES = {"constant": constant_by_optax, "cosine": cosine_by_optax}


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
@pytest.mark.parametrize(
    ("warmup", "lengths"), [(10, (1, 20, 100)), (0, (100, 7)), (50, (20, 1, 1500))]
)
def test_a_run_has_optaxs_schedule_for_its_own_steps(name, warmup, lengths):
    schedule = functools.partial(optimizers.SCHEDULES[name], warmup, steps=jnp.float32(lengths))

    rates = jax.jit(jax.vmap(schedule))(jnp.arange(1, max(lengths) + 1))

    for run, steps in enumerate(lengths):
        expected = jax.jit(OPTAX_SCHEDULES[name](warmup, steps))(jnp.arange(1, steps + 1))
        np.testing.assert_allclose(rates[:steps, run], expected, rtol=0, atol=2e-7)
