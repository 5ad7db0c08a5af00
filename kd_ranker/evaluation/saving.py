"""The choice of settings on validation, the baselines, and the savings of a funnel against them.

Rows are students and references of `results.csv` with three more columns. `setting` is a label of
all keys of a student except its seeds, or the name of a reference. `way` is the same without tuned
keys. `repeat` is a label of the seeds.

All choices are made on rows of the split `validation`. No choice sees the requests of `test`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kd_ranker.evaluation.cost import FLOPS, Costs, funnel_cost, funnel_cost_saving
from kd_ranker.evaluation.references import NEED_SCORES, NO_RANKERS

# The smaller mean over repeats is chosen.
CRITERION = "passed_for_99"
# The mean number of candidates that the final ranker scores then: its part of the cost.
SCORED = "scored_for_99"
# With these values mode `none` is plain: it learns from the labels of shown items.
PLAIN = {"unshown_weight": 0.0, "user_loss": "bce"}
# The savings, each against a separate baseline; see `baselines`.
SAVINGS = ("funnel_cost_saving", "saving_over_none", "saving_over_incumbent")


def of_split(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return the rows of a split, one of `request.SPLITS`."""
    return rows[rows["split"] == split]


def by_repeat(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A measure as a table: a line a repeat, a column a setting, NaN where it is not known.

    Args:
      rows: of one split.
      measure: a column.
    """
    if measure not in rows:
        rows = rows.assign(**{measure: float("nan")})
    table = rows.pivot(index="repeat", columns="setting", values=measure)
    # In the order of the file, not of the alphabet.
    return table.reindex(columns=rows["setting"].unique()).astype(float)


def best(rows: pd.DataFrame, settings: Sequence[str]) -> str | None:
    """The best of `settings` on validation by `CRITERION`; of equals the first.

    Returns:
      None if none is measured.
    """
    return best_of(by_repeat(of_split(rows, "validation"), CRITERION)[list(settings)])


def best_of_ways(rows: pd.DataFrame) -> dict[str, str]:
    """The best setting of each way that is measured, in the order in which ways occur.

    Every way is tuned alike: over serving choices, and over all values that a sweep has tried of
    keys that are `tuned`.
    """
    of_ways = {
        str(way): best(rows, list(of_way["setting"].unique()))
        for way, of_way in of_split(rows, "validation").groupby("way", sort=False)
    }
    return {way: setting for way, setting in of_ways.items() if setting is not None}


def best_of(table: pd.DataFrame) -> str | None:
    """The column of a table of `by_repeat` with the smallest mean, as in `best`.

    Only settings measured on as many repeats as any of them take part: a mean over fewer repeats
    may be good by luck, and a setting that diverges on some is not one to choose.
    """
    repeats = table.notna().sum()
    if not len(repeats) or not repeats.max():
        return None
    return str(table.loc[:, repeats == repeats.max()].mean().idxmin())


def needs_scores(rows: pd.DataFrame) -> pd.Series:
    """True for rows of students and references that need the final ranker's scores or its order.

    A student needs none in mode `none`, or if all its distillation terms learn from the stage.
    """

    def of_terms(losses: object) -> bool:
        return any(not term.endswith(":stage") for term in str(losses).split("+"))

    distilled = (rows["role"] == "student") & rows["distill_loss"].notna()
    by_terms = rows["distill_loss"].map(of_terms).astype(bool)
    return (distilled & by_terms) | rows["member"].isin(NEED_SCORES)


def baselines(rows: pd.DataFrame) -> dict[str, str]:
    """Return the baseline of each saving: column of `results.csv` -> the setting, if measured.

    `funnel_cost_saving` is against the best of all that needs no scores of the final ranker:
    students, lists of items, and the incumbent. `saving_over_none` is against the best setting of
    plain mode `none`, and `saving_over_incumbent` against the early ranker that filled the log.

    Args:
      rows: students and references of both splits. A reference that is missing on one split
        cannot be a baseline.
    """
    splits = rows.groupby("setting")["split"].transform("nunique")
    rows = rows[(rows["role"] == "student") | (splits == rows["split"].nunique())]
    plain = (rows["role"] == "student") & (rows["mode"] == "none")
    for key, value in PLAIN.items():
        if key in rows:
            plain &= rows[key].isin([value])
    without = ~needs_scores(rows) & ~rows["member"].isin(NO_RANKERS)
    pools = {
        "funnel_cost_saving": without,
        "saving_over_none": plain,
        "saving_over_incumbent": rows["member"] == "incumbent",
    }
    found = {column: _best_ranker(rows, rows[pool]) for column, pool in pools.items()}
    return {column: setting for column, setting in found.items() if setting is not None}


def _best_ranker(rows: pd.DataFrame, pool: pd.DataFrame) -> str | None:
    """The best student or reference of a pool, as in `best`, in the repeats that both have.

    A reference has every repeat, even one in which all students of the pool diverged.
    """
    students, references = (
        list(pool.loc[pool["role"] == role, "setting"].unique())
        for role in ("student", "reference")
    )
    table = by_repeat(of_split(rows, "validation"), CRITERION)
    named = [*filter(None, [best(rows, students)]), *references]
    return best_of(table[named].dropna(axis="columns", how="all").dropna())


def with_savings(
    rows: pd.DataFrame, against: Mapping[str, str], teacher_flops: float, costs: Costs = FLOPS
) -> pd.DataFrame:
    """The rows with `funnel_cost`, the mean cost of a request at `CRITERION`, and `SAVINGS`.

    A saving is NaN where its baseline was not measured on the same split and repeat.

    Args:
      rows: students and references, with labels.
      against: of `baselines`.
      teacher_flops: FLOPs a candidate of the teacher.
      costs: what takes the place of FLOPs.
    """
    cost = [_cost(row, teacher_flops, costs) for row in rows.to_dict("records")]
    rows = rows.assign(funnel_cost=np.array(cost, float))
    for column in SAVINGS:
        of_baseline = rows[rows["setting"] == against.get(column)]
        known = of_baseline.set_index(["split", "repeat"])["funnel_cost"]
        at = pd.MultiIndex.from_frame(rows[["split", "repeat"]])
        rows[column] = funnel_cost_saving(
            rows["funnel_cost"].to_numpy(), known.reindex(at).to_numpy(float)
        )
    return rows


def _cost(row: Mapping[Any, Any], teacher_flops: float, costs: Costs) -> float:
    flops, costs = student_cost(row, costs)
    return funnel_cost(row["candidates"], row[SCORED], flops, teacher_flops, costs)


def student_cost(row: Mapping[Any, Any], costs: Costs) -> tuple[float, Costs]:
    """FLOPs a candidate of a row's ranker, and the costs with it; a reference costs nothing."""
    if row["role"] == "reference":
        return 0.0, costs._replace(student=0.0, student_request=0.0)
    return float(row["flops_per_candidate"]), costs
