"""`results.csv`: one row a trained model and serving choice."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from kd_ranker.evaluation.cost import funnel_cost, funnel_cost_saving

Row = dict[str, object]
FILE = "results.csv"


def columns(tasks: Sequence[str], report_at: Sequence[int]) -> list[str]:
    """The columns of `results.csv` in their order."""
    per_task = ("user_bce", "user_auc", "user_calibration", "teacher_bce", "teacher_kl")
    per_k = ("survival", "value_captured", "true_value_captured")
    return [
        *("dataset", "role", "mode", "distill_loss", "distill_weight", "serve", "seed", "step"),
        *(f"{name}/{task}" for name in per_task for task in tasks),
        "alignment_ratio",
        *(f"{name}@{k}" for name in per_k for k in report_at),
        *("passed_for_99", "flops_per_candidate", "cost_ratio", "funnel_cost_saving"),
    ]


def with_cost(row: Row, flops_per_candidate: float, teacher_flops: float) -> Row:
    """The row with the cost of its model beside the teacher's."""
    return row | {
        "flops_per_candidate": flops_per_candidate,
        "cost_ratio": flops_per_candidate / teacher_flops,
    }


def with_savings(rows: Sequence[Row], retrieved: int) -> list[Row]:
    """The rows with `funnel_cost_saving`, where the mode `none` of the same seed is among them."""
    teacher_flops = {
        row["dataset"]: row["flops_per_candidate"] for row in rows if row["role"] == "teacher"
    }

    def cost(row: Row) -> float:
        return funnel_cost(
            retrieved,
            float(str(row["passed_for_99"])),
            float(str(row["flops_per_candidate"])),
            float(str(teacher_flops[row["dataset"]])),
        )

    students = [row for row in rows if row["role"] == "student" and row["dataset"] in teacher_flops]
    baselines = {
        (row["dataset"], row["seed"]): cost(row) for row in students if row["mode"] == "none"
    }
    return [
        row
        | {
            "funnel_cost_saving": funnel_cost_saving(
                cost(row), baselines[row["dataset"], row["seed"]]
            )
        }
        if row in students and (row["dataset"], row["seed"]) in baselines
        else row
        for row in rows
    ]


def to_csv(rows: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    """The text of `results.csv`: numbers to seven digits, nothing where a number is not known."""

    def cell(value: object) -> object:
        if isinstance(value, float):
            return None if math.isnan(value) else f"{value:.7g}"
        return value

    table = [{name: cell(row.get(name)) for name in names} for row in rows]
    # As objects: a column of numbers would write its integers as 0.0 where one is not known.
    frame = pd.DataFrame(table, columns=list(names), dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")


def read_csv(path: Path) -> pd.DataFrame:
    """A `results.csv` as a table; a number that is not known is NaN."""
    # "none" is a mode here, and pandas would read it as missing.
    return pd.read_csv(path, keep_default_na=False, na_values=[""])
