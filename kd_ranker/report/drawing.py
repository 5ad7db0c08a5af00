"""The figures as files for a paper: SVG, PDF and PNG, drawn by matplotlib."""

import io
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, NullLocator

from kd_ranker.report.figures import Figure, ticks, window
from kd_ranker.report.style import colours, dash, mark

FORMATS = ("svg", "pdf", "png")
WIDTH = 3.5  # inches: a column of a two-column page
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "kd_ranker",  # the same file for the same data
}
# No dates and no versions in the files, for the same reason.
_METADATA: dict[str, dict] = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}


def draw(figure: Figure) -> dict[str, bytes]:
    """A figure's files by format.

    Args:
      figure: one of `figures.figures`, with data.
    """
    with mpl.rc_context(_STYLE):
        canvas = _DRAWERS[figure.name](figure.data)
        files = {}
        for name in FORMATS:
            file = io.BytesIO()
            canvas.savefig(
                file, format=name, bbox_inches="tight", pad_inches=0.02, metadata=_METADATA[name]
            )
            files[name] = file.getvalue()
        return files


def _pareto(data: pd.DataFrame) -> Canvas:
    canvas, (axes,) = _panels(1, height=2.9)
    palette = colours(data["mode"])
    for name, curve in data.groupby("line", sort=False):
        mode, serve = curve["mode"].iloc[0], curve["serve"].iloc[0]
        axes.errorbar(
            curve["user_bce"],
            curve["teacher_bce"],
            xerr=_errors(curve, "user_bce"),
            yerr=_errors(curve, "teacher_bce"),
            color=palette[mode],
            linestyle=dash(serve)[0],
            marker=mark(mode)[0],
            # The points are what to compare; bars of what is not paired are wide.
            ecolor=to_rgba(palette[mode], 0.45),
            elinewidth=0.5,
            label=name,
        )
        for _, point in curve.dropna(subset=["weight"]).iterrows():
            axes.annotate(
                f"{point['weight']:g}",
                (point["user_bce"], point["teacher_bce"]),
                textcoords="offset points",
                xytext=(3, 3),
                fontsize=6,
                color=palette[mode],
            )
    axes.set_xlabel("user BCE, mean over tasks (nats)")
    axes.set_ylabel("teacher BCE, mean over tasks (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _legend_above(canvas, axes)
    return canvas


def _errors(curve: pd.DataFrame, measure: str) -> np.ndarray | None:
    half = (curve[f"{measure}_high"] - curve[measure]).to_numpy(float)
    return None if np.isnan(half).all() else np.nan_to_num(half)


def _value_captured(data: pd.DataFrame) -> Canvas:
    canvas, axes = _over_k(data, "value captured")
    palette = colours(data["mode"])
    axes.axhline(0.99, color="#404040", linestyle=(0, (4, 3)), linewidth=0.8)
    crossings = data.drop_duplicates("line").sort_values("passed_for_99")
    for place, (_, line) in enumerate(crossings.iterrows()):
        colour, k = palette[line["mode"]], line["passed_for_99"]
        axes.plot([k], [0.99], marker=mark(line["mode"])[0], color=colour, markersize=5)
        # Crossings may lie close together, so their labels go down in steps.
        axes.annotate(
            f"{k:.0f}",
            (k, 0.99),
            textcoords="offset points",
            xytext=(6, -10 - 9 * place),
            fontsize=7,
            color=colour,
        )
    left, right, low = window(data)
    axes.set_xlim(left, right)
    axes.set_ylim(low, 1.005)
    return canvas


def _survival(data: pd.DataFrame) -> Canvas:
    canvas, axes = _over_k(data, "survival at k")
    axes.set_xlim(1, float(data["k"].max()))
    axes.set_ylim(0, 1.02)
    return canvas


def _over_k(data: pd.DataFrame, label: str) -> tuple[Canvas, Axes]:
    canvas, (axes,) = _panels(1, height=2.5)
    palette = colours(data["mode"])
    for name, curve in data.groupby("line", sort=False):
        mode, serve = curve["mode"].iloc[0], curve["serve"].iloc[0]
        colour = palette[mode]
        axes.plot(curve["k"], curve["mean"], color=colour, linestyle=dash(serve)[0], label=name)
        axes.fill_between(
            curve["k"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0
        )
    axes.set_xscale("log")
    axes.set_xticks(ticks(1, float(data["k"].max())))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("candidates passed, k")
    axes.set_ylabel(label)
    _legend_above(canvas, axes)
    return canvas, axes


def _calibration(data: pd.DataFrame) -> Canvas:
    tasks = list(data["task"].unique())
    canvas, panels = _panels(len(tasks), height=1.9, panel_width=2.0)
    palette = colours(data["mode"])
    for axes, task in zip(panels, tasks, strict=True):
        of_task = data[data["task"] == task]
        top = 1.05 * float(of_task[["predicted", "observed"]].max().max())
        axes.plot([0, top], [0, top], color="#404040", linewidth=0.6, linestyle=(0, (4, 3)))
        for name, curve in of_task.groupby("line", sort=False):
            mode, serve = curve["mode"].iloc[0], curve["serve"].iloc[0]
            axes.plot(
                curve["predicted"],
                curve["observed"],
                color=palette[mode],
                linestyle=dash(serve)[0],
                marker=mark(mode)[0],
                markersize=3,
                label=name,
            )
        axes.set_title(task)
        axes.set_xlim(0, top)
        axes.set_ylim(0, top)
        axes.set_aspect("equal")
        axes.set_xlabel("predicted")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    panels[0].set_ylabel("observed")
    _legend_above(canvas, panels[0])
    return canvas


KINDS = {"user_loss": "user loss", "distill_loss": "distillation loss"}


def _training(data: pd.DataFrame) -> Canvas:
    kinds = [kind for kind in KINDS if (data["kind"] == kind).any()]
    canvas, panels = _panels(len(kinds), height=2.1, panel_width=2.6)
    palette = colours(data["mode"])
    for axes, kind in zip(panels, kinds, strict=True):
        for (name, repeat), curve in data[data["kind"] == kind].groupby(
            ["line", "repeat"], sort=False
        ):
            is_mean = repeat == "mean"
            axes.plot(
                curve["step"],
                curve["loss"],
                color=palette[curve["mode"].iloc[0]],
                linewidth=1.3 if is_mean else 0.5,
                alpha=1.0 if is_mean else 0.4,
                label=name if is_mean else None,
            )
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylabel(KINDS[kind])
    _legend_above(canvas, panels[0])
    return canvas


def _panels(count: int, height: float, panel_width: float = WIDTH) -> tuple[Canvas, list[Axes]]:
    canvas = Canvas(figsize=(count * panel_width, height), layout="constrained")
    panels = canvas.subplots(1, count, squeeze=False)
    return canvas, list(panels[0])


def _legend_above(canvas: Canvas, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    wide = canvas.get_figwidth() > WIDTH
    columns = len(labels) if wide else min(len(labels), 2)
    canvas.legend(handles, labels, loc="outside upper left", ncols=max(columns, 1))


_DRAWERS = {
    "pareto": _pareto,
    "value_captured": _value_captured,
    "survival": _survival,
    "calibration": _calibration,
    "training": _training,
}
