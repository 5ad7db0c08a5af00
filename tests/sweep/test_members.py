import json

import pytest

from kd_ranker.config import checks, schema
from kd_ranker.configs import cascade
from kd_ranker.errors import UserError
from kd_ranker.sweep.members import sweep_members


def config_of(axes=(), **sweep):
    """A config with `sweep.NAME=value`, and axes by the names of their keys."""
    config = cascade("small")
    config.sweep.update(sweep)
    for key, values in dict(axes).items():
        section, _, last = f"sweep.axes.{key}".rpartition(".")
        schema.value_of(config, section)[last] = values
    return config


def test_modes_times_weights_times_seeds_and_none_once_a_seed():
    members = sweep_members(config_of(weights=(0.5, 2), seeds=(0, 7)))
    assert list(members) == [
        f"{member}-seed{seed}"
        for seed in (0, 7)
        for member in (
            "none", "aux-weight0.5", "aux-weight2.0", "shared-weight0.5", "shared-weight2.0",
        )
    ]  # fmt: skip
    member = members["aux-weight2.0-seed7"]
    assert (member.distill.mode, member.distill.weight, member.seed) == ("aux", 2.0, 7)
    assert members["none-seed0"].distill.weight == 0


def test_data_seeds_repeat_the_whole_population():
    members = sweep_members(config_of(modes=("none", "shared"), axes={"batch.seed": (0, 3)}))
    assert list(members) == [
        "none-seed0", "shared-weight1.0-seed0", "none-seed0-data3", "shared-weight1.0-seed0-data3",
    ]  # fmt: skip
    assert [member.batch.seed for member in members.values()] == [0, 0, 3, 3]


def test_whole_repeats_leave_no_order_to_sweep():
    config = config_of(whole_repeats=True, axes={"batch.seed": (0, 3)})
    with pytest.raises(UserError, match=r"sweep\.axes\.batch\.seed has nothing to vary"):
        checks.validate(config)


def test_numbers_are_swept_and_the_tables_rate_keeps_its_ratio():
    config = config_of(
        modes=("none", "shared"),
        axes={"distill.temperature": (1.0, 2.0), "optimizer.learning_rate": (0.01, 0.02)},
    )
    config.optimizer.learning_rate, config.optimizer.table_learning_rate = 0.01, 0.006
    members = sweep_members(config)
    assert list(members) == [
        "none-seed0",
        "none-rate0.02-seed0",
        "shared-weight1.0-seed0",
        "shared-weight1.0-temperature2.0-seed0",
        "shared-weight1.0-rate0.02-seed0",
        "shared-weight1.0-temperature2.0-rate0.02-seed0",
    ]
    member = members["shared-weight1.0-temperature2.0-rate0.02-seed0"]
    assert member.distill.temperature == 2.0
    assert member.optimizer.learning_rate == 0.02
    assert member.optimizer.table_learning_rate == pytest.approx(0.012)
    assert members["shared-weight1.0-seed0"].optimizer.table_learning_rate == 0.006


AXES = {
    "batch.seed": (0, 1),
    "distill.temperature": (1.0, 4.0),
    "student.width": (32, 16),
    "student.hidden": ((64,), (64, 32)),
    "train.steps": (20, 10),
}


def test_names_stay_when_a_sweep_grows():
    before = sweep_members(config_of(weights=(1.0,)))
    after = sweep_members(config_of(weights=(1.0, 3.0), axes=AXES))
    for name, member in before.items():
        same, other = after[name].to_dict(), member.to_dict()
        for config in (same, other):
            del config["sweep"]
        assert same == other


def test_any_key_that_a_sweep_may_vary_is_an_axis():
    config = config_of(modes=("none", "aux"))
    for key in schema.sweepable():
        if key.name in schema.NAMED_AXES:
            continue
        own = schema.value_of(config, key.name)
        section, _, last = f"sweep.axes.{key.name}".rpartition(".")
        values = (own, another(key, own))
        schema.value_of(config, section)[last] = values
        members = sweep_members(config)
        checks.validate(config)
        swept = {schema.value_of(member, key.name) for member in members.values()}
        assert swept == set(values), key.name
        # Mode none reads nothing of `distill`, so it stands once for all that is swept there.
        none = 1 if key.of_distillation else 2
        assert len(members) == none + 2, key.name
        schema.value_of(config, section)[last] = ()


def another(key, own):
    """A second value of a key."""
    if key.name == "distill.loss":
        return "topk:stage"
    if key.name == "distill.terms":
        return ("ranknet", "softmax:stage")
    if isinstance(own, bool):
        return not own
    if isinstance(own, str):
        return next(name for name in key.allowed if name != own)
    if isinstance(own, tuple):
        return (*own, 8)
    return (
        own / 2
        if isinstance(own, float) and own
        else own + (16 if key.name.startswith("batch") else 1)
    )


def test_terms_are_swept_with_weights_of_their_own():
    config = config_of(
        modes=("none", "aux"),
        axes={"distill.term_weights": ((1.0, 0.3), (1.0, 1.0))},
    )
    config.distill.terms = ("softmax", "listmle:stage")
    checks.validate(config)
    assert list(sweep_members(config)) == [
        "none-seed0",
        "aux-weight1.0-term_weights1.0x0.3-seed0",
        "aux-weight1.0-term_weights1.0x1.0-seed0",
    ]
    config = config_of(
        modes=("aux",), axes={"distill.terms": ((), ("softmax",), ("softmax", "topk:stage"))}
    )
    checks.validate(config)
    assert list(sweep_members(config)) == [
        "aux-weight1.0-seed0",
        "aux-weight1.0-termssoftmax-seed0",
        "aux-weight1.0-termssoftmax+topk:stage-seed0",
    ]


def test_the_names_of_members_tell_every_two_apart():
    shorts = [key.short for key in schema.sweepable()]
    assert len(set(shorts) - {"name"}) == len(shorts) - shorts.count("name")
    members = sweep_members(config_of(axes=AXES))
    flat = [json.dumps(member.to_dict(), sort_keys=True) for member in members.values()]
    assert len(set(flat)) == len(flat)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"weights": (1.0, 1)}, "sweep.weights=(1.0, 1) names a value twice"),
        ({"axes": {"batch.seed": (2, 2)}}, "sweep.axes.batch.seed=(2, 2) names a value twice"),
        (
            {"axes": {"distill.temperature": (0.0,)}},
            "sweep.axes.distill.temperature holds 0.0, which must be greater than 0",
        ),
        ({"axes": {"distill.loss": ("hinge",)}}, "sweep.axes.distill.loss='hinge' does not exist"),
        ({"axes": {"batch.seed": (-1,)}}, "holds -1, which must not be negative"),
        ({"axes": {"student.width": (16.0,)}}, "holds 16.0; it takes whole numbers"),
        ({"axes": {"student.hidden": (16,)}}, "holds 16; it takes tuples"),
        ({"axes": {"student.hidden": ((16, 0),)}}, "holds 0, which must be greater than 0"),
        ({"axes": {"student.hidden": (("a",),)}}, "holds 'a'; it takes whole numbers"),
        ({"axes": {"distill.terms": ((1,),)}}, "sweep.axes.distill.terms holds 1; it takes names"),
        ({"axes": {"distill.terms": ("bce",)}}, "holds 'bce'; it takes tuples"),
        ({"axes": {"distill.terms": (("l1",),)}}, "distill.terms='l1' does not exist"),
        ({"axes": {"distill.term_weights": (("a",),)}}, "holds 'a'; it takes numbers"),
        ({"axes": {"distill.term_weights": ((-1.0,),)}}, "holds -1.0, which must not be negative"),
        (
            {"axes": {"distill.term_weights": ((1.0, 2.0),)}},
            "distill.term_weights=(1.0, 2.0) has 2 numbers for the 1 of distill.terms=()",
        ),
        (
            {"axes": {"distill.terms": (("bce", "topk"),), "distill.loss": ("bce", "topk")}},
            "sweep.axes.distill.loss changes nothing of distill.terms=('bce', 'topk')",
        ),
        (
            {"axes": {"distill.terms": (("topk:stage",),), "teacher.signal": ("logged", "stage")}},
            "sweep.axes.teacher.signal changes nothing of distill.terms=('topk:stage',)",
        ),
        ({"axes": {"distill.affine": ("no",)}}, "holds 'no'; it takes truth values"),
        ({"group_size": -1}, "sweep.group_size=-1 must not be negative"),
    ],
)
def test_bad_axes_are_one_line(sweep, message):
    with pytest.raises(UserError) as caught:
        checks.validate(config_of(**sweep))
    assert message in str(caught.value)
