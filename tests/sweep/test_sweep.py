import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_ranker.config import checks, schema
from kd_ranker.configs import cascade
from kd_ranker.distillation import losses
from kd_ranker.evaluation import results
from kd_ranker.sweep import common, open_sweep, repeats, sweep_members
from kd_ranker.training import recipes
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.state import Frozen
from kd_ranker.training.step import make_step
from tests.faults import fault_of
from tests.random_batches import SPEC, random_batch, random_items

DATASET = {"dataset": "small/0123456789ab"}


def config_of(axes=(), **sweep):
    """A config with `sweep.NAME=value`, and axes by the names of their keys."""
    config = cascade("small")
    config.sweep.update(sweep)
    config.update_from_flattened_dict({f"sweep.axes.{key}": of for key, of in dict(axes).items()})
    return config


def valid_members(config):
    checks.validate(config)
    return sweep_members(config)


def value_in(members, key):
    return [schema.value_of(member, key) for member in members.values()]


def test_modes_times_weights_times_seeds_and_none_once_a_seed():
    members = valid_members(config_of(weights=(0.5, 2, 2.0), seeds=(0, 7)))
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
    assert list(valid_members(config_of(modes=(), weights=(), seeds=()))) == [
        "shared-weight1.0-seed0"
    ]


def test_numbers_are_swept_and_the_tables_rate_keeps_its_ratio():
    axes = {"distill.temperature": (1.0, 2.0), "optimizer.learning_rate": (0.01, 0.02)}
    config = config_of(axes, modes=("none", "shared"))
    config.optimizer.learning_rate, config.optimizer.table_learning_rate = 0.01, 0.006
    members = valid_members(config)
    assert list(members) == [
        "none-seed0",
        "none-rate0.02-seed0",
        "shared-weight1.0-seed0",
        "shared-weight1.0-temperature2.0-seed0",
        "shared-weight1.0-rate0.02-seed0",
        "shared-weight1.0-temperature2.0-rate0.02-seed0",
    ]
    assert value_in(members, "distill.temperature")[2:] == [1, 2, 1, 2]
    rates = [0.006, 0.012, 0.006, 0.006, 0.012, 0.012]
    assert value_in(members, "optimizer.table_learning_rate") == pytest.approx(rates)


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
    return own / 2 if isinstance(own, float) and own else own + (16 if own == 32 else 1)


def test_any_key_that_a_sweep_may_vary_is_an_axis():
    for key in schema.sweepable():
        if key.name in schema.NAMED_AXES:
            continue
        own = schema.value_of(cascade("small"), key.name)
        values = (own, another(key, own))
        members = valid_members(config_of({key.name: values}, modes=("none", "aux")))
        assert {*value_in(members, key.name)} == {*values}, key.name
        # Mode none reads nothing of `distill`, so it stands once for all that is swept there.
        assert len(members) == (1 if key.of_distillation else 2) + 2, key.name


def test_a_key_that_a_member_does_not_read_is_not_varied():
    axes = {"distill.loss": ("bce", "topk:stage"), "teacher.signal": ("logged", "stage")}
    config = config_of(axes | {"distill.terms": ((), ("softmax",))}, modes=("none", "shared"))
    members = valid_members(config)
    names = "distill.terms", "distill.loss", "teacher.signal"
    found = {*zip(*(value_in(members, name) for name in names), strict=True)}
    # bce and softmax of either signal; topk of its own. Mode none has values of the config.
    assert found == {
        *(((), *of) for of in (("bce", "logged"), ("bce", "stage"), ("topk:stage", "logged"))),
        *((("softmax",), "bce", signal) for signal in ("logged", "stage")),
    }
    assert len(members) == 1 + len(found)


AXES = {
    "batch.seed": (0, 1),
    "distill.temperature": (1.0, 4.0),
    "student.width": (32, 16),
    "student.hidden": ((64,), (64, 32)),
    "train.steps": (20, 10),
}
WAYS = (
    "distill.mode=none",
    "distill.mode=none train.unshown_weight=0.1,0.3",
    "distill.mode=none train.user_loss=bce+softmax",
    "distill.mode=aux distill.loss=topk:stage",
    "distill.mode=aux,shared distill.loss=bce,topk",
)


def test_the_names_of_members_tell_every_two_apart():
    shorts = collections.Counter(key.short for key in schema.sweepable())
    assert {name for name, number in shorts.items() if number > 1} <= {"name"}
    members = valid_members(config_of(AXES))
    assert len({of.to_json(sort_keys=True) for of in members.values()}) == len(members)


def test_ways_are_the_union_of_their_products():
    axes = {"optimizer.learning_rate": (0.01, 0.02)}
    config = config_of(axes, ways=WAYS, seeds=(0, 1), weights=(0.5, 1.0))
    config.optimizer.learning_rate = 0.01
    members = valid_members(config)
    first = [
        name.removesuffix("-seed0")
        for name, member in members.items()
        if member.seed == 0 and member.optimizer.learning_rate == 0.01
    ]
    assert first == [
        "none",
        "none-unshown0.1",
        "none-unshown0.3",
        "none-user_lossbce+softmax",
        "aux-topk:stage-weight0.5",
        "aux-topk:stage-weight1.0",
        *(
            f"{mode}-{loss}weight{weight}"
            for mode in ("aux", "shared")
            for loss in ("", "topk-")
            for weight in (0.5, 1.0)
        ),
    ]
    assert len(members) == len(first) * 2 * 2
    swept = {key.name for key in schema.axes(config)}
    assert {"train.unshown_weight", "train.user_loss", "distill.loss"} <= swept
    assert {"user_loss", "unshown_weight", "distill_loss"} <= {*results.KEYS, *results.OTHER_KEYS}


def test_values_of_ways_have_the_types_of_their_keys():
    text = (
        "distill.mode=aux student.hidden=64,32x16 distill.terms=topk:stage+softmax "
        "distill.affine=False train.steps=7 distill.weight=2 seed=3,4"
    )
    config = config_of(ways=(text,))
    members = valid_members(config)
    assert value_in(members, "student.hidden") == [(64,), (32, 16)] * 2
    assert value_in(members, "seed") == [3, 3, 4, 4]
    for distill in value_in(members, "distill"):
        assert distill.terms == ("topk:stage", "softmax")
        assert (distill.affine, distill.weight) == (False, 2.0)
    config.sweep.whole_repeats = True
    assert [repeat.seed for repeat in repeats(config)] == [3, 4]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"weights": (1.0,)}, {"weights": (1.0, 3.0), "axes": AXES}),
        ({"ways": WAYS[:1]}, {"ways": WAYS}),
    ],
)
def test_a_sweep_that_grows_keeps_its_members(before, after):
    before, after = (sweep_members(config_of(**of)) for of in (before, after))
    assert [name for name in after if name in before] == list(before)
    for name, member in before.items():
        same, other = after[name].to_dict(), member.to_dict()
        del same["sweep"], other["sweep"]
        assert same == other


NO_KEY = "is not KEY=VALUE,VALUE with a key that a sweep varies"


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"axes": {"distill.loss": ("hinge",)}}, "sweep.axes.distill.loss='hinge' does not exist"),
        ({"axes": {"student.hidden": ((16, 0),)}}, "has 0; it takes whole numbers > 0"),
        # Values that other keys replace.
        ({"whole_repeats": True, "axes": {"batch.seed": (0,)}}, "leave sweep.axes.batch.seed out"),
        (
            {"axes": {"distill.terms": (("topk:stage",),), "teacher.signal": ("logged", "stage")}},
            "no member of the sweep has 'stage'",
        ),
        (
            {"ways": ("train.steps=7", "train.steps=8"), "axes": {"train.steps": (5, 6)}},
            "sweep.axes.train.steps=(5, 6): no member of the sweep has 5",
        ),
        ({"ways": ((1, 2),)}, "sweep.ways has (1, 2); it takes names"),
        ({"ways": ("distill.mode=none",), "modes": ("shared",)}, "no member of the sweep has 'sha"),
        *(
            ({"ways": ("distill.mode=none", way)}, f"sweep.ways={way!r}: {message}")
            for way, message in {
                "distil.mode=none": f"'distil.mode=none' {NO_KEY}",
                "train.steps=5.0": "sweep.axes.train.steps has '5.0'; it takes whole numbers",
            }.items()
        ),
    ],
)
def test_bad_axes_and_ways_are_one_line(sweep, message):
    assert message in fault_of(valid_members, config_of(**sweep))


def test_a_sweep_varies_the_own_numbers_of_a_new_loss_in_one_program(monkeypatch):
    def lead(logits, probability, weight, numbers=losses.DEFAULT_NUMBERS):
        known = jnp.where(weight > 0, probability, 0.5)
        values = jnp.maximum(numbers.own["least"] - (2 * known - 1) * logits, 0.0)
        return losses.weighted_totals(values, weight)

    monkeypatch.setitem(losses.LOSSES, "lead", losses.Loss(lead, numbers={"least": 1.0}))
    config = config_of(modes=("shared",))
    config.distill.loss = "lead"
    (default,) = recipes.student_groups(sweep_members(config), SPEC)
    assert default.numbers.loss.own["least"].tolist() == [1.0]
    config.sweep.axes.distill.numbers = ((0.5,), (2.0,))
    (group,) = recipes.student_groups(valid_members(config), SPEC)
    assert group.numbers.loss.own["least"].tolist() == [0.5, 2.0]
    mapping = MAPPINGS["shard_map"](jax.devices()[:1])
    step = mapping.map_step(make_step([group.recipe]))
    state = mapping.create(lambda deal: (group.init(),))
    frozen = mapping.place(Frozen(random_items(), None))
    _, of_groups = step(state, mapping.shard(random_batch(0)), (group.numbers,), frozen)
    small, large = np.asarray(of_groups[0]["distill_loss"]).ravel()
    assert large > small > 0
    assert "distill.numbers" in results.OTHER_KEYS  # a column of results.csv
    config.sweep.axes.distill.numbers = ((0.5, 2.0),)
    fault = fault_of(recipes.student_groups, sweep_members(config), SPEC)
    assert "has 2 numbers, and the losses take 1 (least)" in fault


def planned(folder, size, config):
    return open_sweep(config, folder, DATASET).planned(size)


@given(size=st.integers(1, 12), seeds=st.integers(1, 3), data_seeds=st.integers(1, 3))
def test_every_member_is_in_one_cohort_of_its_order_and_none_is_too_large(
    tmp_path_factory, size, seeds, data_seeds
):
    config = config_of({"batch.seed": tuple(range(data_seeds))}, seeds=tuple(range(seeds)))
    sweep = planned(tmp_path_factory.mktemp("sweep"), size, config)
    assert sorted(name for cohort in sweep.plan for name in cohort) == sorted(sweep.members)
    sizes = collections.defaultdict(list)
    for cohort in sweep.cohorts:
        (data_seed,) = {*value_in(cohort, "batch.seed")}
        sizes[data_seed].append(len(cohort))
    assert len(sizes) == data_seeds
    for of_seed in sizes.values():
        assert max(of_seed) <= size
        assert max(of_seed) - min(of_seed) <= 1
        assert len(of_seed) == -(-3 * seeds // size)


def test_ways_on_the_same_batches_share_a_cohort(tmp_path):
    ways = ("distill.mode=none", "distill.mode=aux distill.loss=topk:stage")
    config = config_of({"batch.seed": (0, 1)}, ways=ways)
    sweep = planned(tmp_path, 9, config)
    assert sweep.plan == [
        ["none-seed0", "aux-topk:stage-weight1.0-seed0"],
        ["none-seed0-data1", "aux-topk:stage-weight1.0-seed0-data1"],
    ]
    config = config_of({"batch.seed": (0, 1)}, ways=(*ways, "distill.mode=shared"))
    grown = planned(tmp_path, 9, config)
    assert grown.plan[:2] == sweep.plan
    assert grown.plan[2:] == [["shared-weight1.0-seed0"], ["shared-weight1.0-seed0-data1"]]


def test_a_plan_is_read_as_it_was_written(tmp_path):
    fresh = open_sweep(config_of(), tmp_path, DATASET)
    assert (fresh.plan, fresh.is_complete()) == ([], False)
    started = planned(tmp_path, 2, config_of())
    read = open_sweep(config_of(), tmp_path, DATASET)
    assert dataclasses.replace(read, members={}) == dataclasses.replace(started, members={})
    assert planned(tmp_path, 5, config_of()).plan == started.plan


@pytest.mark.parametrize(
    "plan", ["{}", '{"cohorts": 5}', '{"cohorts": ["a"]}', '{"cohorts": [[]]}']
)
def test_a_damaged_plan_is_one_line(tmp_path, plan):
    (tmp_path / "cohorts.json").write_text(plan)
    fault = fault_of(open_sweep, config_of(), tmp_path, DATASET)
    assert fault.startswith(f"{tmp_path / 'cohorts.json'} is damaged: ")


def test_whole_repeats_are_cohorts_of_their_own_teachers(tmp_path):
    config = config_of(seeds=(0, 7), whole_repeats=True)
    config.teacher.workdir = "runs/teacher"
    sweep = planned(tmp_path, 9, config)
    for seed, cohort in zip((0, 7), sweep.cohorts, strict=True):
        assert len(cohort) == 3
        assert {*value_in(cohort, "teacher.workdir")} == {f"runs/teacher/seed{seed}"}
        assert {*value_in(cohort, "seed")} == {seed}
        assert common(cohort).batch.seed == common(cohort).teacher.batch.seed == seed


def test_what_a_cohort_has_in_common_lacks_the_keys_in_which_its_members_may_differ():
    axes = {"train.steps": (20, 50), "teacher.stage": ("passed", "retrieved")}
    config = config_of(axes, weights=(1.0, 3.0))
    config.lock()  # as the entry points do
    members = sweep_members(config).items()
    of_stage = {name: member for name, member in members if member.teacher.stage == "passed"}
    shared = common(of_stage)
    assert (shared.train.steps, shared.teacher.stage) == (50, "passed")
    for key in schema.sweepable():
        section, _, last = key.name.rpartition(".")
        there = last in (schema.value_of(shared, section) if section else shared)
        assert there == (key.sweep == "cohorts" or key.name == "train.steps"), key.name
    # The members keep all.
    assert next(iter(of_stage.values())).distill.mode == "none"


def test_an_axis_that_a_sweep_is_extended_by_is_known_of_those_that_it_had(tmp_path):
    """Else a setting would be two: one of the repeats before, and one of those after."""
    planned(tmp_path, 8, config_of(modes=("shared",)))
    axes = {"distill.affine": (True, False)}
    sweep = planned(tmp_path, 8, config_of(axes, modes=("shared",), seeds=(0, 1)))
    assert list(map(len, sweep.plan)) == [1, 3]
    passed = {True: 20.0, False: 30.0}
    told = {"split": "validation", "role": "student", "serve": "user", "non_finite_step": None}
    names = ["member", "passed_for_99", *told, *results.SETTING, *results.REPEAT]
    names += results.OTHER_KEYS  # those that a sweep varies later too
    for cohort, folder in zip(sweep.cohorts, sweep.folders, strict=True):
        rows = [
            results.made_of(of)
            | told
            | {"member": name, "passed_for_99": passed[of.distill.affine]}
            for name, of in cohort.items()
        ]
        folder.mkdir(parents=True)
        (folder / results.FILE).write_text(results.to_csv(rows, list(dict.fromkeys(names))))
    students = results.with_labels(sweep.validation())
    affine = [sweep.members[name].distill.affine for name in students["member"]]
    assert students["distill.affine"].tolist() == affine
    assert students.groupby("setting")["repeat"].nunique().tolist() == [2, 2]
    assert len(results.chosen(sweep.validation())) == 4
