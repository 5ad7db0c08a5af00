"""The cost of a model and of a funnel, the choice of settings on validation, and their savings.

Rows are students and references of `results.csv` with three names, see
`setting_names.with_labels`: `setting` of all keys of a student except its seeds, or of a reference;
`method` of the keys that are not tuned; and `repeat` of the seeds. No choice sees the requests of
`test`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.evaluation.baselines import NEED_SCORES, NO_RANKERS
from kd_ranker.evaluation.metrics.target import CRITERION, SCORED
from kd_ranker.rivals.registry import family_of

Numbers = TypeVar("Numbers", float, np.ndarray)

# With these values mode `none` is plain: it learns from the labels of shown items.
PLAIN = {"unshown_weight": 0.0, "user_loss": "bce"}
# The savings, each against a separate baseline; see `baselines`.
SAVINGS = ("funnel_cost_saving", "saving_over_none", "saving_over_incumbent")


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of one call, from the compiled program's own cost analysis.

    The function of arrays, or of `jax.ShapeDtypeStruct`s, is compiled for a CPU, whatever device
    the models run on: a compiler counts its own output. It never runs. A matrix product [a, b] ·
    [b, c] counts 2abc. The body of a loop is counted once, however often it runs.

    Raises:
      UserError: the compiler reports no FLOPs for this program.
    """
    on_cpu = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_cpu), arguments
    )
    analysis = jax.jit(function).lower(*shapes).compile().cost_analysis() or {}
    if not analysis.get("flops", 0.0) > 0:
        raise UserError(
            "the compiler for CPUs reports no FLOPs for this program; use another release of jax"
        )
    return float(analysis["flops"])


def heads_read(probability: Callable[[Float[Array, "R N heads"]], Array], heads: int) -> int:
    """The number of a model's `heads` that a probability of `Mode.serve` reads.

    >>> heads_read(lambda logits: logits[..., :2], heads=6)
    2
    """
    # NaN passes through all arithmetic: the logits of request h are NaN at head h only.
    logits = jnp.where(jnp.eye(heads, dtype=bool), jnp.nan, 0.0)[:, None]
    return int(jnp.isnan(probability(logits)).any(axis=(1, 2)).sum())


class Costs(NamedTuple):
    """Costs in the user's own unit; FLOPs are the unit if `teacher` is 0.

    Those of a request are in addition to its candidates.
    """

    student: float = 0.0  # of a candidate; 0: the teacher's, times the ratio of their FLOPs
    student_request: float = 0.0
    teacher: float = 0.0  # of a candidate
    teacher_request: float = 0.0
    # Of a candidate, by the family of a rival. In the user's own unit, another family costs 0.
    rivals: tuple[tuple[str, float], ...] = ()

    @property
    def unit(self) -> str:
        """The unit as the end of a sentence."""
        return "in the units of costs" if self.teacher else "in FLOPs"


FLOPS = Costs()


def costs_of(config: ConfigDict) -> Costs:
    """Return the costs of `config.costs`."""
    costs = config.costs
    return Costs(
        student=costs.student.candidate,
        student_request=costs.student.request,
        teacher=costs.teacher.candidate,
        teacher_request=costs.teacher.request,
        # Runs of earlier releases lack the key.
        rivals=tuple(sorted(costs.get("rivals", {}).items())),
    )


def funnel_cost(
    candidates: float,
    scored: Numbers,
    student_flops: float,
    teacher_flops: float,
    costs: Costs = FLOPS,
) -> Numbers:
    """The mean cost of a request: candidates · student + scored · teacher, and its fixed part.

    Numbers of candidates are means over requests: those that the student ranks, and those that the
    teacher scores. FLOPs are per candidate; `costs` replace them. Where `costs.student` is 0, the
    student costs its FLOPs at the teacher's cost of a FLOP.

    >>> funnel_cost(candidates=2000, scored=200, student_flops=10.0, teacher_flops=200.0)
    60000.0
    >>> funnel_cost(2000, 200, 10.0, 200.0, Costs(teacher=3.0, teacher_request=100.0))
    1000.0
    """
    teacher = costs.teacher or teacher_flops
    student = costs.student or student_flops * (teacher / teacher_flops)
    of_requests = costs.student_request + costs.teacher_request
    return of_requests + candidates * student + scored * teacher


def of_split(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return the rows of a split, one of `request.SPLITS`."""
    return rows[rows["split"] == split]


def by_repeat(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A column of one split as a table of repeats by settings, in their order; NaN if unknown."""
    if measure not in rows:
        rows = rows.assign(**{measure: float("nan")})
    table = rows.pivot(index="repeat", columns="setting", values=measure)
    return table.reindex(columns=rows["setting"].unique()).astype(float)


def best(rows: pd.DataFrame, settings: Sequence[str]) -> str | None:
    """The best of `settings` on validation by `CRITERION`, see `best_of`; None if unknown."""
    return best_of(by_repeat(of_split(rows, "validation"), CRITERION)[list(settings)])


def best_of_methods(rows: pd.DataFrame) -> dict[str, str]:
    """The best setting of each method that is measured, in the order in which methods occur.

    Every method is tuned over heads, and over the swept values of keys that are `tuned`.
    """
    best_by_method = {}
    for method, method_rows in of_split(rows, "validation").groupby("method", sort=False):
        setting = best(rows, list(method_rows["setting"].unique()))
        if setting is not None:
            best_by_method[str(method)] = setting
    return best_by_method


def best_of_families(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the rival of each family that `CRITERION` prefers; of equals the first.

    `rows` are those of `results.csv` of one teacher on validation.
    """
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["role"] == "reference" and not np.isnan(row[CRITERION]):
            family = family_of(row["run"])
            if family not in best or row[CRITERION] < best[family][CRITERION]:
                best[family] = row
    return {str(row["run"]) for row in best.values()}


def best_of(table: pd.DataFrame) -> str | None:
    """The column of a table of `by_repeat` with the smallest mean; of equals the first.

    Only settings measured on as many repeats as any of them take part: a mean over fewer repeats
    may be good by luck, and a setting that diverges on some is not one to choose.
    """
    repeats = table.notna().sum()
    if not len(repeats) or not repeats.max():
        return None
    return str(table.loc[:, repeats == repeats.max()].mean().idxmin())


def needs_scores(rows: pd.DataFrame) -> pd.Series:
    """True for rows of students and references that need the final ranker's scores or its order.

    Training records this of a student, see `specs.needs_scores`, and fitting of a rival.
    """
    recorded = rows["needs_scores"] == True  # noqa: E712
    return recorded | rows["run"].isin(NEED_SCORES)


def baselines(rows: pd.DataFrame) -> dict[str, str]:
    """Return the baseline of each saving: column of `results.csv` -> the setting, if measured.

        funnel_cost_saving      the best ranker that needs no scores of the final ranker
        saving_over_none        the best setting of plain mode `none`
        saving_over_incumbent   the early ranker that filled the log

    The best ranker without scores is found in three steps, all on validation:

    1. Of all students without scores, take the one that passes fewest (`CRITERION`).
    2. Put the lists of items, the rivals without scores and the incumbent beside it.
    3. Of these, take the one with the cheapest funnel, as rankers of other kinds cost more or less.
       If no row has `funnel_cost`, take the one that passes fewest.

    A reference that is missing on one of the splits in `rows` cannot be a baseline.
    """
    splits = rows.groupby("setting")["split"].transform("nunique")
    rows = rows[(rows["role"] == "student") | (splits == rows["split"].nunique())]
    plain = (rows["mode"] == "none") & (rows[list(PLAIN)] == pd.Series(PLAIN)).all(axis=1)
    without = ~needs_scores(rows) & ~rows["run"].isin(NO_RANKERS)
    pools = {
        "funnel_cost_saving": without,
        "saving_over_none": plain & (rows["role"] == "student"),
        "saving_over_incumbent": rows["run"] == "incumbent",
    }
    best_of_pools = {column: _best_ranker(rows, rows[pool]) for column, pool in pools.items()}
    return {column: setting for column, setting in best_of_pools.items() if setting is not None}


def _best_ranker(rows: pd.DataFrame, pool: pd.DataFrame) -> str | None:
    """The best student or reference of a pool, see `baselines`.

    Students are first compared among each other by `CRITERION`; the best of them is compared with
    the references by cost. All are compared in the repeats in which each of them has a cost, as a
    student that diverged has none.
    """
    students = list(pool.loc[pool["role"] == "student", "setting"].unique())
    references = list(pool.loc[pool["role"] == "reference", "setting"].unique())
    validation = of_split(rows, "validation")
    table = by_repeat(validation, "funnel_cost")
    if table.isna().all(axis=None):
        table = by_repeat(validation, CRITERION)
    best_student = best(rows, students)
    compared = [best_student, *references] if best_student else references
    measured = table[compared].dropna(axis="columns", how="all")
    common_repeats = measured.dropna(axis="index")
    return best_of(common_repeats)


def with_costs(rows: pd.DataFrame, teacher_flops: float, costs: Costs = FLOPS) -> pd.DataFrame:
    """The labeled rows with `funnel_cost`, the mean cost of a request at `CRITERION`."""
    cost = []
    for row in rows.to_dict("records"):
        flops, own_costs = costs_as_early_ranker(row, costs)
        cost.append(funnel_cost(row["candidates"], row[SCORED], flops, teacher_flops, own_costs))
    return rows.assign(funnel_cost=np.array(cost, float))


def with_savings(rows: pd.DataFrame, against: Mapping[str, str]) -> pd.DataFrame:
    """The rows of `with_costs` with savings.

    A saving is 1 − cost / cost of the baseline in the same repeat, each at its own `CRITERION`: at
    most 1, and negative if this ranker costs more. NaN where the baseline, of those in `against`
    from `baselines`, was not measured.
    """
    rows = rows.copy()
    split_and_repeat = pd.MultiIndex.from_frame(rows[["split", "repeat"]])
    for column in SAVINGS:
        baseline = rows[rows["setting"] == against.get(column)]
        cost = baseline.set_index(["split", "repeat"])["funnel_cost"].reindex(split_and_repeat)
        rows[column] = 1 - rows["funnel_cost"].to_numpy() / cost.to_numpy(float)
    return rows


def costs_as_early_ranker(row: Mapping[Any, Any], costs: Costs) -> tuple[float, Costs]:
    """Return `student_flops` and `costs` of `funnel_cost` with the ranker of a row as the student.

    A reference costs nothing, except a rival. A final ranker in front of itself has its own cost.
    """
    flops = float(row.get("flops_per_candidate", math.nan))
    if row["role"] == "student":
        return flops, costs
    teacher_only = costs._replace(student=0.0, student_request=0.0)
    if row["role"] == "teacher":
        return flops, teacher_only
    if costs.teacher:
        rival_cost = dict(costs.rivals).get(family_of(row["run"]), 0.0)
        return 0.0, teacher_only._replace(student=rival_cost)
    return (0.0 if math.isnan(flops) else flops), teacher_only
