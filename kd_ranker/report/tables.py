"""Tables of results for people."""

from pathlib import Path

import numpy as np
import pandas as pd

from kd_ranker.evaluation import results


def results_text(workdir: Path, passed: int) -> str:
    """The table of a workdir's `results.csv`, and where that lies."""
    path = workdir / results.FILE
    return f"{summary_table(results.read_csv(path), passed)}\n\nresults: {path}"


def summary_table(frame: pd.DataFrame, passed: int) -> str:
    """The columns of `results.csv` that matter, as aligned text.

    Rows that differ only in their seed become one: the mean and, from two seeds on, its standard
    error.

    Args:
      frame: one or more `results.csv`, see `results.read_csv`.
      passed: `config.funnel.passed`, the k of the funnel's columns.
    """
    tasks = [name.split("/")[1] for name in frame.columns if name.startswith("user_bce/")]
    shown = {
        **{f"user_auc/{task}": f"AUC {task}" for task in tasks},
        **{f"user_calibration/{task}": f"calib. {task}" for task in tasks[:1]},
        **{f"teacher_kl/{task}": f"KL {task}" for task in tasks[:1]},
        "alignment_ratio": "alignment",
        f"survival@{passed}": f"survival@{passed}",
        f"value_captured@{passed}": f"value@{passed}",
        f"true_value_captured@{passed}": f"true value@{passed}",
        "passed_for_99": "passed for 99%",
        "cost_ratio": "cost ratio",
        "funnel_cost_saving": "saving",
    }
    keys = ["dataset", "role", "mode", "distill_loss", "serve", "distill_weight"]
    lines = []
    for _, group in frame.groupby(keys, sort=False, dropna=False):
        first = group.iloc[0]
        distilled = pd.notna(first["distill_loss"])
        line = {
            "model": first["role"] if first["role"] == "teacher" else first["mode"],
            "serve": first["serve"],
            "weight": f"{first['distill_weight']:g}" if distilled else "",
            "seeds": str(len(group)),
        }
        for column, title in shown.items():
            values = group[column].dropna()
            line[title] = _mean_and_error(values) if len(values) else ""
        lines.append(line)
    return pd.DataFrame(lines).to_string(index=False)


def _mean_and_error(values: pd.Series) -> str:
    numbers = values.to_numpy(dtype=float)
    digits = 0 if np.abs(numbers).max() >= 10 else 3
    # Adding 0 turns the -0 of a tiny negative number into 0.
    mean = f"{round(numbers.mean(), digits) + 0.0:.{digits}f}"
    if len(numbers) < 2:
        return mean
    return f"{mean}±{numbers.std(ddof=1) / np.sqrt(len(numbers)):.{digits}f}"
