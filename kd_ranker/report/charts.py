"""The figures as Vega-Lite: one description each, for the files of a paper and for the page.

A figure is drawn in panels, which share its lines. A panel is a view in layers over a table; sizes
and fonts are the theme's, of which paper and page have one each.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import vl_convert

from kd_ranker.evaluation.metrics import METRICS, title_of
from kd_ranker.report.figures import REFERENCE, Figure, ticks, window
from kd_ranker.report.style import GREY, MUTED, UNDISTILLED, colours, dash, glyph, mark, theme

Spec = dict[str, Any]

FORMATS = ("svg", "pdf", "png")
KINDS = {"user_loss": "user loss", "distill_loss": "distillation loss"}

_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_DPI = 300
# In points; a column of a two-column page is 3.5 inches wide. A figure of several panels gets what
# is left for its axes.
_SIZES = {
    "waterfall": (252, 90),
    "frontier": (252, 209),
    "plane": (252, 209),
    "pareto": (252, 209),
    "value_captured": (252, 180),
    "true_value_captured": (252, 180),
    "survival": (252, 180),
    "saving": (200, 140),
    "hit_rates": (104, 104),
    "calibration": (104, 104),
    "training": (147, 104),
}
# Of the steps of the waterfall, the last one with the final ranker's scores.
_WATERFALL = [MUTED, "#7f7f7f", "#56b4e9", "#d55e00"]
# The height of a row of the legend, and the rows for which heights are made.
_ROW, _USUAL_ROWS = 11, 3
# The width of an axis with its labels and title.
_AXIS = 36
# Panels side by side; all of them if it does not say.
_BESIDE = {"saving": 1, "hit_rates": 3}
_PAGE_HEIGHT = {"waterfall": 220, "pareto": 460, "frontier": 460, "plane": 460, "hit_rates": 300}
_USUAL_PAGE_HEIGHT = 400


def files(figure: Figure) -> dict[str, bytes]:
    """A figure's files by format; the same bytes for the same data.

    Args:
      figure: one of `figures.figures`, with data.
    """
    width, height = _SIZES[figure.name]
    panels = [panel | {"width": width, "height": height} for panel in _panels(figure, hover=False)]
    spec = _themed(unit=1)
    spec["config"]["background"] = "white"
    names = list(figure.data["line"].unique())
    beside = min(len(panels), _BESIDE.get(figure.name, len(panels)))
    # A single panel is as wide with its axis as others are without.
    plots = width - _AXIS if len(panels) == 1 else (width + _AXIS) * beside - _AXIS
    columns = _legend_columns(names, plots)
    spec["config"]["legend"]["columns"] = columns
    # A legend of many rows takes no room from the plot.
    rows = math.ceil(len(names) / columns)
    for panel in panels:
        panel["height"] = height + _ROW * max(0, rows - _USUAL_ROWS) * (len(panels) == 1)
    if len(panels) == 1:
        spec |= panels[0] | {"autosize": {"type": "fit", "contains": "padding"}}
    else:
        spec |= {"concat": panels, "columns": beside}
    svg = _numbered_anew(vl_convert.vegalite_to_svg(spec))
    # In points, as the others are, where SVG has pixels of a screen.
    in_points = re.sub(
        r' width="([\d.]+)" height="([\d.]+)"', r' width="\1pt" height="\2pt"', svg, count=1
    )
    return {
        "svg": in_points.encode(),
        "pdf": _sorted_names(vl_convert.svg_to_pdf(svg)),
        "png": vl_convert.svg_to_png(svg, ppi=_DPI),
    }


def _themed(unit: float) -> Spec:
    params = [{"name": "size", "value": unit}]
    return {"$schema": _SCHEMA, "config": theme(unit), "params": params}


def _numbered_anew(svg: str) -> str:
    """The SVG with its clip paths counted from 0, which Vega counts on from figure to figure."""
    numbers: dict[str, int] = {}
    return re.sub(
        r'(id="|url\(#)clip(\d+)',
        lambda found: f"{found[1]}clip{numbers.setdefault(found[2], len(numbers))}",
        svg,
    )


def _sorted_names(pdf: bytes) -> bytes:
    """The PDF with the names of a page's parts in order; they come in another one at each call.

    Their lines keep their lengths, so that all else stays where the file says that it is.
    """
    return re.sub(
        rb"(?:^ +/[a-z]+\d+ \d+ 0 R\n)+",
        lambda found: b"".join(sorted(found[0].splitlines(keepends=True))),
        pdf,
        flags=re.MULTILINE,
    )


def _legend_columns(names: Sequence[str], width: float) -> int:
    """The number of entries that fit side by side into a legend, by a letter's usual width."""
    return max(1, int(width / (3.6 * max(map(len, names)) + 30)))


def page_panels(figure: Figure) -> list[str]:
    """A figure's panels for the page, each as JSON; the page sets width and columns of the legend.

    Args:
      figure: one of `figures.figures`, with data.
    """
    frame = _themed(unit=1.6) | {
        "height": _PAGE_HEIGHT.get(figure.name, _USUAL_PAGE_HEIGHT),
        "autosize": {"type": "fit", "contains": "padding"},
    }
    panels = [frame | panel for panel in _panels(figure, hover=True)]
    # A "<" in a name must not end the script that the JSON stands in.
    return [json.dumps(panel, sort_keys=True).replace("<", "\\u003c") for panel in panels]


def _panels(figure: Figure, hover: bool) -> list[Spec]:
    """A figure's panels; with `hover`, lines without marks tell their numbers under the pointer."""
    return _DRAWERS[figure.name](figure.data, hover)


def _panel(
    data: pd.DataFrame, layers: Sequence[Spec], figure: pd.DataFrame, marked: bool = False
) -> Spec:
    """Layers over a table, in the colours of a figure's lines, with a legend of them.

    Args:
      data: of the panel.
      layers: from the back to the front.
      figure: of all panels, with the columns `line`, `mode`, `serve` where dashes differ, and
        `colour` where it is not the mode's.
      marked: whether lines have the marks of their modes.
    """
    lines = figure.drop_duplicates("line")
    serves = lines["serve"] if "serve" in lines else ["user"] * len(lines)
    glyphs = [glyph(m, serve, marked) for m, serve in zip(lines["mode"], serves, strict=True)]
    palette = lines["colour"] if "colour" in lines else colours(lines["mode"].tolist())
    colour = _of_line(lines["line"], list(palette))
    # Nothing is drawn here: it gives the layers their colours and their legend, and hears clicks.
    key = {
        "mark": {"type": "point", "size": 0, "filled": True, "opacity": 1},
        "params": [
            {"name": "chosen", "select": {"type": "point", "fields": ["line"]}, "bind": "legend"}
        ],
        "encoding": {"color": colour, "shape": _of_line(lines["line"], glyphs)},
    }
    coloured = [layer | {"encoding": {"color": colour} | layer["encoding"]} for layer in layers]
    return {"data": {"values": _records(data)}, "layer": [key, *coloured]}


def _of_line(names: pd.Series, values: list[str]) -> Spec:
    scale = {"domain": names.tolist(), "range": values}
    return {"field": "line", "type": "nominal", "scale": scale}


def _records(data: pd.DataFrame) -> list[Spec]:
    """The lines of a table, with the path of their mark."""
    lines = data.assign(path=data["mode"].map(mark)).to_dict("records")
    return [
        {str(name): None if pd.isna(value) else _short(value) for name, value in line.items()}
        for line in lines
    ]


def _short(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _layer(
    mark_type: str,
    encoding: Spec,
    style: str,
    *,
    where: str = "",
    opacity: float = 1.0,
    **properties: Any,
) -> Spec:
    """One kind of mark; those of lines that are not chosen in the legend fade.

    Args:
      mark_type: "line", "point" and the like.
      encoding: by channel.
      style: its sizes, see `style.theme`.
      where: a Vega expression; "" takes the whole table.
      opacity: of the others.
      **properties: of the mark.
    """
    shown = {"condition": {"param": "chosen", "value": opacity}, "value": 0.07 * opacity}
    mark = {"type": mark_type, "style": style, **properties}
    layer = {"mark": mark, "encoding": encoding | {"opacity": shown}}
    return layer | {"transform": [{"filter": where}]} if where else layer


def _lines(data: pd.DataFrame, encoding: Spec, **properties: Any) -> list[Spec]:
    """Lines in the dashes of their serving choices."""
    return [
        _layer(
            "line", encoding, "curve", where=f"datum.serve === {json.dumps(serve)}",
            strokeDash=dash(serve), **properties,
        )
        for serve in data["serve"].unique()
    ]  # fmt: skip


def _points(encoding: Spec, tooltip: list[Spec], style: str = "point") -> Spec:
    """Marks in the shapes of their modes, which tell their numbers under the pointer."""
    shape = {"field": "path", "type": "nominal", "scale": None}
    return _layer("point", encoding | {"shape": shape, "tooltip": tooltip}, style, filled=True)


def _under_pointer(encoding: Spec, tooltip: list[Spec]) -> Spec:
    """Points that are not seen, and tell the numbers of a line without marks."""
    seen = {"value": 0}
    # What lies outside would count for the room that the panel is fitted into.
    mark = {"type": "point", "size": 150, "clip": True}
    return {"mark": mark, "encoding": encoding | {"opacity": seen, "tooltip": tooltip}}


def _reference(encoding: Spec, values: list[Spec]) -> Spec:
    """A dashed line to compare with, which is none of the figure's lines."""
    return {
        "data": {"values": values},
        "mark": {"type": "line" if len(values) > 1 else "rule", "style": "reference"},
        "encoding": encoding | {"color": {"value": GREY}},
    }


def _number(field: str, title: str = "", **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": title or None, **more}


def _told(field: str, title: str, digits: int = 4) -> Spec:
    """A number under the pointer."""
    return _number(field, title, format=f".{digits}f")


def _name(field: str, title: str) -> Spec:
    return {"field": field, "type": "nominal", "title": title}


def _pareto(data: pd.DataFrame, hover: bool) -> list[Spec]:
    place, layers = {}, []
    for axis, measure in (("x", "user_bce"), ("y", "teacher_bce")):
        title = f"{title_of(measure)}, mean over tasks (nats)"
        place[axis] = _number(measure, title, scale={"zero": False}, axis={"tickCount": 6})
    for axis, measure in (("x", "user_bce"), ("y", "teacher_bce")):
        ends = {axis: place[axis] | {"field": f"{measure}_low"}}
        ends[f"{axis}2"] = {"field": f"{measure}_high"}
        # The points are what to compare; bars of what is not paired are wide.
        layers.append(_layer("rule", place | ends, "interval", opacity=0.45))
    weight = {"field": "weight", "type": "quantitative"}
    tooltip = [
        _name("setting", "setting"),
        *(_told(measure, title_of(measure)) for measure in ("user_bce", "teacher_bce")),
    ]
    layers += [
        *_lines(data, place | {"order": weight}),
        _points(place, tooltip),
        _layer("text", place | {"text": weight}, "weight", where="isValid(datum.weight)"),
    ]
    return [_panel(data, layers, data, marked=True)]


def _waterfall(data: pd.DataFrame, hover: bool) -> list[Spec]:
    y = {
        "field": "line", "type": "nominal", "title": None, "sort": data["line"].tolist(),
        "axis": {"labelLimit": 0},
    }  # fmt: skip
    x = _number("mean", "candidates to pass for 99% of the final value", scale={"zero": True})
    place = {"x": x, "y": y, "color": _of_line(data["line"], _WATERFALL[-len(data) :])}
    place["color"]["legend"] = None
    tooltip = [_name("setting", "setting"), _told("mean", "candidates", 0)]
    ends = {"x": x | {"field": "low"}, "x2": {"field": "high"}, "y": y}
    layers = [
        {"mark": {"type": "bar"}, "encoding": place | {"tooltip": tooltip}},
        {"mark": {"type": "rule", "style": "interval"}, "encoding": ends},
        {"mark": {"type": "text", "style": "needed"},
         "encoding": {"x": x | {"field": "end"}, "y": y, "text": _number("mean", format=".0f")}},
    ]  # fmt: skip
    shown = data.assign(end=data[["mean", "high"]].max(axis=1))
    return [{"data": {"values": _records(shown)}, "layer": layers}]


def _plane(data: pd.DataFrame, hover: bool) -> list[Spec]:
    titles = {"saving": "saving", "users": "change for users"}
    axis = {"tickCount": 6, "format": "~%"}
    x, y = (_number(name, title, axis=axis) for name, title in titles.items())
    y["axis"] = axis | {"format": "+.2~%"}
    layers = [_reference({"y": y | {"field": "margin"}}, _records(data[:1]))]
    for channel, place in (("x", x), ("y", y)):
        ends = {channel: place | {"field": f"{place['field']}_low"}}
        ends[f"{channel}2"] = {"field": f"{place['field']}_high"}
        layers.append(_layer("rule", {"x": x, "y": y} | ends, "interval", opacity=0.45))
    tooltip = [_name("setting", "setting"), *(_told(name, title) for name, title in titles.items())]
    layers.append(_points({"x": x, "y": y}, tooltip))
    return [_panel(data, layers, data, marked=True)]


def _frontier(data: pd.DataFrame, hover: bool) -> list[Spec]:
    students, references = data[data["mode"] != REFERENCE], data[data["mode"] == REFERENCE]
    if students["size"].nunique() > 1:
        # A colour a size, and a broken line for the student of it that does not distil.
        sizes = list(students["size"].unique())
        students = students.assign(
            colour=students["size"].map(dict(zip(sizes, colours(sizes), strict=True))),
            serve=students["mode"].map(lambda mode: UNDISTILLED if mode == "none" else "user"),
        )
    low = window(students)[2]
    shares = [float(students.loc[students["mean"] >= low, "cost"].min()),
              float(students["cost"].max())]  # fmt: skip
    x = _number(
        "cost",
        "cost of the funnel, over the final ranker's alone",
        scale={"type": "log", "domain": shares, "nice": False},
        axis={"values": [share / 1000 for share in ticks(1, 1000)], "format": "~%"},
    )
    y = _number("mean", "value captured", scale={"domain": [low, 1.005], "nice": False},
                axis={"tickCount": 6})  # fmt: skip
    inside = references[(references["mean"] >= low) & (references["cost"] >= shares[0])]
    told = [_number("k", "k"), _number("cost", "cost", format=".1%")]
    layers = [
        *_muted(inside, x, y),
        *_banded(students, x, y, told, hover),
        *_crossings(students, x | {"field": "cost_for_99"}, y, ".1%"),
    ]
    return [_panel(students, layers, students)]


def _muted(data: pd.DataFrame, x: Spec, y: Spec) -> list[Spec]:
    """Lines to compare with, each with its name where it begins."""
    place = {"x": x, "y": y, "color": {"value": MUTED}}
    lines = [
        {"data": {"values": _records(of)}, "mark": {"type": "line", "style": "muted", "clip": True},
         "encoding": place}
        for _, of in data.groupby("line", sort=False)
    ]  # fmt: skip
    names = {
        "data": {"values": _records(data.drop_duplicates("line"))},
        "mark": {"type": "text", "style": "named"},
        "encoding": place | {"text": {"field": "line"}},
    }
    return [*lines, names] if lines else []


def _crossings(data: pd.DataFrame, x: Spec, y: Spec, form: str) -> list[Spec]:
    """Marks where each line reaches 99%, with the number there."""
    field = x["field"]
    crossings = data.drop_duplicates("line").sort_values(field)
    values = [
        value | {"at": 0.99, "place": place} for place, value in enumerate(_records(crossings))
    ]
    at = {"x": x, "y": y | {"field": "at"}}
    tooltip = [_name("line", "setting"), _told("passed_for_99", title_of("passed_for_99"), 0)]
    # Crossings may lie close together, so their labels go down in steps.
    down = {"expr": "(10 + 9 * datum.place) * size"}
    needed = at | {"text": _number(field, format=form)}
    return [
        _reference({"y": at["y"]}, values[:1]),
        {"data": {"values": values}} | _points(at, tooltip, "crossing"),
        {"data": {"values": values}} | _layer("text", needed, "needed", dy=down),
    ]


def _value_captured(data: pd.DataFrame, hover: bool) -> list[Spec]:
    students = data[data["mode"] != REFERENCE]
    left, right, low = window(students)
    x, y, layers = _over_k(data, "value captured at k", [left, right], [low, 1.005], hover)
    layers += _crossings(students, x | {"field": "passed_for_99"}, y, ".0f")
    return [_panel(students, layers, students)]


def _survival(data: pd.DataFrame, hover: bool) -> list[Spec]:
    last = float(data["k"].max())
    _, _, layers = _over_k(data, "survival at k", [1, last], [0, 1.02], hover)
    students = data[data["mode"] != REFERENCE]
    return [_panel(students, layers, students)]


def _true_value_captured(data: pd.DataFrame, hover: bool) -> list[Spec]:
    last = float(data["k"].max())
    # Where hardly anything is passed there is hardly anything to show.
    seen = data[data["mean"] >= 0.8]
    values = [float(seen["low"].min()), float(seen["high"].max())]
    ks = [float(seen["k"].min()), last]
    _, y, layers = _over_k(data, "true value captured at k", ks, values, hover)
    layers.append(_reference({"y": y | {"field": "all"}}, [{"all": 1.0}]))
    students = data[data["mode"] != REFERENCE]
    return [_panel(students, layers, students)]


def _hit_rates(data: pd.DataFrame, hover: bool) -> list[Spec]:
    panels = []
    for (measure, task), of_task in data.groupby(["measure", "task"], sort=False):
        values = [0.0, 1.05 * float(of_task[["mean", "high"]].max().max())]
        ks = [1.0, float(data["k"].max())]
        x, _, layers = _over_k(of_task, METRICS[str(measure)].title, ks, values, hover)
        x["axis"]["values"] = [k for k in x["axis"]["values"] if str(k).startswith("1")]
        panels.append(_panel(of_task, layers, data) | {"title": task})
    return panels


def _saving(data: pd.DataFrame, hover: bool) -> list[Spec]:
    axes = {
        "target": ("share of the final value to keep (%)", [95, 96, 97, 98, 99, 99.9]),
        "student's cost": ("student's cost a candidate (% of the teacher's)", [1, 5, 10]),
    }
    ends = data[["mean", "low", "high"]]
    # Nobody saves more than all, and what costs more than twice as much is beside the point.
    seen = [max(-1.0, float(ends.min().min())), min(1.0, float(ends.max().max()))]
    y = _number("mean", "saving", scale={"domain": seen}, axis={"tickCount": 6, "format": "~%"})
    panels = []
    for over, of_panel in data.groupby("over", sort=False):
        title, values = axes[str(over)]
        x = _number(
            "at",
            title,
            scale={"zero": False, "nice": False},
            axis={"values": values, "labelExpr": "datum.value"},
        )
        layers = [
            _reference({"y": y | {"field": "none"}}, [{"none": 0.0}]),
            *_banded(of_panel, x, y, [_told("at", title, 1)], hover),
        ]
        panels.append(_panel(of_panel, layers, data))
    return panels


def _over_k(
    data: pd.DataFrame, title: str, ks: list[float], values: list[float], hover: bool
) -> tuple[Spec, Spec, list[Spec]]:
    """The axes of k and of a value, each over its range, and a line with a band per setting.

    References are muted.
    """
    x = _number(
        "k",
        "candidates passed, k",
        scale={"type": "log", "domain": ks, "nice": False},
        axis={"values": ticks(1, float(data["k"].max())), "format": "d"},
    )
    y = _number("mean", title, scale={"domain": values, "nice": False}, axis={"tickCount": 6})
    students, references = data[data["mode"] != REFERENCE], data[data["mode"] == REFERENCE]
    inside = references[
        references["k"].between(ks[0], ks[1]) & references["mean"].between(values[0], values[1])
    ]
    layers = [*_muted(inside, x, y), *_banded(students, x, y, [_number("k", "k")], hover)]
    return x, y, layers


def _banded(data: pd.DataFrame, x: Spec, y: Spec, told: list[Spec], hover: bool) -> list[Spec]:
    """A line with a band a setting; under the pointer `told` and the number on `y`."""
    band = {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}}
    tooltip = [_name("line", "setting"), *told, _told("mean", y["title"])]
    return [
        _layer("area", band, "band", opacity=0.15, clip=True),
        *_lines(data, {"x": x, "y": y}, clip=True),
        *([_under_pointer({"x": x, "y": y}, tooltip)] if hover else []),
    ]


def _calibration(data: pd.DataFrame, hover: bool) -> list[Spec]:
    panels = []
    for task, of_task in data.groupby("task", sort=False):
        top = 1.05 * float(of_task[["predicted", "observed"]].max().max())
        axes = {"scale": {"domain": [0, top], "nice": False}, "axis": {"tickCount": 5}}
        x, y = (_number(field, field, **axes) for field in ("predicted", "observed"))
        tooltip = [
            _name("line", "setting"),
            *(_told(field, field) for field in ("predicted", "observed")),
            _told("weight", "weight", 0),
        ]
        layers = [
            _reference(
                {"x": x, "y": y},
                [dict.fromkeys(("predicted", "observed"), end) for end in (0, top)],
            ),
            *_lines(of_task, {"x": x, "y": y, "order": {"field": "bin", "type": "quantitative"}}),
            _points({"x": x, "y": y}, tooltip),
        ]
        panels.append(_panel(of_task, layers, data, marked=True) | {"title": task})
    return panels


def _training(data: pd.DataFrame, hover: bool) -> list[Spec]:
    panels = []
    for kind in [kind for kind in KINDS if (data["kind"] == kind).any()]:
        of_kind = data[data["kind"] == kind]
        x = _number("step", "step", scale={"nice": False}, axis={"tickCount": 5, "format": "d"})
        y = _number("loss", KINDS[kind], scale={"zero": False}, axis={"tickCount": 6})
        place = {"x": x, "y": y, "detail": {"field": "repeat", "type": "nominal"}}
        tooltip = [
            _name("line", "setting"), _name("repeat", "repeat"), _number("step", "step"),
            _told("loss", KINDS[kind]),
        ]  # fmt: skip
        layers = [
            _layer("line", place, "repeat", where="datum.repeat !== 'mean'", opacity=0.4),
            _layer("line", place, "curve", where="datum.repeat === 'mean'"),
            *([_under_pointer({"x": x, "y": y}, tooltip)] if hover else []),
        ]
        panels.append(_panel(of_kind, layers, data))
    return panels


_DRAWERS: dict[str, Callable[[pd.DataFrame, bool], list[Spec]]] = {
    "waterfall": _waterfall,
    "frontier": _frontier,
    "plane": _plane,
    "saving": _saving,
    "hit_rates": _hit_rates,
    "pareto": _pareto,
    "value_captured": _value_captured,
    "true_value_captured": _true_value_captured,
    "survival": _survival,
    "calibration": _calibration,
    "training": _training,
}
