import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_ranker.batch import Stage
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.training import recipes
from kd_ranker.training.state import LiveTeacher
from tests.random_batches import SPEC
from tests.training.steps import config_of

NONE, AUX, SHARED = ({"distill__mode": mode} for mode in ("none", "aux", "shared"))
STAGES = AUX | {"distill__loss": "softmax:stage"}
UNSHOWN = NONE | {"train__unshown_weight": 0.1}
POOLS = NONE | {"student__history": "mean"}


def groups_of(members):
    members = {name: config_of(**changes) for name, changes in members.items()}
    return recipes.student_groups(members, SPEC)


def group_of(**changes):
    (group,) = groups_of({"": changes})
    return group


@pytest.mark.parametrize(
    ("members", "teacher", "expected"),
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
        ([NONE, POOLS], None, (Stage.SHOWN, None, True)),
    ],
)
def test_a_batch_needs_what_some_member_has_a_use_for(members, teacher, expected):
    model, _ = recipes.teacher_model(config_of(), SPEC)
    live = LiveTeacher(model, teacher) if teacher else None
    groups = groups_of(dict(enumerate(members)))
    assert recipes.needs(groups, live, Stage.PASSED) == expected


def test_a_teacher_learns_from_labels_and_may_learn_from_the_log_by_the_same_logits():
    config = config_of()
    group = recipes.teacher_group(config, SPEC)
    assert recipes.needs([group], None) == (Stage.SHOWN, None, True)
    config.teacher.log_weight = 2.0
    group = recipes.teacher_group(config, SPEC)
    assert [(term.loss, term.signal) for term in group.numbers.terms] == [("bce", "scores")]
    assert recipes.needs([group], None) == (Stage.SHOWN, Stage.RETRIEVED, True)
    assert (group.numbers.user_weight, group.numbers.distill_weight) == (1, 2)
    mode, logits = group.recipe.mode, np.zeros((2, 3, 3))
    assert mode.teacher_logits(logits, {}) is mode.user_logits(logits, {}) is logits


def names_of_groups(**members):
    return [group.names for group in groups_of(members)]


def test_members_that_differ_in_traced_numbers_are_one_group(monkeypatch):
    monkeypatch.setitem(LOSSES, "bce", LOSSES["bce"]._replace(numbers={"own": 1.0}))
    changes = {
        "seed": 3, "train__steps": 7, "distill__weight": 2.0, "distill__temperature": 3.0,
        "distill__top_k": 4, "distill__user_weight": 0.5,
        "distill__numbers": (6.0,),
        "train__unshown_weight": 0.7, "optimizer__learning_rate": 0.1,
        "optimizer__weight_decay": 0.3, "optimizer__table_learning_rate": 0.2,
        "optimizer__table_weight_decay": 0.4,
    }  # fmt: skip
    assert {key.replace("__", ".") for key in changes} == set(recipes.TRACED_KEYS)
    first = {"train__unshown_weight": 0.6}
    members = {key: first | {key: value} for key, value in changes.items()}
    assert names_of_groups(first=first, **members) == [("first", *changes)]
    numbers = group_of(distill__mode="aux", **changes).numbers
    numbers = [float(leaf[0]) for leaf in jax.tree.leaves(numbers)]
    assert sorted(numbers) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 2, 3, 4, 6, 7])


def terms_of_group(**changes):
    """The terms of the loss of a group of one."""
    terms = group_of(**changes).numbers.terms
    return [(term.loss, term.signal, float(term.weight[0])) for term in terms]


def test_the_terms_of_a_student_are_those_of_its_config():
    text = "softmax + 0.5 * topk:stage"
    expected = [("softmax", "scores", 1.0), ("topk", "stage", 0.5)]
    assert terms_of_group(distill__mode="aux", distill__loss=text) == expected


def test_a_mode_without_a_teacher_has_no_terms():
    assert terms_of_group(distill__mode="none", distill__loss="softmax") == []


def test_weights_of_terms_are_traced_and_terms_are_not():
    losses = {"a": "softmax + topk:stage", "b": "softmax + 0.3 * topk:stage", "c": "softmax + topk"}
    members = {name: {"distill__mode": "aux", "distill__loss": of} for name, of in losses.items()}
    group, second = groups_of(members)
    assert (group.names, second.names) == (("a", "b"), ("c",))
    weights = [term.weight for term in group.numbers.terms]
    np.testing.assert_allclose(weights, [[1.0, 1.0], [1.0, 0.3]])


@pytest.mark.parametrize(("mode", "weight"), [("none", 1), ("shared", 0), ("aux", 0)])
def test_without_a_teacher_a_student_learns_from_users_whatever_their_weight(mode, weight):
    how = {"distill__mode": mode, "distill__user_weight": 0.0}
    assert group_of(**how).numbers.user_weight == weight
    assert recipes.teacher_group(config_of(**how), SPEC).numbers.user_weight == 1


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
def test_members_that_differ_in_anything_else_are_groups_of_their_own(change):
    assert names_of_groups(a={}, b=change, c={"seed": 1}) == [("a", "c"), ("b",)]


OF_OPTAX = {
    "constant": lambda warmup, steps: optax.warmup_constant_schedule(0.0, 1.0, max(warmup, 1)),
    "cosine": lambda warmup, steps: optax.warmup_cosine_decay_schedule(
        0.0, 1.0, min(warmup, steps // 2), steps
    ),
}


@pytest.mark.parametrize("name", recipes.SCHEDULES)
@pytest.mark.parametrize(
    ("warmup", "lengths"), [(10, (1, 20, 100)), (0, (100, 7)), (50, (20, 1, 1500))]
)
def test_each_member_has_the_schedule_of_optax_for_its_own_number_of_steps(name, warmup, lengths):
    of_step = functools.partial(recipes.SCHEDULES[name], warmup, steps=jnp.float32(lengths))
    found = jax.jit(jax.vmap(of_step))(jnp.arange(1, max(lengths) + 1))
    for member, steps in enumerate(lengths):
        expected = jax.jit(OF_OPTAX[name](warmup, steps))(jnp.arange(1, steps + 1))
        np.testing.assert_allclose(found[:steps, member], expected, rtol=0, atol=2e-7)
