"""Tables of results for people."""

from pathlib import Path

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
    keys = ["dataset", "role", "mode", "serve", "distill_weight"]
    groups = frame.fillna({"mode": "", "distill_weight": 0.0}).groupby(keys, sort=False)
    lines = []
    for _, group in groups:
        role, mode, serve = (str(group[name].iloc[0]) for name in ("role", "mode", "serve"))
        weight = float(group["distill_weight"].iloc[0])
        line = {
            "model": role if role == "teacher" else mode,
            "serve": serve,
            "weight": f"{weight:g}" if mode not in ("", "none") else "",
            "seeds": str(len(group)),
        }
        for column, title in shown.items():
            values = group[column].dropna()
            line[title] = _mean_and_error(values) if len(values) else ""
        lines.append(line)
    return pd.DataFrame(lines).to_string(index=False)


def _mean_and_error(values: pd.Series) -> str:
    digits = 0 if values.abs().max() >= 10 else 3
    mean = f"{values.mean():.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean}±{values.sem():.{digits}f}"
