"""The figures for the page, drawn by plotly: the data of `drawing`'s, with values on hovering."""

import json
import math

import pandas as pd
from plotly import graph_objects as go

from kd_ranker.report.drawing import KINDS
from kd_ranker.report.figures import Figure, ticks, window
from kd_ranker.report.style import colours, dash, mark

_GREY = "#8a8a8a"


def charts(figure: Figure) -> list[str]:
    """A figure's panels, each as JSON for `Plotly.newPlot`: data and layout.

    Args:
      figure: one of `figures.figures`, with data.
    """
    drawn = _CHARTS[figure.name](figure.data)
    return [_json(panel) for panel in (drawn if isinstance(drawn, list) else [drawn])]


def _json(panel: go.Figure) -> str:
    panel.update_layout(
        # The page sets the colours of text and grid, light or dark.
        template=None,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 12, "t": 32 if panel.layout.title.text else 12, "b": 40},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0, "xanchor": "left"},
        hovermode="closest",
    )
    panel.update_xaxes(zeroline=False, automargin=True)
    panel.update_yaxes(zeroline=False, automargin=True)
    # A "<" in a name must not end the script that the JSON stands in.
    return json.dumps(json.loads(panel.to_json()), sort_keys=True).replace("<", "\\u003c")


def _panel(title: str) -> go.Figure:
    return go.Figure(layout={"title": {"text": title, "font": {"size": 13}, "x": 0.5, "y": 0.97}})


def _pareto(data: pd.DataFrame) -> go.Figure:
    drawn = go.Figure()
    palette = colours(data["mode"])
    for name, curve in data.groupby("line", sort=False):
        mode, serve = curve["mode"].iloc[0], curve["serve"].iloc[0]
        errors = {
            f"error_{axis}": {
                "type": "data",
                "array": (curve[f"{measure}_high"] - curve[measure]).fillna(0).tolist(),
                "thickness": 0.6,
                "width": 2,
            }
            for axis, measure in (("x", "user_bce"), ("y", "teacher_bce"))
            if curve[f"{measure}_high"].notna().any()
        }
        drawn.add_scatter(
            x=curve["user_bce"].tolist(),
            y=curve["teacher_bce"].tolist(),
            mode="lines+markers+text",
            text=["" if pd.isna(weight) else f"{weight:g}" for weight in curve["weight"]],
            textposition="top right",
            textfont={"size": 10, "color": palette[mode]},
            name=str(name),
            line={"color": palette[mode], "dash": dash(serve)[1], "width": 1.8},
            marker={"symbol": mark(mode)[1], "size": 7},
            hovertext=curve["setting"].tolist(),
            hovertemplate="<b>%{hovertext}</b><br>user BCE %{x:.4f}<br>teacher BCE %{y:.4f}"
            "<extra></extra>",
            **errors,
        )
    drawn.update_xaxes(title="user BCE, mean over tasks (nats)", nticks=7)
    drawn.update_yaxes(title="teacher BCE, mean over tasks (nats)")
    return drawn


def _value_captured(data: pd.DataFrame) -> go.Figure:
    drawn = _over_k(data, "value captured")
    drawn.add_hline(y=0.99, line={"color": _GREY, "dash": "dash", "width": 1})
    palette = colours(data["mode"])
    crossings = data.drop_duplicates("line").sort_values("passed_for_99")
    for place, (_, line) in enumerate(crossings.iterrows()):
        k, colour = line["passed_for_99"], palette[line["mode"]]
        drawn.add_scatter(
            x=[k],
            y=[0.99],
            mode="markers",
            marker={"symbol": mark(line["mode"])[1], "size": 9, "color": colour},
            name=line["line"],
            showlegend=False,
            hovertemplate=f"<b>%{{fullData.name}}</b><br>99% at k = {k:.0f}<extra></extra>",
        )
        drawn.add_annotation(
            # On a logarithmic axis an annotation is placed by the logarithm.
            x=math.log10(k), y=0.99, text=f"{k:.0f}", showarrow=False, font={"color": colour},
            xanchor="left", xshift=8, yshift=-14 - 14 * place,
        )  # fmt: skip
    left, right, low = window(data)
    drawn.update_xaxes(range=[math.log10(left), math.log10(right)])
    drawn.update_yaxes(range=[low, 1.005])
    return drawn


def _survival(data: pd.DataFrame) -> go.Figure:
    drawn = _over_k(data, "survival at k")
    drawn.update_yaxes(range=[0, 1.02])
    return drawn


def _over_k(data: pd.DataFrame, label: str) -> go.Figure:
    drawn = go.Figure()
    palette = colours(data["mode"])
    for name, curve in data.groupby("line", sort=False):
        mode, serve = curve["mode"].iloc[0], curve["serve"].iloc[0]
        if curve["low"].notna().any():
            drawn.add_scatter(
                x=[*curve["k"], *curve["k"][::-1]],
                y=[*curve["high"], *curve["low"][::-1]],
                fill="toself",
                fillcolor=palette[mode],
                opacity=0.15,
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                legendgroup=str(name),
            )
        drawn.add_scatter(
            x=curve["k"].tolist(),
            y=curve["mean"].tolist(),
            mode="lines",
            name=str(name),
            legendgroup=str(name),
            line={"color": palette[mode], "dash": dash(serve)[1], "width": 2},
            hovertemplate=f"<b>%{{fullData.name}}</b><br>k = %{{x}}<br>{label} %{{y:.4f}}"
            "<extra></extra>",
        )
    drawn.update_xaxes(
        title="candidates passed, k", type="log", tickvals=ticks(1, float(data["k"].max()))
    )
    drawn.update_yaxes(title=label)
    return drawn


def _calibration(data: pd.DataFrame) -> list[go.Figure]:
    panels = []
    palette = colours(data["mode"])
    for task, of_task in data.groupby("task", sort=False):
        drawn = _panel(str(task))
        top = 1.05 * float(of_task[["predicted", "observed"]].max().max())
        drawn.add_scatter(
            x=[0, top],
            y=[0, top],
            mode="lines",
            line={"color": _GREY, "dash": "dash", "width": 1},
            hoverinfo="skip",
            showlegend=False,
        )
        for name, curve in of_task.groupby("line", sort=False):
            mode, serve = curve["mode"].iloc[0], curve["serve"].iloc[0]
            drawn.add_scatter(
                x=curve["predicted"].tolist(),
                y=curve["observed"].tolist(),
                customdata=curve["weight"].tolist(),
                mode="lines+markers",
                name=str(name),
                line={"color": palette[mode], "dash": dash(serve)[1], "width": 1.5},
                marker={"symbol": mark(mode)[1], "size": 6},
                hovertemplate="<b>%{fullData.name}</b><br>predicted %{x:.4f}<br>"
                "observed %{y:.4f}<br>weight %{customdata:.0f}<extra></extra>",
            )
        drawn.update_xaxes(title="predicted", range=[0, top], nticks=6)
        drawn.update_yaxes(title="observed", range=[0, top], nticks=6)
        panels.append(drawn)
    return panels


def _training(data: pd.DataFrame) -> list[go.Figure]:
    panels = []
    palette = colours(data["mode"])
    for kind in [kind for kind in KINDS if (data["kind"] == kind).any()]:
        drawn = _panel(KINDS[kind])
        of_kind = data[data["kind"] == kind]
        for (name, repeat), curve in of_kind.groupby(["line", "repeat"], sort=False):
            is_mean = repeat == "mean"
            drawn.add_scatter(
                x=curve["step"].tolist(),
                y=curve["loss"].tolist(),
                mode="lines",
                name=str(name),
                legendgroup=str(name),
                showlegend=is_mean,
                opacity=1.0 if is_mean else 0.35,
                line={"color": palette[curve["mode"].iloc[0]], "width": 2 if is_mean else 0.8},
                hovertemplate="<b>%{fullData.name}</b>, "
                + ("mean" if is_mean else f"repeat {repeat}")
                + f"<br>step %{{x}}<br>{KINDS[kind]} %{{y:.4f}}<extra></extra>",
            )
        drawn.update_xaxes(title="step")
        drawn.update_yaxes(title=KINDS[kind])
        panels.append(drawn)
    return panels


_CHARTS = {
    "pareto": _pareto,
    "value_captured": _value_captured,
    "survival": _survival,
    "calibration": _calibration,
    "training": _training,
}
