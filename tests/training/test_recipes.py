import jax
import numpy as np
import pytest

from kd_ranker.batch import Stage
from kd_ranker.configs import cascade
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.training import recipes
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.state import Frozen, LiveTeacher, select_member
from kd_ranker.training.step import make_step
from tests.random_batches import SPEC, random_batch, random_items


def config_of(**changes):
    """The small cascade's config; `train__steps=3` changes `train.steps`."""
    config = cascade("small")
    config.student.update({"width": 8, "interests": 2, "hidden": (16,)})
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return config


@pytest.mark.parametrize(
    ("modes", "teacher", "expected"),
    [
        (["none"], None, (Stage.SHOWN, None, False)),
        (["shared"], None, (Stage.SHOWN, Stage.PASSED, False)),
        (["none", "aux"], None, (Stage.SHOWN, Stage.PASSED, False)),
        (["none", "aux"], Stage.SHOWN, (Stage.SHOWN, None, True)),
        (["none", "aux"], Stage.PASSED, (Stage.PASSED, None, True)),
        (["shared"], Stage.RETRIEVED, (Stage.RETRIEVED, None, True)),
    ],
)
def test_a_batch_needs_what_some_member_has_a_use_for(modes, teacher, expected):
    members = {}
    for mode in modes:
        members[mode] = cascade("small")
        members[mode].distill.mode = mode
    groups = recipes.student_groups(members, SPEC)
    model, _ = recipes.teacher_model(next(iter(members.values())), SPEC)
    live = LiveTeacher(model, teacher) if teacher else None
    assert recipes.needs(groups, live, Stage.PASSED) == expected


@pytest.mark.parametrize("live", [None, Stage.SHOWN])
def test_stages_need_candidates_of_every_stage_and_no_teacher(live):
    config = config_of(distill__mode="shared", distill__loss="softmax", teacher__signal="stage")
    groups = recipes.student_groups({"": config}, SPEC)
    assert recipes.signals_of(groups) == {"stage"}
    assert recipes.needs(groups, None) == (Stage.RETRIEVED, None, False)
    # Beside one that hears a teacher.
    beside = config_of(distill__mode="aux")
    groups = recipes.student_groups({"a": config, "b": beside}, SPEC)
    assert recipes.signals_of(groups) == {"logged", "stage"}
    model, _ = recipes.teacher_model(config, SPEC)
    teacher = LiveTeacher(model, live) if live else None
    logged = None if live else Stage.PASSED
    expected = (Stage.RETRIEVED, logged, live is not None)
    assert recipes.needs(groups, teacher, Stage.PASSED) == expected


@pytest.mark.parametrize("stage", [None, Stage.PASSED])
def test_who_learns_from_unshown_negatives_needs_all_candidates(stage):
    members = {"plain": config_of(), "negatives": config_of(train__unshown_weight=0.1)}
    model, _ = recipes.teacher_model(members["plain"], SPEC)
    live = LiveTeacher(model, stage) if stage else None
    assert recipes.needs(recipes.student_groups(members, SPEC), live).stage == Stage.RETRIEVED
    del members["negatives"]
    found = recipes.needs(recipes.student_groups(members, SPEC), live).stage
    assert found == (stage or Stage.SHOWN)


def test_a_student_that_pools_the_history_needs_it():
    members = {history: config_of(student__history=history) for history in ("none", "mean")}
    assert recipes.needs(recipes.student_groups(members, SPEC), None).history
    del members["mean"]
    assert not recipes.needs(recipes.student_groups(members, SPEC), None).history


def test_a_teacher_in_training_needs_labels_and_histories_alone():
    group = recipes.teacher_group(cascade("small"), SPEC)
    assert recipes.needs([group], None) == (Stage.SHOWN, None, True)


def test_a_teacher_that_hears_the_log_needs_it_and_meets_it_with_what_it_serves():
    config = cascade("small")
    config.teacher.log_weight = 2.0
    group = recipes.teacher_group(config, SPEC)
    assert group.recipe.terms == (("bce", "logged"),)
    assert recipes.needs([group], None) == (Stage.SHOWN, Stage.RETRIEVED, True)
    assert (group.numbers.user_weight, group.numbers.distill_weight) == (1, 2)
    mode, logits = group.recipe.mode, np.zeros((2, 3, 3))
    assert mode.teacher_logits(logits, {}) is mode.user_logits(logits, {}) is logits


def names_of_groups(**members):
    groups = recipes.student_groups(
        {name: config_of(**changes) for name, changes in members.items()}, SPEC
    )
    return [group.names for group in groups]


def test_members_that_differ_in_traced_numbers_are_one_group(monkeypatch):
    monkeypatch.setitem(LOSSES, "bce", LOSSES["bce"]._replace(numbers={"own": 1.0}))
    changes = {
        "seed": 3, "train__steps": 7, "distill__weight": 2.0, "distill__temperature": 3.0,
        "distill__top_k": 4, "distill__user_weight": 0.5, "distill__term_weights": (5.0,),
        "distill__numbers": (6.0,),
        "train__unshown_weight": 0.7, "optimizer__learning_rate": 0.1,
        "optimizer__weight_decay": 0.3, "optimizer__table_learning_rate": 0.2,
        "optimizer__table_weight_decay": 0.4,
    }  # fmt: skip
    assert {key.replace("__", ".") for key in changes} == set(recipes.TRACED_KEYS)
    first = {"train__unshown_weight": 0.6}
    members = {key: first | {key: value} for key, value in changes.items()}
    assert names_of_groups(first=first, **members) == [("first", *changes)]
    (group,) = recipes.student_groups({"": config_of(distill__mode="aux", **changes)}, SPEC)
    numbers = [float(leaf[0]) for leaf in jax.tree.leaves(group.numbers)]
    assert sorted(numbers) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 2, 3, 4, 5, 6, 7])


def test_terms_take_the_signal_that_they_name_or_else_the_configs():
    terms = {
        (): [("bce", "logged")],
        ("softmax",): [("softmax", "logged")],
        ("softmax", "topk:stage", "bce:logged"): [
            ("softmax", "logged"), ("topk", "stage"), ("bce", "logged"),
        ],
    }  # fmt: skip
    for named, expected in terms.items():
        config = config_of(distill__mode="aux", distill__terms=named)
        assert list(recipes.terms_of(config)) == expected
        (group,) = recipes.student_groups({"": config}, SPEC)
        assert group.recipe.terms == tuple(expected)
        assert [float(weight[0]) for weight in group.numbers.term_weights] == [1.0] * len(expected)
    config.teacher.signal = "stage"
    assert [term.signal for term in recipes.terms_of(config)] == ["stage", "stage", "logged"]
    config.distill.terms, config.distill.loss = (), "topk:logged"
    assert recipes.terms_of(config) == (("topk", "logged"),)
    config.distill.mode = "none"
    assert recipes.terms_of(config) == ()


def test_weights_of_terms_are_traced_and_terms_are_not():
    terms = {"distill__mode": "aux", "distill__terms": ("softmax", "topk:stage")}
    weighed = terms | {"distill__term_weights": (1.0, 0.3)}
    other = terms | {"distill__terms": ("softmax", "topk")}
    assert names_of_groups(a=terms, b=weighed, c=other) == [("a", "b"), ("c",)]
    members = {"a": config_of(**terms), "b": config_of(**weighed)}
    (group,) = recipes.student_groups(members, SPEC)
    np.testing.assert_allclose(group.numbers.term_weights, [[1.0, 1.0], [1.0, 0.3]])


def test_a_student_without_a_teacher_learns_from_users_whatever_the_weight_of_their_loss():
    for mode, weight in (("none", 1), ("shared", 0), ("aux", 0)):
        config = config_of(distill__mode=mode, distill__user_weight=0.0)
        (group,) = recipes.student_groups({"": config}, SPEC)
        assert group.numbers.user_weight == weight
    assert recipes.teacher_group(config, SPEC).numbers.user_weight == 1


@pytest.mark.parametrize(
    "change",
    [
        {"distill__mode": "aux"},
        {"distill__loss": "softmax"},
        {"distill__affine": False},
        {"teacher__signal": "stage"},
        {"distill__terms": ("bce", "softmax")},
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


def last_states(members, batches):
    """By name, what is left of each member after training on the batches in one program."""
    groups = recipes.student_groups(members, SPEC)
    devices = MAPPINGS["shard_map"](jax.devices()[:1])
    step = devices.map_step(make_step([group.recipe for group in groups]))
    states = devices.create(lambda deal: tuple(group.init() for group in groups))
    frozen = devices.place(Frozen(random_items(), None))
    for batch in batches:
        numbers = tuple(group.numbers for group in groups)
        states, _ = step(states, devices.shard(batch), numbers, frozen)
    return {
        name: select_member((state.parameters, state.transform), member)
        for group, state in zip(groups, states, strict=True)
        for member, name in enumerate(group.names)
    }


def test_members_of_any_shape_and_length_end_as_the_same_member_alone():
    batches = [random_batch(seed) for seed in range(20)]
    members = {
        "first": config_of(),
        "longer": config_of(train__steps=12, seed=1),
        "another": config_of(student__name="two_tower", student__width=12, student__hidden=(8, 4),
                             student__history="mean", train__steps=15, train__unshown_weight=0.3,
                             optimizer__name="adagrad", optimizer__table_name="sgd",
                             optimizer__schedule="constant", distill__affine=False),
    }  # fmt: skip
    together = last_states(members, batches)
    for name, config in members.items():
        by_itself = last_states({name: config}, batches[: config.train.steps])
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5, rtol=0),
            together[name],
            by_itself[name],
        )
