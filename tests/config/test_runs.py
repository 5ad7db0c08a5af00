import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_ranker.config import checks, schema
from kd_ranker.config.runs import list_runs, repeats, sweep_runs
from kd_ranker.configs import cascade
from kd_ranker.distillation import losses
from kd_ranker.evaluation import setting_names
from kd_ranker.training import specs
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.state import Constants
from kd_ranker.training.step import make_step, one_step
from tests.faults import fault_of
from tests.random_batches import SPEC, random_batch, random_items
from tests.sweeps import config_of


def valid_runs(config):
    checks.validate(config)
    return sweep_runs(config)


def value_in(runs, key):
    return [schema.value_of(run, key) for run in runs.values()]


def test_modes_times_weights_times_seeds_and_none_once_a_seed():
    modes = ("none", "aux", "shared")
    runs = valid_runs(config_of(modes=modes, weights=(0.5, 2, 2.0), seeds=(0, 7)))
    assert list(runs) == [
        f"{run}-seed{seed}"
        for seed in (0, 7)
        for run in (
            "none", "aux-weight0.5", "aux-weight2.0", "shared-weight0.5", "shared-weight2.0",
        )
    ]  # fmt: skip
    run = runs["aux-weight2.0-seed7"]
    assert run.distill.mode == "aux"
    assert run.distill.weight == 2.0
    assert run.seed == 7
    assert runs["none-seed0"].distill.weight == 0


def test_a_config_without_runs_and_axes_has_a_run_for_each_mode():
    assert list(valid_runs(config_of())) == [
        "none-seed0", "aux-weight1.0-seed0", "shared-weight1.0-seed0",
    ]  # fmt: skip


def test_the_runs_are_those_of_the_list_in_its_order():
    listed = [
        {"distill.mode": "aux", "distill.loss": "softmax + 0.5 * softmax:stage", "seed": 3},
        {"distill.mode": "none"},
        {"student.hidden": [64, 32]},
    ]
    runs = valid_runs(config_of(runs=list_runs(listed)))
    assert list(runs) == [
        "aux-softmax+0.5*softmax:stage-weight1.0-seed3",
        "none-seed0",
        "shared-weight1.0-hidden64x32-seed0",
    ]
    assert value_in(runs, "student.hidden") == [(64,), (64,), (64, 32)]


def test_an_axis_replaces_its_key_in_every_run():
    listed = [{"distill.mode": mode, "seed": seed} for mode in ("none", "aux") for seed in (0, 1)]
    config = config_of(runs=list_runs(listed), seeds=(1, 5), weights=(0.3, 3.0))
    assert set(valid_runs(config)) == {
        f"{run}-seed{seed}" for run in ("none", "aux-weight0.3", "aux-weight3.0") for seed in (1, 5)
    }


def test_numbers_are_swept_and_the_tables_rate_keeps_its_ratio():
    axes = {"distill.temperature": (1.0, 2.0), "optimizer.learning_rate": (0.01, 0.02)}
    config = config_of(axes, modes=("none", "shared"))
    config.optimizer.learning_rate = 0.01
    config.optimizer.table_learning_rate = 0.006
    runs = valid_runs(config)
    assert list(runs) == [
        "none-seed0",
        "none-rate0.02-seed0",
        "shared-weight1.0-seed0",
        "shared-weight1.0-temperature2.0-seed0",
        "shared-weight1.0-rate0.02-seed0",
        "shared-weight1.0-temperature2.0-rate0.02-seed0",
    ]
    assert value_in(runs, "distill.temperature")[2:] == [1, 2, 1, 2]
    rates = [0.006, 0.012, 0.006, 0.006, 0.012, 0.012]
    assert value_in(runs, "optimizer.table_learning_rate") == pytest.approx(rates)


def another_value(key, value):
    """A second value of a key."""
    if key.name == "distill.loss":
        return "topk:stage"
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return next(name for name in key.allowed if name != value)
    if isinstance(value, tuple):
        return (*value, 8)
    if isinstance(value, float):
        return value / 2 or 0.5
    if value == 32:
        return 48
    return value + 1


def test_any_key_that_a_sweep_may_vary_is_an_axis():
    for key in schema.sweepable():
        if key.name in schema.NAMED_AXES:
            continue
        value = schema.value_of(cascade("small"), key.name)
        values = (value, another_value(key, value))
        runs = valid_runs(config_of({key.name: values}, modes=("none", "aux")))
        assert {*value_in(runs, key.name)} == {*values}, key.name
        # Mode none reads nothing of `distill`, so it stands once for all that is swept there.
        assert len(runs) == (1 if key.of_distillation else 2) + 2, key.name


AXES = {
    "batch.seed": (0, 1),
    "distill.temperature": (1.0, 4.0),
    "student.width": (32, 16),
    "student.hidden": ((64,), (64, 32)),
    "train.steps": (20, 10),
}


def test_the_names_of_runs_tell_every_two_apart():
    shorts = collections.Counter(key.short for key in schema.sweepable())
    assert {name for name, number in shorts.items() if number > 1} <= {"name"}
    runs = valid_runs(config_of(AXES))
    assert len({run.to_json(sort_keys=True) for run in runs.values()}) == len(runs)


def test_whole_repeats_have_the_seeds_of_the_runs():
    listed = list_runs({"seed": seed} for seed in (3, 4))
    config = config_of(runs=listed, whole_repeats=True)
    assert [repeat.seed for repeat in repeats(config)] == [3, 4]
    assert value_in(valid_runs(config), "batch.seed") == [3, 4]


LISTED = list_runs({"distill.mode": mode} for mode in ("none", "aux", "shared"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"weights": (1.0,)}, {"weights": (1.0, 3.0), "axes": AXES}),
        ({"runs": LISTED[:1]}, {"runs": LISTED}),
        ({"runs": LISTED}, {"runs": LISTED, "seeds": (0, 1)}),
    ],
)
def test_a_sweep_that_grows_keeps_its_runs(before, after):
    runs_before = sweep_runs(config_of(**before))
    runs_after = sweep_runs(config_of(**after))

    assert [name for name in runs_after if name in runs_before] == list(runs_before)
    for name, run in runs_before.items():
        found = runs_after[name].to_dict()
        expected = run.to_dict()
        del found["sweep"]
        del expected["sweep"]
        assert found == expected


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"axes": {"distill.loss": ("hinge",)}}, "loss='hinge' does not exist; choose one of"),
        ({"axes": {"student.hidden": ((16, 0),)}}, "has 0; it takes whole numbers > 0"),
        # Values that other keys replace.
        ({"whole_repeats": True, "axes": {"batch.seed": (0,)}}, "leave batch.seed out of the runs"),
        ({"runs": ({"seed": 0}, {"distil.mode": "aux"})}, "run 1 of the sweep sets 'distil.mode'"),
        ({"runs": ({"data.name": "cascade"},)}, "sets 'data.name', which no sweep varies"),
        ({"runs": ({"train.steps": 5.5},)}, "run 0 of the sweep: train.steps has 5.5; it takes"),
        ({"runs": ({"seed": 1}, {"seed": 2}, {"seed": 1})}, "runs 0 and 2 of the sweep are the sa"),
        ({"runs": (1,)}, "sweep.runs has 1; it takes dicts of values by key"),
    ],
)
def test_bad_axes_and_runs_are_one_line(sweep, message):
    assert message in fault_of(valid_runs, config_of(**sweep))


@pytest.mark.parametrize(
    ("runs", "message"), [([], "the sweep yields no run"), (["aux"], "run 0 of the sweep is 'aux'")]
)
def test_a_list_without_runs_is_one_line(runs, message):
    assert message in fault_of(list_runs, runs)


def test_numbers_of_a_new_loss_vary_within_one_program(monkeypatch):
    def lead(logits, probability, weight, numbers=losses.DEFAULT_NUMBERS):
        known = jnp.where(weight > 0, probability, 0.5)
        values = jnp.maximum(numbers.own["least"] - (2 * known - 1) * logits, 0.0)
        return losses.weighted_totals(values, weight)

    monkeypatch.setitem(losses.LOSSES, "lead", losses.Loss(lead, numbers={"least": 1.0}))
    config = config_of(modes=("shared",))
    config.distill.loss = "lead"
    (default,) = specs.student_stacks(sweep_runs(config), SPEC)
    assert default.hyperparameters.loss_numbers.own["least"].tolist() == [1.0]
    config.sweep.axes.distill.numbers = ((0.5,), (2.0,))
    (stack,) = specs.student_stacks(valid_runs(config), SPEC)
    assert stack.hyperparameters.loss_numbers.own["least"].tolist() == [0.5, 2.0]
    mapping = MAPPINGS["shard_map"](jax.devices()[:1])
    step = mapping.map_step(one_step(make_step([stack.train_spec])))
    state = mapping.create(lambda row_sharding: (stack.init(),))
    constants = mapping.place(Constants(random_items(), None))
    _, of_stacks = step(state, mapping.shard(random_batch(0)), (stack.hyperparameters,), constants)
    small, large = np.asarray(of_stacks[0]["distill_loss"]).ravel()
    assert large > small > 0
    assert "distill.numbers" in setting_names.OTHER_KEYS  # a column of results.csv


def test_too_many_numbers_of_a_loss_are_one_line(monkeypatch):
    own_loss = losses.LOSSES["bce"]._replace(numbers={"least": 1.0})
    monkeypatch.setitem(losses.LOSSES, "lead", own_loss)
    config = config_of(modes=("shared",))
    config.distill.loss = "lead"
    config.sweep.axes.distill.numbers = ((0.5, 2.0),)

    fault = fault_of(specs.student_stacks, sweep_runs(config), SPEC)

    assert "has 2 numbers, and the losses take 1 (least)" in fault
