"""Colours, dashes and marks, the same in every figure."""

from collections.abc import Iterable

# After Okabe and Ito's palette, which stays apart for colour-blind eyes (jfly.uni-koeln.de, 2008).
# None of these needs a white or a black page to be seen.
_KNOWN = {"none": "#7f7f7f", "aux": "#d55e00", "shared": "#0072b2"}
_OTHERS = ("#009e73", "#cc79a7", "#56b4e9", "#e69f00")

# By serving choice: matplotlib's name, plotly's name.
_DASHES = {"user": ("-", "solid"), "teacher": ("--", "dash"), "blend": (":", "dot")}
# By mode, so that colour is not all there is.
_MARKS = {"none": ("s", "square"), "aux": ("o", "circle"), "shared": ("D", "diamond")}


def colours(modes: Iterable[str]) -> dict[str, str]:
    """A colour a mode; modes that the package does not know take the next ones by name."""
    unknown = sorted(set(modes) - _KNOWN.keys())
    return _KNOWN | {mode: _OTHERS[i % len(_OTHERS)] for i, mode in enumerate(unknown)}


def dash(serve: str) -> tuple[str, str]:
    """The dash of a serving choice, for matplotlib and for plotly."""
    return _DASHES.get(serve, ("-.", "dashdot"))


def mark(mode: str) -> tuple[str, str]:
    """The mark of a mode, for matplotlib and for plotly."""
    return _MARKS.get(mode, ("^", "triangle-up"))
