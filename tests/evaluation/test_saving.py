"""The cost model, and the choice of settings on validation; savings are in the tests of results."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from kd_ranker.config import defaults
from kd_ranker.distillation.teacher_signal import SIGNALS
from kd_ranker.errors import UserError
from kd_ranker.evaluation import saving
from kd_ranker.evaluation.metrics.target import CRITERION
from kd_ranker.training import specs
from tests.sweeps import needs_scores

NAN = math.nan


def test_flops_are_those_of_a_product_wherever_the_arrays_are() -> None:
    weights = jax.device_put({"first": jnp.ones((16, 4))}, jax.devices()[2])
    inputs = jax.device_put(jnp.ones((8, 16)), jax.devices()[3])

    def product(weights, inputs):
        return inputs @ weights["first"]

    with jax.default_device(jax.devices()[1]):
        assert saving.flops(product, weights, inputs) == 2 * 8 * 16 * 4


def test_a_program_without_flops_is_an_error() -> None:
    def first(values):
        return values[0]

    with pytest.raises(UserError, match="reports no FLOPs"):
        saving.flops(first, jnp.ones(3))


def test_funnel_cost_in_the_users_own_unit_by_hand() -> None:
    config = defaults.get_config("cascade")
    assert saving.costs_of(config) == saving.FLOPS
    # In microseconds: 2000 · 0.2 + 200 · 4, and 30 + 50 a request.
    config.costs.update(teacher={"candidate": 4.0, "request": 50.0})
    config.costs.update(student={"candidate": 0.2, "request": 30.0})
    config.costs.rivals = {"trees on labels": 1.5}
    costs = saving.costs_of(config)

    def cost_of(role: str, run: str = "") -> float:
        row = {"role": role, "run": run, "flops_per_candidate": 100.0}
        flops, own = saving.costs_as_early_ranker(row, costs)
        return saving.funnel_cost(2000, 200, flops, 100.0, own)

    assert cost_of("student") == 1280
    # A reference costs nothing, and a final ranker in front of itself what it costs.
    assert cost_of("reference") == 50 + 200 * 4
    assert cost_of("teacher") == 50 + 2000 * 4 + 200 * 4
    assert cost_of("reference", "trees on labels: with item rates") == 50 + 2000 * 1.5 + 200 * 4
    assert cost_of("reference", "EASE: regularization 300") == 50 + 200 * 4
    # In FLOPs, a rival costs its operations.
    row = {"role": "reference", "run": "EASE: regularization 300", "flops_per_candidate": 7.0}
    flops, own = saving.costs_as_early_ranker(row, saving.FLOPS)
    assert saving.funnel_cost(2000, 200, flops, 100.0, own) == 2000 * 7 + 200 * 100
    # Without a cost of the student, it is its FLOPs' share of the teacher's: 5% of 4.
    config.costs.student.candidate = 0.0
    assert saving.funnel_cost(2000, 200, 5.0, 100.0, saving.costs_of(config)) == pytest.approx(1280)


def needs_scores_of(method):
    """A method ends with its terms, unless its mode is `none`."""
    return not method.startswith(("none", "list")) and needs_scores("student", method.split()[-1])


def rows_of(passed_by_setting, split="validation"):
    """Rows of methods -> settings -> `passed_for_99` by repeat; None leaves one out."""
    lines = [
        {"split": split, "method": method, "setting": f"{method} {name}", "repeat": str(repeat),
         "mode": method.split()[0], "role": "student", "run": f"{method} {name}",
         "distill_loss": None if method.startswith("none") else method.split()[-1],
         "needs_scores": needs_scores_of(method), CRITERION: passed, **saving.PLAIN}
        for method, settings in passed_by_setting.items()
        for name, by_repeat in settings.items()
        for repeat, passed in enumerate(by_repeat)
        if passed is not None
    ]  # fmt: skip
    return pd.DataFrame(lines)


def test_only_validation_decides():
    validation = rows_of({"none": {"a": [400, 420], "b": [300, 310]}, "aux": {"a": [500, 510]}})
    for on_test in ([1, 1], [NAN, NAN], [9999, 1]):
        test = rows_of({"none": {"a": on_test}, "aux": {"b": on_test}}, split="test")
        rows = pd.concat([test, validation, test.assign(repeat="7")], ignore_index=True)
        assert saving.best_of_methods(rows) == {"none": "none b", "aux": "aux a"}
        assert saving.baselines(rows)["funnel_cost_saving"] == "none b"
    unknown = rows_of({"none": {"a": [NAN, NAN]}, "aux": {"a": [300, 310]}})
    assert saving.best_of_methods(unknown) == {"aux": "aux a"}
    assert saving.baselines(unknown) == {}
    assert saving.best(unknown, []) is None


@pytest.mark.parametrize("lacks", [None, NAN])
def test_fewer_repeats_are_not_chosen_and_ties_go_to_the_first(lacks):
    rows = rows_of(
        {
            "none": {"a": [400, 420], "b": [100, lacks]},
            "aux": {"a": [310, lacks], "b": [300, lacks]},
            "shared": {"b": [300, 300], "a": [310, 290]},
        }
    )
    assert saving.best_of_methods(rows) == {"none": "none a", "aux": "aux b", "shared": "shared b"}


def references_of(numbers, split="validation"):
    """Rows of references, with a number for each repeat or one for both."""
    return pd.concat(
        rows_of({"list": {name: np.broadcast_to(number, 2).tolist()}}, split).assign(
            role="reference", run=name, setting=name
        )
        for name, number in numbers.items()
    )


def test_each_saving_has_the_baseline_that_it_names():
    rows = rows_of(
        {
            "none": {"plain": [300, 310], "unshown": [200, 210], "list loss": [100, 110]},
            "aux topk:stage": {"a": [150, 160]},
            "aux softmax:stage+topk:stage": {"a": [140, 150]},
            "aux topk:stage+bce": {"a": [20, 20]},
            "aux topk": {"a": [30, 30]},
        }
    )
    by_name = rows["setting"].str
    rows["unshown_weight"] = by_name.endswith("unshown") * 0.1
    rows["user_loss"] = by_name.endswith("list loss").map({True: "softmax", False: "bce"})
    numbers = {"oracle": 10, "random": 50, "incumbent": 400, "popularity": 180, "show_rate": 145}
    references = references_of(numbers | {"top_rate": 40, "static_list": 45})
    whole = pd.concat([rows, references], ignore_index=True)
    assert saving.baselines(whole) == {
        "funnel_cost_saving": "none list loss",
        "saving_over_none": "none plain",
        "saving_over_incumbent": "incumbent",
    }
    without = whole[whole["setting"] != "none list loss"]
    # 145, as the mean of the two terms.
    assert saving.baselines(without)["funnel_cost_saving"] == "aux softmax:stage+topk:stage a"
    lists = without[~without["setting"].str.contains("stage a")]
    assert saving.baselines(lists)["funnel_cost_saving"] == "show_rate"


def test_the_baseline_has_the_cheapest_funnel():
    rows = references_of({"trees on labels": 100, "show_rate": 120})
    # 2000 candidates at 1 or 0 FLOPs, and those that pass at 50.
    rows = rows.assign(
        candidates=2000.0,
        scored_for_99=rows["passed_for_99"],
        flops_per_candidate=rows["run"].map({"trees on labels": 1.0}),
    )

    ranked = saving.with_costs(rows, teacher_flops=50.0)

    assert set(ranked["funnel_cost"]) == {2000 + 100 * 50, 120 * 50}
    assert saving.baselines(ranked)["funnel_cost_saving"] == "show_rate"
    assert saving.baselines(rows)["funnel_cost_saving"] == "trees on labels"


def test_what_training_recorded_decides_who_needs_scores():
    rows = rows_of({"none": {"a": [100, 100], "b": [300, 310]}, "aux topk": {"a": [200, 200]}})
    assert saving.baselines(rows)["funnel_cost_saving"] == "none a"
    # It started from a distilled student; the other learns from a signal without scores.
    recorded = {"none a": True, "none b": False, "aux topk a": False}
    rows["needs_scores"] = rows["setting"].map(recorded)
    assert saving.baselines(rows)["funnel_cost_saving"] == "aux topk a"


@pytest.mark.parametrize("needed", [True, False])
def test_a_signal_declares_whether_it_needs_scores(monkeypatch, needed):
    signal = SIGNALS["stage"]._replace(needs_scores=needed)
    monkeypatch.setitem(SIGNALS, "own", signal)
    config = defaults.get_config("cascade")
    config.distill.mode, config.distill.loss = "aux", "topk:own"
    assert specs.needs_scores(config) == needed
    config.batch.sampler = "hard"
    assert specs.needs_scores(config)


@pytest.mark.parametrize("lacking", ["validation", "test"])
def test_a_reference_that_one_split_lacks_is_no_baseline(lacking):
    """A saving against it would be unknown on that split."""
    students = {"none": {"a": [300, 310]}, "aux topk": {"a": [200, 210]}}
    rows = pd.concat([rows_of(students, split) for split in ("validation", "test")])
    (split,) = {"validation", "test"} - {lacking}
    of_list = references_of({"incumbent": 100}, split)
    whole = pd.concat([rows, of_list], ignore_index=True)
    assert saving.baselines(whole) == dict.fromkeys(
        ("funnel_cost_saving", "saving_over_none"), "none a"
    )
    both = pd.concat([whole, of_list.assign(split=lacking)], ignore_index=True)
    assert saving.baselines(both)["funnel_cost_saving"] == "incumbent"


@pytest.mark.parametrize(
    ("number", "expected"), [(305, "none a"), (295, "show_rate"), (NAN, "none a")]
)
def test_a_saving_uses_the_repeats_that_both_rankers_have(number, expected):
    """Else any list, which has every repeat, would be the baseline of a sweep that lost one."""
    students = rows_of({"none": {"a": [300, None]}, "aux topk": {"a": [200, 200]}})
    of_list = references_of({"show_rate": [number, min(number, 1)]})
    rows = pd.concat([students, of_list], ignore_index=True)
    assert saving.baselines(rows)["funnel_cost_saving"] == expected
