"""Colours, dashes, marks and sizes, the same in every figure."""

import itertools
from collections.abc import Sequence
from typing import Any

# After Okabe and Ito's palette, which stays apart for colour-blind eyes (jfly.uni-koeln.de, 2008).
# None of these needs a white or a black page to be seen.
_KNOWN = {"none": "#7f7f7f", "aux": "#d55e00", "shared": "#0072b2"}
# The last four are of Tol's muted palette (personal.sron.nl/~pault, 2021).
_OTHERS = (
    *("#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    *("#332288", "#999933", "#882255", "#44aa99"),
)
GREY = "#808080"
# Lighter than the mode none.
MUTED = "#a9a9a9"
# Takes the place of a serving choice where a colour is not the mode's.
UNDISTILLED = "undistilled"

# By serving choice: lengths of dashes and gaps, and such a line as an SVG path from -3 to 3.
_DASHES: dict[str, tuple[list[float], str]] = {
    "user": ([1, 0], "M-3,0H3"),
    "teacher": ([5, 2.5], "M-3,0h1.6m.6,0h1.6m.6,0h1.6"),
    UNDISTILLED: ([4, 2], "M-3,0h1.4m.8,0h1.6m.8,0h1.4"),
    "blend": ([1.2, 2], "M-3,0h.5m.6,0h.5m.6,0h.5m.6,0h.5m.6,0h.5m.6,0h.5"),
}
_OTHER_DASH: tuple[list[float], str] = ([5, 2, 1.2, 2], "M-3,0h1.6m.5,0h.5m.5,0h1.6m.5,0h.5")
# By mode, so that colour is not all there is: an SVG path around the middle.
_MARKS = {
    "none": "M-.85,-.85H.85V.85H-.85Z",
    "aux": "M-.95,0A.95,.95,0,1,1,.95,0A.95,.95,0,1,1,-.95,0Z",
    "shared": "M0,-1.25L1.25,0L0,1.25L-1.25,0Z",
}
_OTHER_MARK = "M0,-1.1L1.1,.9H-1.1Z"


def colours(modes: Sequence[str]) -> list[str]:
    """A colour a line, of lines of these modes.

    It is that of the mode, which is the same in every figure, for the first line of a mode; further
    ones, and modes that the package does not know, take the next colours that are free.
    """
    free = iter(itertools.cycle(_OTHERS))
    known = dict(_KNOWN)
    return [known.pop(mode) if mode in known else next(free) for mode in modes]


def dash(serve: str) -> list[float]:
    """The dash of a serving choice: lengths of dashes and gaps in turn."""
    return _DASHES.get(serve, _OTHER_DASH)[0]


def mark(mode: str) -> str:
    """The mark of a mode as an SVG path."""
    return _MARKS.get(mode, _OTHER_MARK)


def glyph(mode: str, serve: str, marked: bool) -> str:
    """A line in a legend as an SVG path: its dash, and over it its mark if it has one."""
    return _DASHES.get(serve, _OTHER_DASH)[1] + (mark(mode) if marked else "")


def theme(unit: float) -> dict[str, Any]:
    """The Vega-Lite config of figures whose text has 7 and 8 units."""
    return {
        "background": None,
        "font": "sans-serif",
        "padding": 2,
        "aria": False,
        "view": {"stroke": None},
        "style": _styles(unit),
        "axis": _axis(unit),
        "legend": _legend(unit),
        "title": {"fontSize": 8 * unit, "fontWeight": "normal", "offset": 4 * unit},
        "concat": {"spacing": 14 * unit},
    }


def _styles(unit: float) -> dict[str, Any]:
    """By the name of a style, which a mark carries."""
    return {
        "curve": {"strokeWidth": 1.2 * unit},
        "repeat": {"strokeWidth": 0.5 * unit},
        "interval": {"strokeWidth": 0.5 * unit},
        "reference": {"strokeWidth": 0.7 * unit, "strokeDash": [4 * unit, 3 * unit]},
        "muted": {"strokeWidth": 0.7 * unit},
        "named": {"align": "left", "fontSize": 6 * unit, "dx": 7 * unit, "dy": -2 * unit},
        "point": {"size": 20 * unit**2},
        "crossing": {"size": 30 * unit**2},
        "weight": {"align": "left", "fontSize": 6 * unit, "dx": 3 * unit, "dy": -4 * unit},
        "needed": {"align": "left", "fontSize": 7 * unit, "dx": 6 * unit},
    }


def _axis(unit: float) -> dict[str, Any]:
    return {
        "labelFontSize": 7 * unit,
        "titleFontSize": 8 * unit,
        "titleFontWeight": "normal",
        "titlePadding": 4 * unit,
        "labelPadding": 2 * unit,
        "labelFlush": False,
        "domainColor": "black",
        "domainWidth": 0.6 * unit,
        "tickColor": "black",
        "tickSize": 3 * unit,
        "tickWidth": 0.6 * unit,
        "gridColor": "#e4e4e4",
        "gridWidth": 0.5 * unit,
    }


def _legend(unit: float) -> dict[str, Any]:
    return {
        "orient": "top",
        "title": None,
        "offset": 4 * unit,
        "labelFontSize": 7 * unit,
        "labelLimit": 0,
        "labelOffset": 8 * unit,
        "symbolSize": 20 * unit**2,
        "symbolOffset": 6 * unit,
        "symbolStrokeWidth": 1.2 * unit,
        "rowPadding": 3 * unit,
        "columnPadding": 10 * unit,
    }
