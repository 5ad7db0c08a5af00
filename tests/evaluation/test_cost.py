"""The cost model: counts of known programs, and the funnel's arithmetic."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_ranker.config import defaults
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import UserError
from kd_ranker.evaluation import cost


def test_flops_of_a_matrix_product() -> None:
    left, right = jax.eval_shape(lambda: (jnp.ones((8, 16)), jnp.ones((16, 4))))
    assert cost.flops(lambda a, b: a @ b, left, right) == 2 * 8 * 16 * 4


def test_flops_of_a_large_product_of_arrays_in_a_pytree() -> None:
    weights = {"first": jnp.ones((64, 128)), "second": jnp.ones((128, 32))}
    inputs = jax.eval_shape(lambda: jnp.ones((100, 64)))
    counted = cost.flops(lambda w, x: x @ w["first"] @ w["second"], weights, inputs)
    assert counted == pytest.approx(2 * 100 * (64 * 128 + 128 * 32), rel=0.01)


def test_flops_are_of_a_program_for_one_cpu_wherever_the_arrays_lie(monkeypatch) -> None:
    """Neither where they lie nor what a step runs on by default has a say."""
    asked = []
    compiled = jax.stages.Lowered.compile

    def spied(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        asked.append(program := compiled(lowered))
        return program

    monkeypatch.setattr(jax.stages.Lowered, "compile", spied)
    left, right = (jax.device_put(jnp.ones((8, 8)), jax.devices()[at]) for at in (2, 3))
    with jax.default_device(jax.devices()[1]):
        assert cost.flops(lambda a, b: a @ b, left, right) == 2 * 8 * 8 * 8
    (program,) = asked
    places, _ = program.input_shardings
    assert {device for place in places for device in place.device_set} == {jax.devices("cpu")[0]}


def test_no_flops_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(UserError, match="reports no FLOPs"):
        cost.flops(lambda a: a[0], jnp.ones(3))


@pytest.mark.parametrize(
    ("analysis", "expected"), [({"flops": 7.0}, 7.0), ([{"flops": 7.0}], 7.0), (None, None)]
)
def test_flops_reads_every_form_of_report(
    monkeypatch: pytest.MonkeyPatch, analysis: Any, expected: float | None
) -> None:
    class Program:
        def lower(self, *_: Any) -> "Program":
            return self

        def compile(self) -> "Program":
            return self

        def cost_analysis(self) -> Any:
            return analysis

    monkeypatch.setattr(jax, "jit", lambda _: Program())
    if expected is None:
        with pytest.raises(UserError):
            cost.flops(lambda: None)
    else:
        assert cost.flops(lambda: None) == expected


@pytest.mark.parametrize(
    ("mode", "serve", "heads"),
    [
        *(("none", "user", 3), ("shared", "user", 3)),
        *(("aux", "user", 3), ("aux", "teacher", 3), ("aux", "blend", 6)),
    ],
)
def test_the_heads_that_a_serving_choice_reads(mode: str, serve: str, heads: int) -> None:
    served = MODES[mode].serve[serve]
    assert cost.heads_read(served, MODES[mode].heads_per_task * 3) == heads


def test_funnel_cost_by_hand() -> None:
    # A student of 5% of the teacher: 2000 · 5 + 200 · 100, and with half as many passed.
    baseline = cost.funnel_cost(2000, 200, 5.0, 100.0)
    distilled = cost.funnel_cost(2000, 100, 5.0, 100.0)
    assert baseline == 30_000
    assert distilled == 20_000
    assert cost.funnel_cost_saving(distilled, baseline) == pytest.approx(1 / 3)
    assert np.isnan(cost.funnel_cost(2000, float("nan"), 5.0, 100.0))


def test_funnel_cost_in_a_unit_of_ones_own_by_hand() -> None:
    config = defaults.get_config("cascade")
    assert cost.costs_of(config) == cost.FLOPS
    # In microseconds: 2000 · 0.2 + 200 · 4, and 30 + 50 a request.
    config.costs.update(teacher={"candidate": 4.0, "request": 50.0})
    config.costs.update(student={"candidate": 0.2, "request": 30.0})
    assert cost.funnel_cost(2000, 200, 5.0, 100.0, cost.costs_of(config)) == 1280
    # All 2000 by the teacher alone, which no student's request is part of.
    assert cost.whole_cost(2000, 100.0, cost.costs_of(config)) == 8050
    # A student of which nothing is said costs its FLOPs' share of the teacher: 5% of 4.
    config.costs.student.candidate = 0.0
    assert cost.funnel_cost(2000, 200, 5.0, 100.0, cost.costs_of(config)) == pytest.approx(1280)
