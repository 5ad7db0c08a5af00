"""Draw the figures with Altair, one chart each, for a paper's files and for the page.

Lines have the color and the mark of their mode, and the dash of their serving choice. These are the
same in every figure. Rankers without a model are gray.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import altair as alt
import pandas as pd
import vl_convert

from kd_ranker.evaluation.metrics import TARGET, title_of
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.study import Study

Chart = alt.LayerChart | alt.FacetChart

FORMATS = ("svg", "pdf", "png")
# The mode of rankers without a model.
REFERENCE = "reference"

# After Okabe and Ito's palette for color-blind readers (jfly.uni-koeln.de, 2008). All of these are
# visible on a white and on a black page.
_BY_MODE = {"none": "#7f7f7f", "aux": "#d55e00", "shared": "#0072b2"}
# The last four are of Tol's muted palette (personal.sron.nl/~pault, 2021).
_OTHERS = (
    *("#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    *("#332288", "#999933", "#882255", "#44aa99"),
)
_GRAY, _MUTED = "#808080", "#b4b4b4"
_BY_STEP = {
    "today's early ranker": _MUTED,
    "mode none": _BY_MODE["none"],
    "best without scores": "#56b4e9",
    "best with scores": _BY_MODE["aux"],
}
_SHAPES = {"none": "square", "aux": "circle", "shared": "diamond"}
# By serving choice, lengths of dashes and gaps.
_DASHES: dict[str, list[float]] = {"user": [1.0, 0.0], "teacher": [7, 4], "blend": [2, 3]}
# The dash of a student without distillation, where a color is a size and not a mode.
_UNDISTILLED = [6.0, 3.0]
# The dash of a list of items, next to the incumbent's line.
_LIST = [1.0, 3.0]

# Pixels of a chart per point of a file, and dots per inch of a PNG.
_SCALE, _DPI = 1.6, 300
# Pixels: a column of a two-column page, 3.5 inches, and the narrowest page.
_COLUMN, _NARROW = 403, 376
# The height of a plot on the page, over that in a file.
_PAGE_HEIGHT = 1.4
# On the page, a click on a name in the legend fades the other lines. In a file, no line fades.
_CHOSEN = alt.selection_point(name="chosen", fields=["line"], bind="legend")
_ALL = alt.param(name="chosen", value=True)

# In pixels.
_THEME: dict[str, Any] = {
    "background": "transparent", "font": "sans-serif", "padding": 3, "aria": False,
    "view": {"stroke": None},
    "style": {
        "curve": {"strokeWidth": 1.9},
        "thin": {"strokeWidth": 0.8},
        "reference": {"strokeWidth": 1.1, "strokeDash": [6, 5]},
        "mark": {"size": 50},
        "weight": {"align": "left", "fontSize": 10, "dx": 5, "dy": -6},
        "needed": {"align": "left", "fontSize": 11, "dx": 10},
    },
    "axis": {
        "labelFontSize": 11, "titleFontSize": 13, "titleFontWeight": "normal", "titlePadding": 6,
        "labelPadding": 3, "labelFlush": False, "domainColor": "black", "tickColor": "black",
        "gridColor": "#e4e4e4", "gridWidth": 0.8,
    },
    "legend": {
        "orient": "top", "title": None, "offset": 6, "labelFontSize": 11, "labelLimit": 0,
        "symbolStrokeWidth": 1.9, "columnPadding": 16,
    },
}  # fmt: skip


class Entry(NamedTuple):
    """A figure that a report may have.

    Attributes:
      data: makes its table.
      draw: from its table to its chart.
      title: its content.
      caption: how to read it; with places for the baseline and other words of the study.
      empty: why its table may be empty.
      shown: whether a study has this figure.
      height: of its plot in a file, in pixels.
      marked: whether its lines have marks.
    """

    data: Callable[[Study, Estimates], pd.DataFrame]
    draw: Callable[[pd.DataFrame], Chart]
    title: str
    caption: str
    empty: str = "the test requests of the best settings are not known"
    shown: Callable[[Study], bool] = lambda study: True
    height: int = 270
    marked: bool = False


class Figure(NamedTuple):
    """A figure of a study: its entry by name, the caption with the words of the study, the table.

    A figure with an empty table is left out.
    """

    name: str
    entry: Entry
    caption: str
    data: pd.DataFrame


def files(figure: Figure) -> dict[str, bytes]:
    """Return the files of a figure with data by format, a paper's column wide."""
    chart = _chart(figure, _COLUMN, width=_COLUMN, height=figure.entry.height, background="white")
    svg = vl_convert.vegalite_to_svg(chart.add_params(_ALL).to_dict())
    (size, *ends), *_ = re.findall(r'(width="([\d.]+)" height="([\d.]+)")', svg)

    def sized(unit: str) -> str:
        """Return the SVG in points; without a unit, the other formats read its size as points."""
        width, height = (f"{float(end) / _SCALE:g}{unit}" for end in ends)
        return svg.replace(size, f'width="{width}" height="{height}"', 1)

    return {
        "svg": sized("pt").encode(),
        "pdf": vl_convert.svg_to_pdf(sized("")),
        "png": vl_convert.svg_to_png(sized(""), ppi=_DPI),
    }


def page_chart(figure: Figure) -> str:
    """Return the chart of a figure with data as JSON, as wide as its place on the page."""
    height = _PAGE_HEIGHT * figure.entry.height
    chart = _chart(figure, _NARROW, width="container", height=height).add_params(_CHOSEN)
    # A "<" in a name must not end the script element that holds the JSON.
    return json.dumps(chart.to_dict(), sort_keys=True).replace("<", "\\u003c")


def _chart(figure: Figure, legend_width: int, width: Any, height: float, **theme: str) -> Chart:
    # About the width of the longest name, with its symbol and the number of a crossing.
    entry = 6 * int(figure.data["line"].str.len().max()) + 90
    legend = _THEME["legend"] | {
        # Legends do not wrap by themselves.
        "columns": max(1, legend_width // entry),
        "symbolSize": 50 if figure.entry.marked else 300,
        "rowPadding": 2 * figure.entry.marked,
    }
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    chart = figure.entry.draw(figure.data).properties(width=width, height=height, autosize=fit)
    return chart.configure(**(_THEME | {"legend": legend} | theme))


def colors(modes: Sequence[str]) -> list[str]:
    """Return a color per line, by the mode of each.

    The first line of a known mode gets the color of the mode, the same in every figure. Other
    lines get the next free color, and references are gray.
    """
    free, by_mode = itertools.cycle(_OTHERS), dict(_BY_MODE)
    return [
        _MUTED if mode == REFERENCE else by_mode.pop(mode) if mode in by_mode else next(free)
        for mode in modes
    ]


def ticks(low: float, high: float) -> list[int]:
    """Return round numbers for a logarithmic axis of k.

    >>> ticks(30, 2000)
    [50, 100, 200, 500, 1000, 2000]
    """
    steps = (step * 10**power for power in range(10) for step in (1, 2, 5))
    return [step for step in steps if low <= step <= high]


class _Axis(NamedTuple):
    """An axis of numbers, which several columns may share.

    `domain` None fits it to the data. `format` is D3's; `options` are of its labels, `scale` of its
    scale.
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


def _look(data: pd.DataFrame, marked: bool) -> dict[str, Any]:
    """Return the channels by which lines differ, the same in all layers of a figure.

    If the column `size` has several values, a color is a size, and students without distillation
    have a broken line. If marked, the legend has the marks of the modes in place of lines.
    """
    lines = data.drop_duplicates("line")
    modes, names = lines["mode"], lines["line"].tolist()
    palette = colors(modes.where(lines["plain"], "variant").tolist())
    dashes = [
        _LIST if mode == REFERENCE and not name.startswith("incumbent") else _DASHES[serve]
        for mode, name, serve in zip(modes, names, lines["serve"], strict=True)
    ]
    if "size" in lines and lines.loc[modes != REFERENCE, "size"].nunique() > 1:
        sizes = lines["size"].where(modes != REFERENCE, REFERENCE).tolist()
        of_size = dict(zip(dict.fromkeys(sizes), colors([*dict.fromkeys(sizes)]), strict=True))
        palette = [of_size[size] for size in sizes]
        dashes = [_UNDISTILLED if mode == "none" else _DASHES["user"] for mode in modes]
    shapes = [_SHAPES.get(mode, "triangle-up") if marked else "stroke" for mode in modes]

    def of_line(channel: Any, looks: Sequence[Any]) -> Any:
        return channel("line:N", scale=alt.Scale(domain=names, range=looks))

    dash = of_line(alt.StrokeDash, dashes)
    if marked:
        # In the legend, a mark with a broken outline would look damaged.
        by_serve = alt.Scale(domain=list(_DASHES), range=list(_DASHES.values()))
        dash = alt.StrokeDash("serve:N", scale=by_serve, legend=None)
    color, shape = of_line(alt.Color, palette), of_line(alt.Shape, shapes)
    return {"color": color, "shape": shape, "strokeDash": dash}


def _layered(data: pd.DataFrame, look: dict[str, Any], layers: Sequence[alt.Chart]) -> Chart:
    """Return layers over a table, from the back to the front, with a legend of their lines."""
    # This layer draws nothing: it holds the legend, and receives clicks on it.
    key = alt.Chart().mark_point(size=0, filled=True, opacity=1).encode(**look)
    return alt.layer(key, *layers, data=_values(data)).encode(color=look["color"])


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


def _rule(y: _Axis, value: float) -> alt.Chart:
    """Return a dashed line for comparison at a value."""
    line = alt.Chart(alt.InlineData(values=[{y.field: value}]))
    return line.mark_rule(style="reference", clip=True).encode(
        color=alt.value(_GRAY), y=y.on(alt.Y)
    )


def waterfall(data: pd.DataFrame) -> Chart:
    """Draw a bar per step, with its interval and its number."""
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


def _points(
    data: pd.DataFrame, x: _Axis, y: _Axis, back: Sequence[alt.Chart], order: str = ""
) -> Chart:
    """Return a mark per row over the layers `back`, with a bar per interval.

    The ends of the interval of an axis are the columns `_low` and `_high` of its field. Lines
    connect the marks along the column `order`; "" draws none.
    """
    look, place = _look(data, True), {"x": x.on(alt.X), "y": y.on(alt.Y)}
    # Pale, since readers should compare the marks.
    bar = _layer("rule", "thin", opacity=0.45)
    across, up = x.on(alt.X, f"{x.field}_low"), y.on(alt.Y, f"{y.field}_low")
    layers = [
        *back,
        bar.encode(x=across, x2=f"{x.field}_high", y=place["y"]),
        bar.encode(x=place["x"], y=up, y2=f"{y.field}_high"),
    ]
    if order:
        lines = _layer("line", "curve", clip=True)
        layers.append(lines.encode(order=f"{order}:Q", strokeDash=look["strokeDash"], **place))
    layers.append(_layer("point", "mark", filled=True).encode(shape=look["shape"], **place))
    layers.append(_under_pointer(x, y, **place))
    if order:
        text = _layer("text", "weight").encode(text=f"{order}:Q", **place)
        layers.append(text.transform_filter(f"isValid(datum.{order})"))
    return _layered(data, look, layers)


def pareto(data: pd.DataFrame) -> Chart:
    """Draw the loss against the teacher over that against users, a line per way."""
    x, y = (
        _Axis(of, f"{title_of(of)}, mean over tasks (nats)") for of in ("user_bce", "teacher_bce")
    )
    return _points(data, x, y, (), "weight")


def plane(data: pd.DataFrame) -> Chart:
    """Draw the change for users over the saving, with a line at −`margin`."""
    x = _Axis("saving", "saving", format="~%", scale={"zero": True})
    y = _Axis("users", "change for users", format="+.2~%", scale={"zero": True})
    return _points(data, x, y, [_rule(y, float(data["margin"].iloc[0]))])


def _curves(
    data: pd.DataFrame, x: _Axis, y: _Axis, rule: float | None = None,
    crossing: tuple[str, str] = ("", ""),
) -> Chart:  # fmt: skip
    """Return a line with a band per ranker.

    Args:
      data: tidy curves.
      x: the axis of its `field`, with a domain.
      y: the axis of the column `mean`, with the ends `low` and `high`, and a domain.
      rule: where a dashed line is; None draws none.
      crossing: the column with the place where a line crosses the rule, and the format of this
        number. The crossing gets a mark, and the legend has its number. "" marks none.
    """
    column, number = crossing
    if column:
        numbers = data[column].map(f": {{:{number}}}".format)
        data = data.assign(line=data["line"] + numbers)
    look, place = _look(data, False), {"x": x.on(alt.X), "y": y.on(alt.Y)}
    layers = [
        _layer("area", "band", opacity=0.15, clip=True).encode(
            x=place["x"], y=y.on(alt.Y, "low"), y2="high"
        ),
        _layer("line", "curve", clip=True).encode(strokeDash=look["strokeDash"], **place),
        _under_pointer(x, y, **place),
    ]
    if rule is not None:
        layers.append(_rule(y, rule))
    if column:
        marks = _layer("point", "mark", filled=True, clip=True)
        at = _values(data.drop_duplicates("line").assign(mean=rule))
        marks = marks.encode(x=x.on(alt.X, column), y=place["y"])
        layers.append(marks.properties(data=at))
    return _layered(data, look, layers)


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


def over_k(data: pd.DataFrame, measure: str, whole: bool = False, **more: Any) -> Chart:
    """Draw a measure over k, from 0 if `whole`; `more` are of `_curves`."""
    ks, values = _window(data, whole)
    at = {"values": ticks(1, ks[1]), "labelOverlap": True}
    x = _Axis("k", "candidates passed, k", ks, "d", at, {"type": "log"})
    return _curves(data, x, _Axis("mean", f"{measure.replace('_', ' ')} at k", values), **more)


def frontier(data: pd.DataFrame) -> Chart:
    """Draw the value captured over the cost of the funnel."""
    _, values = _window(data)
    students = data[data["mode"] != REFERENCE]
    costs = students.loc[students["mean"] >= values[0], "cost"].min(), students["cost"].max()
    at = {"values": [share / 1000 for share in ticks(1, 1000)]}
    title = "cost of the funnel, over that of only the final ranker"
    x = _Axis("cost", title, costs, "~%", at, {"type": "log"})
    y = _Axis("mean", "value captured", values)
    return _curves(data, x, y, TARGET, ("cost_for_99", ".1%"))


def saving(data: pd.DataFrame) -> Chart:
    """Draw the saving over the share of the final value to keep."""
    ends = data[["mean", "low", "high"]]
    # No saving exceeds 1, and below -1 the funnel costs more than twice as much.
    seen = max(-1.0, float(ends.min().min())), min(1.0, float(ends.max().max()))
    options = {"values": [95, 96, 97, 98, 99, 99.9], "labelExpr": "datum.value"}
    targets = (data["target"].min(), data["target"].max())
    x = _Axis("target", "share of the final value to keep (%)", targets, ".1f", options)
    return _curves(data, x, _Axis("mean", "saving", seen, "~%", scale={"nice": True}), 0.0)
