"""Draw the figures with Altair: one chart per panel, for a paper's files and for the page.

Lines have the color and the mark of their mode, and the dash of their serving choice. These are the
same in every figure.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from kd_ranker.evaluation.metrics import TARGET, title_of
from kd_ranker.report.figures import REFERENCE, Figure

Chart = alt.LayerChart | alt.FacetChart

FORMATS = ("svg", "pdf", "png")

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
_SHAPES = {"none": "square", "aux": "circle", "shared": "diamond"}
# By serving choice, lengths of dashes and gaps.
_DASHES = {"user": [1.0, 0.0], "teacher": [5, 2.5], "blend": [1.2, 2]}
# The dash of a student without distillation, where a color is a size and not a mode.
_UNDISTILLED = [4.0, 2.0]

_DPI = 300
# In points, of a file: a row of the legend with lines or marks, and an axis with its labels and
# title. `templates/page.js` has the rows of the page.
_LEGEND_ROW, _MARKED_ROW, _AXIS = 10, 9, 36
# Rows of the legend that the height of a single panel includes.
_LEGEND_ROWS = 3
# Labels that are closer than this share of a logarithmic axis would overlap.
_CLOSE = 0.08
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
    panels = [panel.properties(width=form.width, height=form.height) for panel in _panels(figure)]
    # References are named at their lines.
    names = list(figure.data.loc[figure.data["mode"] != REFERENCE, "line"].unique())
    columns = min(len(panels), form.columns)
    # A single panel includes its axis in its width.
    width = form.width - _AXIS if columns == len(panels) == 1 else (form.width + _AXIS) * columns
    legend_columns = max(1, int(width / (3.6 * max(map(len, names)) + 30)))
    if len(panels) == 1:
        rows = max(0, math.ceil(len(names) / legend_columns) - _LEGEND_ROWS)
        more = rows * (_MARKED_ROW if form.marked else _LEGEND_ROW)
        fit = alt.AutoSizeParams(type="fit", contains="padding")
        chart: Any = panels[0].properties(height=form.height + more, autosize=fit)
    else:
        chart = alt.concat(*panels, columns=columns)
    theme = _theme(1, form.marked) | {"background": "white"}
    theme["legend"] |= {"columns": legend_columns}
    chart = chart.add_params(_ALL, alt.param(name="points", value=1))
    svg = vl_convert.vegalite_to_svg(chart.configure(**theme).to_dict())
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
        .add_params(_CHOSEN, alt.param(name="points", value=_PAGE_UNIT))
        .configure(**_theme(_PAGE_UNIT, form.marked))
        for panel in _panels(figure)
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


def ticks(low: float, high: float) -> list[int]:
    """Return round numbers for a logarithmic axis of k.

    >>> ticks(30, 2000)
    [50, 100, 200, 500, 1000, 2000]
    """
    steps = (step * 10**power for power in range(10) for step in (1, 2, 5))
    return [step for step in steps if low <= step <= high]


def _panels(figure: Figure) -> list[Chart]:
    """Return a chart per panel: per group of the rows, with its part of the data."""
    form, data = _FORMS[figure.name], figure.data
    if not form.panels:
        return [form.draw(data, data)]
    titled = form.panels[-1] == "task"
    return [
        form.draw(part, data).properties(**({"title": str(of[-1])} if titled else {}))
        for of, part in data.groupby([*form.panels], sort=False)
    ]


def _theme(unit: float, marked: bool) -> dict[str, Any]:
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
            "mark": {"size": 20 * unit**2},
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
            "labelLimit": 0, "symbolSize": (20 if marked else 120) * unit**2,
            "symbolStrokeWidth": 1.2 * unit, "rowPadding": unit if marked else 0,
            "columnPadding": 10 * unit,
        },
        "title": {"fontSize": 8 * unit, "fontWeight": "normal", "offset": 4 * unit},
        "concat": {"spacing": 14 * unit},
    }  # fmt: skip


class _Axis(NamedTuple):
    """An axis of numbers.

    Attributes:
      field: a column; other columns may share the axis.
      title: its title.
      domain: the lowest and the highest number; None fits it to the data.
      format: of its numbers, as in D3.
      options: of its labels, such as `values`.
      scale: of its scale, such as `type`.
    """

    field: str
    title: str
    domain: tuple[float, float] | None = None
    format: str = ""
    options: dict[str, Any] = {}
    scale: dict[str, Any] = {}

    def on(self, channel: Callable[..., Any], field: str = "") -> Any:
        """Return the channel of the axis for a field, by default its own."""
        fit = {"domain": self.domain, "nice": False} if self.domain else {"zero": False}
        options = {"tickCount": 6} | ({"format": self.format} if self.format else {}) | self.options
        return channel(
            field or self.field, type="quantitative", title=self.title,
            scale=alt.Scale(**(fit | self.scale)), axis=alt.Axis(**options),
        )  # fmt: skip

    def holds(self, numbers: pd.Series) -> pd.Series:
        """Return True for the numbers in the domain."""
        return numbers.between(*(self.domain or (-math.inf, math.inf)))


class _Look(NamedTuple):
    """The channels by which the lines of a figure differ, the same in all of its layers."""

    color: alt.Color
    shape: alt.Shape
    dash: alt.StrokeDash


def _look(figure: pd.DataFrame, marked: bool) -> _Look:
    """Return the look of the students' lines.

    Args:
      figure: the data of all panels. If its column `size` has several values, a color is a size,
        and students without distillation have a broken line.
      marked: whether the legend has the marks of the modes in place of lines.
    """
    lines = figure[figure["mode"] != REFERENCE].drop_duplicates("line")
    modes, names = lines["mode"], lines["line"].tolist()
    palette = colors(modes.where(lines["plain"], "variant").tolist())
    dashes = [_DASHES[serve] for serve in lines["serve"]]
    if "size" in lines and lines["size"].nunique() > 1:
        sizes = lines["size"].unique().tolist()
        of_size = dict(zip(sizes, colors(sizes), strict=True))
        palette = [of_size[size] for size in lines["size"]]
        dashes = [_UNDISTILLED if mode == "none" else _DASHES["user"] for mode in modes]
    shapes = [_SHAPES.get(mode, "triangle-up") if marked else "stroke" for mode in modes]

    def of_line(channel: Any, looks: Sequence[Any]) -> Any:
        return channel("line:N", scale=alt.Scale(domain=names, range=looks))

    dash = of_line(alt.StrokeDash, dashes)
    if marked:
        # In the legend, a mark with a broken outline would look damaged.
        by_serve = alt.Scale(domain=list(_DASHES), range=list(_DASHES.values()))
        dash = alt.StrokeDash("serve:N", scale=by_serve, legend=None)
    return _Look(of_line(alt.Color, palette), of_line(alt.Shape, shapes), dash)


def _panel(data: pd.DataFrame, look: _Look, layers: Sequence[alt.Chart]) -> alt.LayerChart:
    """Return layers over a table, from the back to the front, with a legend of their lines."""
    # This layer draws nothing: it holds the legend, and receives clicks on it.
    key = alt.Chart().mark_point(size=0, filled=True, opacity=1)
    key = key.encode(shape=look.shape, strokeDash=look.dash)
    return alt.layer(key, *layers, data=_values(data)).encode(color=look.color)


def _values(data: pd.DataFrame) -> alt.InlineData:
    return alt.InlineData(values=json.loads(data.to_json(orient="records", double_precision=9)))


def _layer(kind: str, style: str, opacity: float = 1.0, **properties: Any) -> alt.Chart:
    """Return a layer of one kind of mark, which fades for lines that are not chosen."""
    mark = getattr(alt.Chart(), f"mark_{kind}")(style=style, **properties)
    shown = alt.when(_CHOSEN).then(alt.value(opacity)).otherwise(alt.value(0.07 * opacity))
    return mark.encode(opacity=shown)


def _under_pointer(*axes: _Axis, **place: Any) -> alt.Chart:
    """Return invisible points that show the line and its numbers on the axes."""
    tooltip = [alt.Tooltip("line:N", title="setting")]
    tooltip += [
        alt.Tooltip(f"{of.field}:Q", title=of.title, format=of.format or ".4f") for of in axes
    ]
    # Points outside the domain would take part in fitting the panel.
    points = alt.Chart().mark_point(size=150, clip=True)
    return points.encode(opacity=alt.value(0), tooltip=tooltip, **place)


def _reference(*values: dict[str, float], **place: Any) -> alt.Chart:
    """Return a dashed line for comparison: a rule at one value, or a line through several."""
    kind = "line" if len(values) > 1 else "rule"
    line = getattr(alt.Chart(alt.InlineData(values=list(values))), f"mark_{kind}")
    return line(style="reference", clip=True).encode(color=alt.value(_GRAY), **place)


def _waterfall(data: pd.DataFrame, figure: pd.DataFrame) -> Chart:
    end = data[["mean", "high"]].max(axis=1)
    # The longest bar leaves room for its number.
    title, ticked = "candidates to pass for 99% of the final value", {"tickCount": 5}
    axis = _Axis("mean", title, (0, 1.15 * end.max()), options=ticked)
    y = alt.Y("line:N", title=None, sort=data["line"].tolist(), axis=alt.Axis(labelLimit=0))
    steps = alt.Scale(domain=list(_BY_STEP), range=list(_BY_STEP.values()))
    color = alt.Color("line:N", scale=steps, legend=None)
    tooltip = ["setting:N", alt.Tooltip("mean:Q", title="candidates", format=".0f")]
    bars = alt.Chart().mark_bar().encode(x=axis.on(alt.X), y=y, color=color, tooltip=tooltip)
    ends = alt.Chart().mark_rule(style="thin").encode(x=axis.on(alt.X, "low"), x2="high", y=y)
    numbers = alt.Chart().mark_text(style="needed").encode(
        x=axis.on(alt.X, "end"), y=y, text=alt.Text("mean:Q", format=".0f")
    )  # fmt: skip
    return alt.layer(bars, ends, numbers, data=_values(data.assign(end=end)))


def _points(data: pd.DataFrame, figure: pd.DataFrame, x: _Axis, y: _Axis, order: str = "") -> Chart:
    """Return a mark per row, with a bar per interval where the data have its ends.

    Args:
      data: of the panel. A column `margin` draws a line at that y.
      figure: of all panels.
      x: an axis; the ends of the interval of its field are `_low` and `_high`.
      y: the other axis.
      order: the column along which lines connect the marks; "" draws none.
    """
    look, place = _look(figure, True), {"x": x.on(alt.X), "y": y.on(alt.Y)}
    layers = []
    if "margin" in data:
        layers.append(_reference({y.field: float(data["margin"].iloc[0])}, y=place["y"]))
    if f"{x.field}_low" in data:
        # Pale, since readers should compare the marks.
        rule = _layer("rule", "thin", opacity=0.45)
        across, up = x.on(alt.X, f"{x.field}_low"), y.on(alt.Y, f"{y.field}_low")
        layers.append(rule.encode(x=across, x2=f"{x.field}_high", y=place["y"]))
        layers.append(rule.encode(x=place["x"], y=up, y2=f"{y.field}_high"))
    if order:
        lines = _layer("line", "curve", clip=True)
        layers.append(lines.encode(order=f"{order}:Q", strokeDash=look.dash, **place))
    layers.append(_layer("point", "mark", filled=True).encode(shape=look.shape, **place))
    layers.append(_under_pointer(x, y, **place))
    if order == "weight":
        text = _layer("text", "weight").encode(text="weight:Q", **place)
        layers.append(text.transform_filter("isValid(datum.weight)"))
    return _panel(data, look, layers)


def _pareto(data: pd.DataFrame, figure: pd.DataFrame) -> Chart:
    x, y = (
        _Axis(of, f"{title_of(of)}, mean over tasks (nats)") for of in ("user_bce", "teacher_bce")
    )
    return _points(data, figure, x, y, "weight")


def _plane(data: pd.DataFrame, figure: pd.DataFrame) -> Chart:
    x = _Axis("saving", "saving", format="~%", scale={"zero": True})
    y = _Axis("users", "change for users", format="+.2~%", scale={"zero": True})
    return _points(data, figure, x, y)


def _calibration(data: pd.DataFrame, figure: pd.DataFrame) -> Chart:
    ends = (0.0, 1.05 * float(data[["predicted", "observed"]].max().max()))
    x, y = (_Axis(of, of, ends, options={"tickCount": 5}) for of in ("predicted", "observed"))
    diagonal = ({"predicted": end, "observed": end} for end in ends)
    line = _reference(*diagonal, x=x.on(alt.X), y=y.on(alt.Y))
    return _points(data, figure, x, y, "bin") + line


def _curves(
    data: pd.DataFrame, figure: pd.DataFrame, x: _Axis, y: _Axis, rule: float | None = None,
    crossing: str = "",
) -> Chart:  # fmt: skip
    """Return a line with a band per student, and a gray one per reference, with its name.

    Args:
      data: of the panel.
      figure: of all panels.
      x: the axis of its `field`, with a domain.
      y: the axis of the column `mean`, with the ends `low` and `high`, and a domain.
      rule: where a dashed line is; None draws none.
      crossing: the column with the place where a line crosses the rule, to mark; "" marks none.
    """
    look, place = _look(figure, False), {"x": x.on(alt.X), "y": y.on(alt.Y)}
    of_references = data["mode"] == REFERENCE
    students, layers, names = data[~of_references], [], []
    inside = x.holds(data[x.field]) & y.holds(data["mean"])
    if len(muted := data[of_references & inside]):
        gray = place | {"color": alt.value(_MUTED)}
        lines = alt.Chart(_values(muted)).mark_line(style="muted", clip=True)
        text = alt.Chart(_values(muted.drop_duplicates("line"))).mark_text(style="named")
        layers.append(lines.encode(detail="line:N", **gray))
        # In front of the lines of the students.
        names.append(text.encode(text="line:N", **gray))
    band = _layer("area", "band", opacity=0.15, clip=True)
    layers += [
        band.encode(x=place["x"], y=y.on(alt.Y, "low"), y2="high"),
        _layer("line", "curve", clip=True).encode(strokeDash=look.dash, **place),
        _under_pointer(x, y, **place),
    ]
    if rule is not None:
        layers.append(_reference({"mean": rule}, y=place["y"]))
    if crossing:
        at = students.drop_duplicates("line").sort_values(crossing)
        values = _values(at.assign(mean=rule, place=_steps(at[crossing], x.domain)))
        place = {"x": x.on(alt.X, crossing), "y": place["y"]}
        # Labels of close crossings would overlap, so each is a step further down.
        down = alt.expr("(10 + 9 * datum.place) * points")
        text = alt.Text(crossing, type="quantitative", format=x.format.replace("~", ".1"))
        layers += [
            _layer("point", "mark", filled=True).encode(**place).properties(data=values),
            _layer("text", "needed", dy=down).encode(text=text, **place).properties(data=values),
        ]
    return _panel(students, look, [*layers, *names])


def _steps(at: pd.Series, domain: tuple[float, float] | None) -> pd.Series:
    """Return how many labels are above each one: 0 if the place before it is not close.

    Args:
      at: increasing places on a logarithmic axis.
      domain: the ends of the axis.
    """
    low, high = domain or (at.min(), at.max())
    close = np.log(at).diff() < _CLOSE * math.log(high / low)
    return close.groupby((~close).cumsum()).cumsum()


def _window(
    data: pd.DataFrame, whole: bool = False
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the part of curves to show, k and values: all, or where the best are near the top.

    Curves of value start far below 99%, so the window starts where the best of them is near it.
    """
    students = data[data["mode"] != REFERENCE]
    low = 0.0 if whole else max(0.0, min(0.9, float(students["mean"].median()) - 0.1))
    near = students[students["mean"] >= low]
    top = float(near[["mean", "high"]].max().max())
    return (float(near["k"].min()), float(near["k"].max())), (low, top + 0.05 * (top - low))


def _over_k(
    data: pd.DataFrame, figure: pd.DataFrame, measure: str = "", whole: bool = False, **more: Any
) -> Chart:
    """Return curves over k; the measure is that of the panel if it is not given."""
    title = str(measure or data["measure"].iloc[0]).replace("_", " ")
    ks, values = _window(data, whole)
    at = {"values": ticks(1, ks[1]), "labelOverlap": True}
    x = _Axis("k", "candidates passed, k", ks, "d", at, {"type": "log"})
    return _curves(data, figure, x, _Axis("mean", f"{title} at k", values), **more)


def _frontier(data: pd.DataFrame, figure: pd.DataFrame) -> Chart:
    _, values = _window(data)
    students = data[data["mode"] != REFERENCE]
    costs = students.loc[students["mean"] >= values[0], "cost"].min(), students["cost"].max()
    at = {"values": [share / 1000 for share in ticks(1, 1000)]}
    title = "cost of the funnel, over that of only the final ranker"
    x = _Axis("cost", title, costs, "~%", at, {"type": "log"})
    y = _Axis("mean", "value captured", values)
    return _curves(data, figure, x, y, TARGET, "cost_for_99")


def _saving(data: pd.DataFrame, figure: pd.DataFrame) -> Chart:
    title, at = {
        "target": ("share of the final value to keep (%)", [95, 96, 97, 98, 99, 99.9]),
        "student's cost": ("student's cost per candidate (% of the teacher's)", [1, 5, 10]),
    }[data["over"].iloc[0]]
    ends = figure[["mean", "low", "high"]]
    # No saving exceeds 1, and below -1 the funnel costs more than twice as much.
    seen = max(-1.0, float(ends.min().min())), min(1.0, float(ends.max().max()))
    options = {"values": at, "labelExpr": "datum.value"}
    x = _Axis("at", title, (data["at"].min(), data["at"].max()), ".1f", options)
    y = _Axis("mean", "saving", seen, "~%", scale={"nice": True})
    return _curves(data, figure, x, y, 0.0)


class _Form(NamedTuple):
    """The drawing of a figure.

    Attributes:
      draw: from the data of a panel and of the whole figure to the chart of the panel.
      width: of a panel in a file, in points: with its axis if it is the only one.
      height: the same.
      page_height: of a panel on the page, in pixels.
      columns: panels side by side in a file.
      panels: the columns of the data that make a panel; none for a single panel.
      marked: whether the lines have marks.
    """

    draw: Callable[[pd.DataFrame, pd.DataFrame], Chart]
    width: int
    height: int
    page_height: int = 400
    columns: int = 4
    panels: tuple[str, ...] = ()
    marked: bool = False


def _of_measure(measure: str, **options: Any) -> Callable[[pd.DataFrame, pd.DataFrame], Chart]:
    return functools.partial(_over_k, measure=measure, **options)


# A column of a two-column page is 3.5 inches wide, which is 252 points.
_FORMS = {
    "waterfall": _Form(_waterfall, 252, 90, 220),
    "frontier": _Form(_frontier, 252, 209, 460),
    "plane": _Form(_plane, 252, 209, 460, marked=True),
    "saving": _Form(_saving, 200, 140, columns=1, panels=("over",)),
    "hit_rates": _Form(_of_measure("", whole=True), 104, 104, 300, 3, ("measure", "task")),
    "pareto": _Form(_pareto, 252, 209, 460, marked=True),
    "value_captured": _Form(
        _of_measure("value_captured", rule=TARGET, crossing="passed_for_99"), 252, 209
    ),
    "true_value_captured": _Form(_of_measure("true_value_captured", rule=1.0), 252, 209),
    "survival": _Form(_of_measure("survival", whole=True), 252, 209),
    "calibration": _Form(_calibration, 104, 104, panels=("task",), marked=True),
}
