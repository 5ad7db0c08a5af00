"""Draw the figures with Altair: one chart per panel, for a paper's files and for the page.

Colors and marks follow the mode, dashes the serving choice. They are the same in every figure.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import altair as alt
import pandas as pd
import vl_convert

from kd_ranker.evaluation.metrics import METRICS, TARGET, title_of
from kd_ranker.report.figures import REFERENCE, Figure

Panels = list[alt.LayerChart | alt.FacetChart]

FORMATS = ("svg", "pdf", "png")
KINDS = {"user_loss": "user loss", "distill_loss": "distillation loss"}

# After Okabe and Ito's palette for color-blind readers (jfly.uni-koeln.de, 2008). All of these are
# visible on a white and on a black page.
_BY_MODE = {"none": "#7f7f7f", "aux": "#d55e00", "shared": "#0072b2"}
# The last four are of Tol's muted palette (personal.sron.nl/~pault, 2021).
_OTHERS = (
    *("#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    *("#332288", "#999933", "#882255", "#44aa99"),
)
_GRAY, _MUTED = "#808080", "#a9a9a9"
_BY_STEP = {
    "today's early ranker": _MUTED,
    "mode none": _BY_MODE["none"],
    "best without scores": "#56b4e9",
    "best with scores": _BY_MODE["aux"],
}
# The dash of a student without distillation, where a color is a size and not a mode.
_UNDISTILLED = "undistilled"
# By serving choice: lengths of dashes and gaps, and such a line as an SVG path from -3 to 3.
_DASHES: dict[str, tuple[list[float], str]] = {
    "user": ([1, 0], "M-3,0H3"),
    "teacher": ([5, 2.5], "M-3,0h1.6m.6,0h1.6m.6,0h1.6"),
    _UNDISTILLED: ([4, 2], "M-3,0h1.4m.8,0h1.6m.8,0h1.4"),
    "blend": ([1.2, 2], "M-3,0h.5m.6,0h.5m.6,0h.5m.6,0h.5m.6,0h.5m.6,0h.5"),
}
# By mode, as SVG paths around the origin: square, circle, diamond; a triangle for other modes.
_MARKS = {
    "none": "M-.85,-.85H.85V.85H-.85Z",
    "aux": "M-.95,0A.95,.95,0,1,1,.95,0A.95,.95,0,1,1,-.95,0Z",
    "shared": "M0,-1.25L1.25,0L0,1.25L-1.25,0Z",
}
_OTHER_MARK = "M0,-1.1L1.1,.9H-1.1Z"

_DPI = 300
# In points, of a file: a row of the legend, and an axis with its labels and title.
_LEGEND_ROW, _AXIS = 11, 36
# Rows of the legend that the height of a single panel includes.
_LEGEND_ROWS = 3
# Sizes of text and lines on the page, over those in a file.
_PAGE_UNIT = 1.6
# On the page, a click on a name in the legend fades the other lines. In a file, no line fades.
_CHOSEN = alt.selection_point(name="chosen", fields=["line"], bind="legend")
_ALL = alt.param(name="chosen", value=True)


def files(figure: Figure) -> dict[str, bytes]:
    """Return a figure's files by format, a paper's column wide.

    Args:
      figure: one of `figures.figures`, with data.
    """
    form = _FORMS[figure.name]
    panels = [
        panel.properties(width=form.width, height=form.height)
        for panel in form.draw(figure.data, False)
    ]
    names = list(figure.data["line"].unique())
    columns = min(len(panels), form.columns)
    # A single panel includes its axis in its width.
    width = form.width - _AXIS if columns == len(panels) == 1 else (form.width + _AXIS) * columns
    legend_columns = max(1, int(width / (3.6 * max(map(len, names)) + 30)))
    if len(panels) == 1:
        rows = max(0, math.ceil(len(names) / legend_columns) - _LEGEND_ROWS)
        fit = alt.AutoSizeParams(type="fit", contains="padding")
        chart: Any = panels[0].properties(height=form.height + _LEGEND_ROW * rows, autosize=fit)
    else:
        chart = alt.concat(*panels, columns=columns)
    theme = _theme(1) | {"background": "white"}
    theme["legend"] |= {"columns": legend_columns}
    svg = vl_convert.vegalite_to_svg(chart.add_params(_ALL).configure(**theme).to_dict())
    # The unit of the size is the point, as in the other formats; without one it is the pixel.
    in_points = re.sub(r' (width|height)="([\d.]+)"', r' \1="\2pt"', svg, count=2)
    return {
        "svg": in_points.encode(),
        "pdf": vl_convert.svg_to_pdf(svg),
        "png": vl_convert.svg_to_png(svg, ppi=_DPI),
    }


def page_panels(figure: Figure) -> list[str]:
    """Return a figure's panels as JSON; the page sets their width and the legend's columns.

    Args:
      figure: one of `figures.figures`, with data.
    """
    form, fit = _FORMS[figure.name], alt.AutoSizeParams(type="fit", contains="padding")
    panels = [
        panel.properties(height=form.page_height, autosize=fit)
        .add_params(_CHOSEN)
        .configure(**_theme(_PAGE_UNIT))
        for panel in form.draw(figure.data, True)
    ]
    # A "<" in a name must not end the script element that holds the JSON.
    return [json.dumps(panel.to_dict(), sort_keys=True).replace("<", "\\u003c") for panel in panels]


def colors(modes: Sequence[str]) -> list[str]:
    """Return a color per line.

    The first line of a known mode gets the color of the mode, the same in every figure. Other
    lines get the next free color.

    Args:
      modes: the mode of each line.
    """
    free, by_mode = itertools.cycle(_OTHERS), dict(_BY_MODE)
    return [by_mode.pop(mode) if mode in by_mode else next(free) for mode in modes]


def _theme(unit: float) -> dict[str, Any]:
    """Return the Vega-Lite config with text of 7 and 8 units."""
    text = {"align": "left", "fontSize": 6 * unit}
    return {
        "background": "transparent", "font": "sans-serif", "padding": 2, "aria": False,
        "view": {"stroke": None},
        "style": {
            "curve": {"strokeWidth": 1.2 * unit},
            "thin": {"strokeWidth": 0.5 * unit},
            "reference": {"strokeWidth": 0.7 * unit, "strokeDash": [4 * unit, 3 * unit]},
            "muted": {"strokeWidth": 0.7 * unit},
            "named": text | {"dx": 7 * unit, "dy": -2 * unit},
            "point": {"size": 20 * unit**2},
            "crossing": {"size": 30 * unit**2},
            "weight": text | {"dx": 3 * unit, "dy": -4 * unit},
            "needed": text | {"fontSize": 7 * unit, "dx": 6 * unit},
        },
        "axis": {
            "labelFontSize": 7 * unit, "titleFontSize": 8 * unit, "titleFontWeight": "normal",
            "titlePadding": 4 * unit, "labelPadding": 2 * unit, "labelFlush": False,
            "domainColor": "black", "domainWidth": 0.6 * unit,
            "tickColor": "black", "tickSize": 3 * unit, "tickWidth": 0.6 * unit,
            "gridColor": "#e4e4e4", "gridWidth": 0.5 * unit,
        },
        "legend": {
            "orient": "top", "title": None, "offset": 4 * unit, "labelFontSize": 7 * unit,
            "labelLimit": 0, "labelOffset": 8 * unit, "symbolSize": 20 * unit**2,
            "symbolOffset": 6 * unit, "symbolStrokeWidth": 1.2 * unit,
            "rowPadding": 3 * unit, "columnPadding": 10 * unit,
        },
        "title": {"fontSize": 8 * unit, "fontWeight": "normal", "offset": 4 * unit},
        "concat": {"spacing": 14 * unit},
    }  # fmt: skip


def _panel(
    data: pd.DataFrame, layers: Sequence[alt.Chart], figure: pd.DataFrame, marked: bool = False
) -> alt.LayerChart | alt.FacetChart:
    """Return layers over a table, in the colors of a figure's lines, with their legend.

    Args:
      data: of the panel.
      layers: from the back to the front.
      figure: the data of all panels, with the columns `line`, `mode` and `plain`, `serve` where
        dashes differ, and `color` where that is not the mode's.
      marked: whether lines have the marks of their modes.
    """
    lines = figure.drop_duplicates("line")
    serves = lines["serve"] if "serve" in lines else ["user"] * len(lines)
    glyphs = [
        _DASHES[serve][1] + (_MARKS.get(mode, _OTHER_MARK) if marked else "")
        for mode, serve in zip(lines["mode"], serves, strict=True)
    ]
    modes = lines["mode"].where(lines["plain"], "variant").tolist()
    palette = list(lines["color"]) if "color" in lines else colors(modes)
    names = lines["line"].tolist()
    # This layer draws nothing: it holds the legend, and receives clicks on it.
    shape = alt.Shape("line:N", scale=alt.Scale(domain=names, range=glyphs))
    key = alt.Chart().mark_point(size=0, filled=True, opacity=1).encode(shape=shape)
    color = alt.Color("line:N", scale=alt.Scale(domain=names, range=palette))
    return alt.layer(key, *layers, data=_values(data)).encode(color=color)


def _values(data: pd.DataFrame) -> alt.InlineData:
    """Return a table's rows with the SVG path of their mark."""
    marked = data.assign(path=[_MARKS.get(mode, _OTHER_MARK) for mode in data["mode"]])
    return alt.InlineData(values=json.loads(marked.to_json(orient="records", double_precision=9)))


def _layer(kind: str, style: str, opacity: float = 1.0, **properties: Any) -> alt.Chart:
    """Return a layer of one kind of mark, which fades for lines that are not chosen."""
    mark = getattr(alt.Chart(), f"mark_{kind}")(style=style, **properties)
    shown = alt.when(_CHOSEN).then(alt.value(opacity)).otherwise(alt.value(0.07 * opacity))
    return mark.encode(opacity=shown)


def _lines(**place: Any) -> alt.Chart:
    """Return lines in the dashes of their serving choices."""
    scale = alt.Scale(domain=list(_DASHES), range=[dash for dash, _ in _DASHES.values()])
    dash = alt.StrokeDash("serve:N", scale=scale, legend=None)
    return _layer("line", "curve", clip=True).encode(strokeDash=dash, **place)


def _points(tooltip: list[alt.Tooltip], style: str = "point", **place: Any) -> alt.Chart:
    """Return marks in the shapes of their modes, with their numbers under the pointer."""
    shape = alt.Shape("path:N", scale=None)
    return _layer("point", style, filled=True).encode(shape=shape, tooltip=tooltip, **place)


def _under_pointer(tooltip: list[alt.Tooltip], **place: Any) -> alt.Chart:
    """Return invisible points that show the numbers of a line without marks."""
    # Points outside the domain would take part in fitting the panel.
    points = alt.Chart().mark_point(size=150, clip=True)
    return points.encode(opacity=alt.value(0), tooltip=tooltip, **place)


def _reference(*values: dict[str, float], **place: Any) -> alt.Chart:
    """Return a dashed line for comparison: a rule at one value, or a line through several."""
    kind = "line" if len(values) > 1 else "rule"
    line = getattr(alt.Chart(alt.InlineData(values=list(values))), f"mark_{kind}")
    return line(style="reference", clip=True).encode(color=alt.value(_GRAY), **place)


def _axis(
    channel: Callable[..., Any], title: str, scale: dict[str, Any] | None = None, **axis: Any
) -> Callable[[str], Any]:
    """Return a function from a field to its channel; all fields share the title and the scale."""
    return functools.partial(
        channel, type="quantitative", title=title, scale=alt.Scale(**scale or {}),
        axis=alt.Axis(**axis),
    )  # fmt: skip


def _number(field: str, title: str, form: str = ".4f") -> alt.Tooltip:
    return alt.Tooltip(field, type="quantitative", title=title, format=form)


def _name(field: str, title: str) -> alt.Tooltip:
    return alt.Tooltip(field, type="nominal", title=title)


def _intervals(x: Callable, y: Callable, of_x: str, of_y: str) -> list[alt.Chart]:
    """Return a horizontal and a vertical bar per mark, from `_low` to `_high` of its measures."""
    # Bars of unpaired means are wide; readers should compare the marks.
    bars = _layer("rule", "thin", opacity=0.45)
    return [
        bars.encode(x=x(f"{of_x}_low"), x2=f"{of_x}_high", y=y(of_y)),
        bars.encode(x=x(of_x), y=y(f"{of_y}_low"), y2=f"{of_y}_high"),
    ]


def _pareto(data: pd.DataFrame, page: bool) -> Panels:
    measures = ("user_bce", "teacher_bce")
    x, y = (
        _axis(channel, f"{title_of(of)}, mean over tasks (nats)", {"zero": False}, tickCount=6)
        for channel, of in zip((alt.X, alt.Y), measures, strict=True)
    )
    place = {"x": x(measures[0]), "y": y(measures[1])}
    tooltip = [_name("setting", "setting"), *(_number(of, title_of(of)) for of in measures)]
    layers = [
        *_intervals(x, y, *measures),
        _lines(order=alt.Order("weight:Q"), **place),
        _points(tooltip, **place),
        _layer("text", "weight").encode(text="weight:Q", **place)
        .transform_filter("isValid(datum.weight)"),
    ]  # fmt: skip
    return [_panel(data, layers, data, marked=True)]


def _waterfall(data: pd.DataFrame, page: bool) -> Panels:
    y = alt.Y("line:N", title=None, sort=data["line"].tolist(), axis=alt.Axis(labelLimit=0))
    end = data[["mean", "high"]].max(axis=1)
    # The longest bar leaves room for its number.
    scale = {"domain": [0.0, 1.15 * float(end.max())], "nice": False}
    x = _axis(alt.X, "candidates to pass for 99% of the final value", scale, tickCount=5)
    steps = alt.Scale(domain=list(_BY_STEP), range=list(_BY_STEP.values()))
    color = alt.Color("line:N", scale=steps, legend=None)
    tooltip = [_name("setting", "setting"), _number("mean", "candidates", ".0f")]
    bars = alt.Chart().mark_bar().encode(x=x("mean"), y=y, color=color, tooltip=tooltip)
    ends = alt.Chart().mark_rule(style="thin").encode(x=x("low"), x2="high", y=y)
    text = alt.Text("mean:Q", format=".0f")
    numbers = alt.Chart().mark_text(style="needed").encode(x=x("end"), y=y, text=text)
    return [alt.layer(bars, ends, numbers, data=_values(data.assign(end=end)))]


def _plane(data: pd.DataFrame, page: bool) -> Panels:
    x = _axis(alt.X, "saving", tickCount=6, format="~%")
    y = _axis(alt.Y, "change for users", tickCount=6, format="+.2~%")
    tooltip = [
        _name("setting", "setting"), _number("saving", "saving"),
        _number("users", "change for users"),
    ]  # fmt: skip
    layers = [
        _reference({"users": float(data["margin"].iloc[0])}, y=y("users")),
        *_intervals(x, y, "saving", "users"),
        _points(tooltip, x=x("saving"), y=y("users")),
    ]
    return [_panel(data, layers, data, marked=True)]


def _frontier(data: pd.DataFrame, page: bool) -> Panels:
    students, references = _by_kind(data)
    if students["size"].nunique() > 1:
        # One color per size, and a broken line for its student without distillation.
        sizes = students["size"].unique().tolist()
        students = students.assign(
            color=students["size"].map(dict(zip(sizes, colors(sizes), strict=True))),
            serve=students["mode"].map(lambda mode: _UNDISTILLED if mode == "none" else "user"),
        )
    low = _window(students)[2]
    costs = students.loc[students["mean"] >= low, "cost"].min(), students["cost"].max()
    x = _axis(
        alt.X,
        "cost of the funnel, over that of only the final ranker",
        {"type": "log", "domain": costs, "nice": False},
        values=[share / 1000 for share in ticks(1, 1000)],
        format="~%",
    )
    y = _axis(alt.Y, "value captured", {"domain": [low, 1.005], "nice": False}, tickCount=6)
    inside = references[(references["mean"] >= low) & (references["cost"] >= costs[0])]
    tooltip = [_number("k", "k", "d"), _number("cost", "cost", ".1%")]
    layers = [
        *_muted(inside, x("cost"), y("mean")),
        *_banded(x("cost"), y, tooltip, page),
        *_crossings(students, "cost_for_99", x, y, ".1%", page),
    ]
    return [_panel(students, layers, students)]


def _by_kind(data: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split curves into those of students and those of rankers without a model."""
    of_references = data["mode"] == REFERENCE
    return data[~of_references], data[of_references]


def _muted(data: pd.DataFrame, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """Return lines for comparison, each with its name where it begins."""
    if data.empty:
        return []
    place = {"x": x, "y": y, "color": alt.value(_MUTED)}
    lines = alt.Chart(_values(data)).mark_line(style="muted", clip=True)
    names = alt.Chart(_values(data.drop_duplicates("line"))).mark_text(style="named")
    return [lines.encode(detail="line:N", **place), names.encode(text="line:N", **place)]


def _crossings(
    data: pd.DataFrame, field: str, x: Callable, y: Callable, form: str, page: bool
) -> list[alt.Chart]:
    """Return marks where each line reaches 99%, each with the number of `field` there."""
    crossings = data.drop_duplicates("line").sort_values(field)
    values = _values(crossings.assign(mean=TARGET, place=range(len(crossings))))
    place = {"x": x(field), "y": y("mean")}
    tooltip = [_name("line", "setting"), _number("passed_for_99", title_of("passed_for_99"), ".0f")]
    # Labels of close crossings would overlap, so each is a step further down.
    down = alt.expr(f"(10 + 9 * datum.place) * {_PAGE_UNIT if page else 1}")
    text = alt.Text(field, type="quantitative", format=form)
    return [
        _reference({"mean": TARGET}, y=place["y"]),
        _points(tooltip, "crossing", **place).properties(data=values),
        _layer("text", "needed", dy=down).encode(text=text, **place).properties(data=values),
    ]


def _window(data: pd.DataFrame) -> tuple[float, float, float]:
    """Return the part of captured curves to show: lowest k, highest k, lowest value.

    Curves start far below 99%, so the window starts where the best of them is near it.
    """
    low = max(0.0, min(0.9, float(data["mean"].median()) - 0.1))
    near = data.loc[data["mean"] >= low, "k"]
    return float(near.min()), float(data["k"].max()), low


def ticks(low: float, high: float) -> list[int]:
    """Return round numbers for a logarithmic axis of k.

    >>> ticks(30, 2000)
    [50, 100, 200, 500, 1000, 2000]
    """
    steps = (step * 10**power for power in range(10) for step in (1, 2, 5))
    return [step for step in steps if low <= step <= high]


def _value_captured(data: pd.DataFrame, page: bool) -> Panels:
    students, _ = _by_kind(data)
    left, right, low = _window(students)
    x, y, layers = _over_k(data, "value captured at k", [left, right], [low, 1.005], page)
    crossings = _crossings(students, "passed_for_99", x, y, ".0f", page)
    return [_panel(students, [*layers, *crossings], students)]


def _survival(data: pd.DataFrame, page: bool) -> Panels:
    students, _ = _by_kind(data)
    ks = [1.0, float(data["k"].max())]
    _, _, layers = _over_k(data, "survival at k", ks, [0, 1.02], page)
    return [_panel(students, layers, students)]


def _true_value_captured(data: pd.DataFrame, page: bool) -> Panels:
    students, _ = _by_kind(data)
    # Small k show hardly any items.
    seen = data[data["mean"] >= 0.8]
    values = [float(seen["low"].min()), float(seen["high"].max())]
    ks = [float(seen["k"].min()), float(data["k"].max())]
    _, y, layers = _over_k(data, "true value captured at k", ks, values, page)
    return [_panel(students, [*layers, _reference({"mean": 1.0}, y=y("mean"))], students)]


def _hit_rates(data: pd.DataFrame, page: bool) -> Panels:
    panels = []
    for (measure, task), of_task in data.groupby(["measure", "task"], sort=False):
        values = [0.0, 1.05 * float(of_task[["mean", "high"]].max().max())]
        ks = [1.0, float(data["k"].max())]
        title = METRICS[str(measure)].title
        _, _, layers = _over_k(of_task, title, ks, values, page, powers_of_ten=True)
        panels.append(_panel(of_task, layers, data).properties(title=task))
    return panels


def _over_k(
    data: pd.DataFrame, title: str, ks: list[float], values: list[float], page: bool,
    powers_of_ten: bool = False,
) -> tuple[Callable, Callable, list[alt.Chart]]:  # fmt: skip
    """Return the axes of k and of a value over their ranges, and a line with a band per setting.

    References are muted.
    """
    at = [k for k in ticks(1, ks[1]) if not powers_of_ten or str(k).startswith("1")]
    scale = {"type": "log", "domain": ks, "nice": False}
    x = _axis(alt.X, "candidates passed, k", scale, values=at, format="d")
    y = _axis(alt.Y, title, {"domain": values, "nice": False}, tickCount=6)
    _, references = _by_kind(data)
    inside = references["k"].between(ks[0], ks[1]) & references["mean"].between(
        values[0], values[1]
    )
    muted = _muted(references[inside], x("k"), y("mean"))
    return x, y, [*muted, *_banded(x("k"), y, [_number("k", "k", "d")], page, title)]


def _banded(
    x: alt.X, y: Callable, tooltip: list[alt.Tooltip], page: bool, title: str = "value captured"
) -> list[alt.Chart]:
    """Return a line with a band per setting; on the page with the numbers under the pointer."""
    shown = [_name("line", "setting"), *tooltip, _number("mean", title)]
    return [
        _layer("area", "band", opacity=0.15, clip=True).encode(x=x, y=y("low"), y2="high"),
        _lines(x=x, y=y("mean")),
        *([_under_pointer(shown, x=x, y=y("mean"))] if page else []),
    ]


def _saving(data: pd.DataFrame, page: bool) -> Panels:
    axes = {
        "target": ("share of the final value to keep (%)", [95, 96, 97, 98, 99, 99.9]),
        "student's cost": ("student's cost per candidate (% of the teacher's)", [1, 5, 10]),
    }
    ends = data[["mean", "low", "high"]]
    # No saving exceeds 1, and below -1 the funnel costs more than twice as much.
    seen = [max(-1.0, float(ends.min().min())), min(1.0, float(ends.max().max()))]
    y = _axis(alt.Y, "saving", {"domain": seen}, tickCount=6, format="~%")
    panels = []
    for over, of_panel in data.groupby("over", sort=False):
        title, values = axes[str(over)]
        scale = {"zero": False, "nice": False}
        x = _axis(alt.X, title, scale, values=values, labelExpr="datum.value")
        layers = [
            _reference({"mean": 0.0}, y=y("mean")),
            *_banded(x("at"), y, [_number("at", title, ".1f")], page, "saving"),
        ]
        panels.append(_panel(of_panel, layers, data))
    return panels


def _calibration(data: pd.DataFrame, page: bool) -> Panels:
    panels, fields = [], ("predicted", "observed")
    tooltip = [
        _name("line", "setting"), *(_number(field, field) for field in fields),
        _number("weight", "weight", ".0f"),
    ]  # fmt: skip
    for task, of_task in data.groupby("task", sort=False):
        top = 1.05 * float(of_task[[*fields]].max().max())
        scale = {"domain": [0, top], "nice": False}
        x, y = (
            _axis(channel, field, scale, tickCount=5)(field)
            for channel, field in zip((alt.X, alt.Y), fields, strict=True)
        )
        layers = [
            _reference(*(dict.fromkeys(fields, end) for end in (0, top)), x=x, y=y),
            _lines(x=x, y=y, order=alt.Order("bin:Q")),
            _points(tooltip, x=x, y=y),
        ]
        panels.append(_panel(of_task, layers, data, marked=True).properties(title=task))
    return panels


def _training(data: pd.DataFrame, page: bool) -> Panels:
    panels = []
    x = _axis(alt.X, "step", {"nice": False}, tickCount=5, format="d")("step")
    for kind in [kind for kind in KINDS if (data["kind"] == kind).any()]:
        y = _axis(alt.Y, KINDS[kind], {"zero": False}, tickCount=6)("loss")
        tooltip = [
            _name("line", "setting"), _name("repeat", "repeat"), _number("step", "step", "d"),
            _number("loss", KINDS[kind]),
        ]  # fmt: skip
        place = {"x": x, "y": y, "detail": "repeat:N"}
        each, mean = (f"datum.repeat {sign} 'mean'" for sign in ("!==", "==="))
        layers = [
            _layer("line", "thin", opacity=0.4).encode(**place).transform_filter(each),
            _layer("line", "curve").encode(**place).transform_filter(mean),
            *([_under_pointer(tooltip, x=x, y=y)] if page else []),
        ]
        panels.append(_panel(data[data["kind"] == kind], layers, data))
    return panels


class _Form(NamedTuple):
    """The drawing of a figure.

    Attributes:
      draw: from the figure's data, and whether it is for the page, to its panels.
      width: of a panel in a file, in points: with its axis if it is the only one.
      height: the same.
      columns: panels side by side in a file.
      page_height: of a panel on the page, in pixels.
    """

    draw: Callable[[pd.DataFrame, bool], Panels]
    width: int
    height: int
    columns: int = 4
    page_height: int = 400


# A column of a two-column page is 3.5 inches wide, which is 252 points.
_FORMS = {
    "waterfall": _Form(_waterfall, 252, 90, page_height=220),
    "frontier": _Form(_frontier, 252, 209, page_height=460),
    "plane": _Form(_plane, 252, 209, page_height=460),
    "saving": _Form(_saving, 200, 140, columns=1),
    "hit_rates": _Form(_hit_rates, 104, 104, columns=3, page_height=300),
    "pareto": _Form(_pareto, 252, 209, page_height=460),
    "value_captured": _Form(_value_captured, 252, 180),
    "true_value_captured": _Form(_true_value_captured, 252, 180),
    "survival": _Form(_survival, 252, 180),
    "calibration": _Form(_calibration, 104, 104),
    "training": _Form(_training, 147, 104),
}
