"""The cost of a model per candidate in FLOPs, and of a funnel per request in any unit."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from kd_ranker.errors import UserError

Numbers = TypeVar("Numbers", float, np.ndarray)


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of one call, from the compiled program's own cost analysis.

    The program is compiled for a CPU, whatever device the models run on: a compiler counts its own
    output, so the number would differ between devices.

    The count is XLA's: a multiplication and an addition are two operations, so a matrix product
    [a, b] · [b, c] counts 2abc. The body of a loop (`lax.scan`, `lax.while_loop`) is counted once,
    however often it runs.

    Args:
      function: a function of arrays, compiled here and never run.
      *arguments: its arguments, arrays or `jax.ShapeDtypeStruct`s, or pytrees of them.

    Raises:
      UserError: the compiler reports no FLOPs for this program.
    """
    place = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arguments
    )
    analysis = jax.jit(function).lower(*shapes).compile().cost_analysis()
    # One dict, or in some versions and backends a list with one dict a program, or nothing.
    programs = analysis if isinstance(analysis, list | tuple) else [analysis]
    counted = [float((program or {}).get("flops", 0.0)) for program in programs]
    total = sum(counted)
    if not total > 0:
        raise UserError(
            "the compiler for CPUs reports no FLOPs for this program; use another release of jax"
        )
    return total


def heads_read(probability: Callable[[Float[Array, "R N heads"]], Array], heads: int) -> int:
    """The number of a model's heads that a served probability reads; others need not be served.

    Args:
      probability: from logits to the probabilities served, see `Mode.serve`.
      heads: of the model.

    >>> heads_read(lambda logits: logits[..., :2], heads=6)
    2
    """
    # NaN passes through all arithmetic: the logits of request h are NaN at head h only.
    logits = jnp.where(jnp.eye(heads, dtype=bool), jnp.nan, 0.0)[:, None]
    return int(jnp.isnan(probability(logits)).any(axis=(1, 2)).sum())


class Costs(NamedTuple):
    """Costs in a unit of the user's own; without that of a teacher's candidate, FLOPs are the unit.

    Attributes:
      student: of a candidate; 0: as much less than the teacher's as its FLOPs are.
      student_request: of a request, in addition to its candidates.
      teacher: of a candidate.
      teacher_request: of a request, in addition to its candidates.
    """

    student: float = 0.0
    student_request: float = 0.0
    teacher: float = 0.0
    teacher_request: float = 0.0

    @property
    def unit(self) -> str:
        """The unit as the end of a sentence."""
        return "in the units of costs" if self.teacher else "in FLOPs"


FLOPS = Costs()
"""The models' FLOPs are the costs."""


def costs_of(config: ConfigDict) -> Costs:
    """Return the costs of `config.costs`."""
    student, teacher = config.costs.student, config.costs.teacher
    return Costs(student.candidate, student.request, teacher.candidate, teacher.request)


def funnel_cost(
    candidates: float,
    scored: Numbers,
    student_flops: float,
    teacher_flops: float,
    costs: Costs = FLOPS,
) -> Numbers:
    """The mean cost of a request: candidates · student + scored · teacher, and its fixed part.

    Args:
      candidates: mean candidates of a request, which the student ranks.
      scored: mean candidates that the teacher ranks: min(k, those of the request) if k are passed.
      student_flops: FLOPs a candidate.
      teacher_flops: the same of the teacher.
      costs: what takes the place of FLOPs.

    >>> funnel_cost(candidates=2000, scored=200, student_flops=10.0, teacher_flops=200.0)
    60000.0
    >>> funnel_cost(2000, 200, 10.0, 200.0, Costs(teacher=3.0, teacher_request=100.0))
    1000.0
    """
    teacher = costs.teacher or teacher_flops
    student = costs.student or student_flops * (teacher / teacher_flops)
    of_requests = costs.student_request + costs.teacher_request
    return of_requests + candidates * student + scored * teacher


def whole_cost(candidates: float, teacher_flops: float, costs: Costs = FLOPS) -> float:
    """Return the cost of one request if all retrieved candidates reach the teacher, no student.

    >>> whole_cost(candidates=2000, teacher_flops=200.0)
    400000.0
    """
    return costs.teacher_request + candidates * (costs.teacher or teacher_flops)


def funnel_cost_saving(cost: Numbers, baseline_cost: Numbers) -> Numbers:
    """1 - cost / baseline cost: the share of the baseline's compute that is saved, at most 1.

    The costs are `funnel_cost` of this student and of the baseline in the same repeat, each at its
    own `passed_for_99`; see `saving.baselines`. Negative where this student costs more.

    >>> funnel_cost_saving(cost=45_000.0, baseline_cost=60_000.0)
    0.25
    """
    return 1 - cost / baseline_cost
