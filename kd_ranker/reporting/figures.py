"""The figures of a report, drawn with Altair from a tidy table each.

A method has the same color in every figure of a study. Files and the page have the same charts.
"""

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from jaxtyping import Float

from kd_ranker.evaluation.metrics.registry import title_of
from kd_ranker.evaluation.metrics.target import CRITERION, PERCENT, TARGET
from kd_ranker.evaluation.saving import SAVINGS, by_repeat
from kd_ranker.evaluation.setting_names import SETTING_COLUMNS
from kd_ranker.reporting import findings
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.intervals import Interval, interval
from kd_ranker.reporting.study import Study
from kd_ranker.reporting.training_curves import GRADIENT_NORM, USER_LOSS, training_curves

Chart = alt.LayerChart | alt.FacetChart
_Side = Literal["top", "bottom"]  # of a legend

# After Okabe and Ito's palette for color-blind readers (jfly.uni-koeln.de, 2008), then of Tol's
# muted one (personal.sron.nl/~pault, 2021). All are visible on a white and on a black page.
_COLORS = (
    *("#7f7f7f", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
    *("#332288", "#999933", "#882255", "#44aa99"),
)
_INCUMBENT = "#b4b4b4"
_TODAY = "today's early ranker"
_LIST = "#8c6d31"
_RULE = "#808080"
_WIDTH = 403  # of a file, in pixels or points
_PAGE_HEIGHT = 1.4  # of a plot on the page, over that in a file
_THEME: dict[str, Any] = {
    "background": "transparent", "font": "sans-serif", "padding": 3, "aria": False,
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 11, "titleFontSize": 13, "titleFontWeight": "normal", "titlePadding": 6,
        "labelFlush": False, "domainColor": "black", "tickColor": "black", "tickCount": 6,
        "gridColor": "#e4e4e4", "gridWidth": 0.8,
    },
    "legend": {
        "orient": "top", "title": None, "labelFontSize": 11, "labelLimit": 0, "symbolOpacity": 1,
        "symbolStrokeWidth": 1.9, "symbolSize": 60, "offset": 6, "columnPadding": 16,
    },
}  # fmt: skip


TRAINING = (USER_LOSS, GRADIENT_NORM.replace("/", "_"))
"""The names of the figures on the training itself."""


class Figure(NamedTuple):
    """A figure of a study, with its chart without a size."""

    name: str  # in the names of files
    title: str
    caption: str  # what it draws, in any study
    finding: str  # what it shows in this one, as a sentence; "" if nothing can be said
    data: pd.DataFrame
    chart: Chart
    height: int = 270  # of the plot in a file, in pixels


def files(figure: Figure) -> dict[str, bytes]:
    """Return the files of a figure by format."""
    spec = _sized(figure, width=_WIDTH, height=figure.height, background="white").to_dict()
    svg = vl_convert.vegalite_to_svg(spec)
    return {
        "svg": svg.encode(),
        "pdf": vl_convert.svg_to_pdf(svg),
        "png": vl_convert.svg_to_png(svg, ppi=200),
    }


def page_image(figure: Figure) -> str:
    """Return the chart of a figure as SVG, for a page without scripts."""
    chart = _sized(figure, width=_WIDTH, height=figure.height)
    return vl_convert.vegalite_to_svg(chart.to_dict())


def page_chart(figure: Figure) -> str:
    """Return the chart of a figure as JSON, as wide as its place on the page."""
    chart = _sized(figure, width="container", height=_PAGE_HEIGHT * figure.height)
    # A "<" in a name must not end the script element that holds the JSON.
    return json.dumps(chart.to_dict(), sort_keys=True).replace("<", "\\u003c")


def _sized(figure: Figure, width: Any, height: float, **theme: str) -> Chart:
    # Legends do not wrap by themselves: about 6 pixels per character, and the symbol.
    columns = max(1, _WIDTH // (6 * int(figure.data["line"].str.len().max()) + 50))
    legend = _THEME["legend"] | {"columns": columns}
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    chart = figure.chart.properties(width=width, height=height, autosize=fit)
    return chart.configure(**(_THEME | {"legend": legend} | theme))


def figures(study: Study, estimates: Estimates) -> list[Figure]:
    """Return the figures of a study that have numbers, in their order."""
    drawn = [
        _waterfall(study, estimates),
        _plane(study, estimates),
        *(_over_k(study, estimates, curve) for curve in _curves(study)),
        _pareto(study),
        *_training(study),
    ]
    return [figure for figure in drawn if figure is not None]


class _Curve(NamedTuple):
    """A measure to draw over k."""

    measure: str
    title: str
    caption: str
    rule: float | None = None  # the height of a dashed line, at which lines have marks


def _curves(study: Study) -> list[_Curve]:
    value = _Curve(
        "value_captured",
        "Value captured by candidates passed",
        "The share of the final value that is kept when k candidates are passed, on the test "
        "split; of each method the setting that did best on validation. The dashed line is "
        f"{PERCENT}; marks and the legend show what each needs for it, the mean over repeats.",
        rule=TARGET,
    )
    true_value = _Curve(
        "true_value_captured",
        "True value captured by candidates passed",
        "The same items, valued by the true probabilities: the share of the value if all "
        "retrieved candidates reach the final ranker. It can exceed 1 if an early ranker drops "
        "candidates that the final ranker overrates.",
    )
    ndcg = _Curve(
        "served_ndcg",
        "Quality for people by candidates passed",
        "NDCG by people's labels of the list that the final ranker makes when k candidates are "
        "passed, without those that have no label, on the test split; mean over requests.",
    )
    ndcg_of_all = _Curve(
        "served_ndcg_of_all",
        "Quality for people, with candidates without a label",
        "The same with the candidates without a label, which count as not wanted.",
    )
    if study.knows_truth:
        return [value, true_value, ndcg, ndcg_of_all]
    return [value, ndcg, ndcg_of_all]


def _values(data: pd.DataFrame) -> alt.InlineData:
    # Unknown numbers are null.
    return alt.InlineData(values=json.loads(data.to_json(orient="records", double_precision=9)))


def _axis(
    channel: Callable[..., Any], title: str, scale: dict[str, Any], **options: Any
) -> Callable[[str], Any]:
    """Return a function from a column to the channel of an axis that several columns share."""
    return functools.partial(
        channel, type="quantitative", title=title,
        scale=alt.Scale(**scale), axis=alt.Axis(**options),
    )  # fmt: skip


def _color(study: Study, data: pd.DataFrame, symbol: str, side: _Side = "top") -> alt.Color:
    """Return the colors of the lines by their methods; the incumbent is gray, a list is brown."""
    lines = data.drop_duplicates("line")
    colors = _colors(study)
    palette = [colors.get(method, _LIST) for method in lines["method"]]
    scale = alt.Scale(domain=lines["line"].tolist(), range=palette)
    return alt.Color("line:N", scale=scale, legend=alt.Legend(symbolType=symbol, orient=side))


def _colors(study: Study) -> dict[str | None, str]:
    """Return the colors of methods, and that of the incumbent."""
    colors: dict[str | None, str] = dict(zip(study.chosen, itertools.cycle(_COLORS), strict=False))
    colors[study.incumbent] = _INCUMBENT
    return colors


def _rule(y: Callable[[str], Any], value: float) -> alt.Chart:
    """Return a dashed line for comparison at a value."""
    line = alt.Chart(alt.InlineData(values=[{"rule": value}]))
    return line.mark_rule(strokeDash=[6, 5]).encode(color=alt.value(_RULE), y=y("rule"))


class _Step(NamedTuple):
    """A step of `_waterfall`."""

    name: str
    setting: str | None  # None if it is not measured


def _waterfall(study: Study, estimates: Estimates) -> Figure | None:
    """Draw a bar per step from today's ranker to the best with scores, with its number."""
    steps = [
        _Step(_TODAY, study.incumbent),
        _Step("mode none", study.plain),
        _Step("best without scores", study.baseline),
        _Step("best with scores", study.best_with_scores),
    ]
    # A ranker that is two steps at once has one bar, with both names.
    steps_by_setting: dict[str, list[_Step]] = {}
    for step in steps:
        if step.setting is not None:
            steps_by_setting.setdefault(step.setting, []).append(step)
    lines = []
    colors_by_method = _colors(study)
    method_of = {setting: method for method, setting in study.chosen.items()}
    for setting, its_steps in steps_by_setting.items():
        passed = estimates.of(setting, CRITERION)
        lines.append(
            {
                "line": ", ".join(step.name for step in its_steps),
                "setting": setting,
                "mean": passed.mean,
                "low": passed.low,
                "high": passed.high,
                "color": colors_by_method.get(method_of.get(setting, setting), _LIST),
            }
        )
    columns = ["line", "setting", "mean", "low", "high", "color"]
    data = pd.DataFrame(lines, columns=columns).dropna(subset=["mean"])
    colors = data.pop("color").tolist()
    if data.empty:
        return None
    data = data.assign(end=data[["mean", "high"]].max(axis=1))
    # The longest bar leaves room for its number.
    x = _axis(
        alt.X, f"candidates to pass for {PERCENT} of the final value",
        {"domain": (0, 1.15 * max(data["end"].max(), study.passed)), "nice": False},
    )  # fmt: skip
    order = data["line"].tolist()
    color = alt.Scale(domain=order, range=colors)
    # Both names of a ranker, one below the other.
    axis = alt.Axis(labelLimit=0, labelExpr="split(datum.label, ', ')")
    base = alt.Chart().encode(y=alt.Y("line:N", title=None, sort=order, axis=axis))
    bars = base.mark_bar().encode(
        x=x("mean"), color=alt.Color("line:N", scale=color, legend=None),
        tooltip=["setting:N", alt.Tooltip("mean:Q", title="candidates", format=".0f")],
    )  # fmt: skip
    ends = base.mark_rule(strokeWidth=0.8).encode(x=x("low"), x2="high")
    today = alt.Chart(alt.InlineData(values=[{"passed": study.passed}]))
    today = today.mark_rule(strokeDash=[6, 5]).encode(x=x("passed"), color=alt.value(_RULE))
    numbers = base.mark_text(align="left", fontSize=11, dx=10).encode(
        x=x("end"), text=alt.Text("mean:Q", format=".0f")
    )
    return Figure(
        "waterfall", "Candidates to pass, step by step",
        f"Candidates per request that have to be passed for {PERCENT} of the final value, on the "
        "test split: with the early ranker that filled the log, with a student of plain mode none, "
        "with the best ranker that needs no scores of the final ranker, and with the best student "
        "that learns from them. Bars are 95% intervals. The dashed line is funnel.passed, "
        f"{study.passed}: what passes today, whatever share of the value that keeps.",
        findings.fewer_candidates(study, estimates),
        data, alt.layer(bars, today, ends, numbers, data=_values(data)), height=110,
    )  # fmt: skip


def _points(
    study: Study, data: pd.DataFrame, x: Callable[[str], Any], y: Callable[[str], Any],
    columns: Sequence[str], order: str = "", legend: _Side = "top",
) -> list[alt.Chart]:  # fmt: skip
    """Return layers of a mark per row, with its intervals from `_low` to `_high` of the columns.

    Lines connect the marks along the column `order`, which labels them; "" draws none. `legend` is
    the side of the legend.
    """
    x_column, y_column = columns
    base = alt.Chart().encode(color=_color(study, data, "circle", legend))
    # Pale, since readers should compare the marks.
    bar = base.mark_rule(strokeWidth=0.8, opacity=0.45)
    layers = [
        bar.encode(x=x(f"{x_column}_low"), x2=f"{x_column}_high", y=y(y_column)),
        bar.encode(x=x(x_column), y=y(f"{y_column}_low"), y2=f"{y_column}_high"),
    ]
    numbers = [
        alt.Tooltip(f"{column}:Q", title=title_of(column), format=".4f") for column in columns
    ]
    placed = base.encode(x=x(x_column), y=y(y_column), tooltip=["setting:N", *numbers])
    if order:
        line = placed.mark_line().encode(order=f"{order}:Q")
        text = placed.mark_text(align="left", fontSize=10, dx=5, dy=-6).encode(text=f"{order}:Q")
        layers += [line, text.transform_filter(f"isValid(datum.{order})")]
    return [*layers, placed.mark_point(filled=True, size=50, opacity=1)]


def _plane(study: Study, estimates: Estimates) -> Figure | None:
    """Draw the change for users over the saving; None if either is unknown for all methods."""
    lines = []
    for measure in study.users_measures[1:]:
        for method, setting in study.chosen.items():
            if study.baseline is None or study.baseline == setting:
                continue
            lines.append(
                {
                    "line": study.in_words[method],
                    "method": method,
                    "setting": setting,
                    **_numbers("saving", estimates.of(setting, SAVINGS[0])),
                    **_numbers("users", estimates.gap(setting, study.baseline, measure)),
                }
            )
    columns = ["line", "method", "setting", *_ends("saving"), *_ends("users")]
    data = pd.DataFrame(lines, columns=columns).dropna(subset=["saving", "users"])
    if data.empty:
        return None
    margin = study.config.report.margin
    # Room beyond the outermost marks, so that neither the margin nor the origin is on an axis.
    x_domain = _with_room(0.0, *data[[*_ends("saving")]].to_numpy().ravel())
    y_domain = _with_room(0.0, -margin, *data[[*_ends("users")]].to_numpy().ravel())
    x = _axis(
        alt.X, "saving (below 0, it costs more)", {"domain": x_domain, "nice": False}, format="~%"
    )
    y = _axis(
        alt.Y, "change for users", {"domain": y_domain, "nice": False},
        format="+.2~%", labelExpr="datum.label === '+0%' ? '0%' : datum.label",
    )  # fmt: skip
    origin = alt.Chart(
        alt.InlineData(values=[{"saving": 0, "users": 0, "text": "best without scores"}])
    )
    origin = origin.encode(x=x("saving"), y=y("users"), color=alt.value(_RULE))
    layers = [
        _rule(y, -margin),
        origin.mark_rule().encode(y=alt.value(0), y2=alt.value("height")),
        origin.mark_rule().encode(x=alt.value(0), x2=alt.value("width")),
        origin.mark_point(filled=False, size=60, opacity=1),
        origin.mark_text(align="right", dx=-7, dy=-7, fontSize=10).encode(text="text:N"),
        *_points(study, data, x, y, ("saving", "users"), legend="bottom"),
    ]
    return Figure(
        "plane", "Saving against the change for users",
        f"Each method against the baseline {study.baseline}, the best ranker without the final "
        "ranker's scores, which is at the origin; on the test split, with as many passed as each "
        f"needs for {PERCENT} of the final value: the share of the funnel's cost, "
        f"{study.costs.unit}, that is saved, and the change of the value for users, as a share of "
        f"that if all are passed. The dashed line is the margin of {100 * margin:g}%. Bars are 95% "
        "intervals.",
        findings.saving_methods(data, margin),
        data, alt.layer(*layers, data=_values(data)),
    )  # fmt: skip


def _with_room(*values: float) -> tuple[float, float]:
    """Return the ends of an axis that shows all known values, a twelfth of their range apart.

    >>> _with_room(0.0, 12.0, float("nan")), _with_room(1.0)
    ((-1.0, 13.0), (0.99, 1.01))
    """
    low = float(np.nanmin(values))
    high = float(np.nanmax(values))
    room = (high - low) / 12 or 0.01
    return low - room, high + room


def _over_k(study: Study, estimates: Estimates, curve: _Curve) -> Figure | None:
    """Draw a measure over k with a band per ranker; None if no student has it."""
    if not study.chosen:
        return None
    # The incumbent and the baseline take part too; a list of items is its own method.
    others = {
        name: name
        for name in (study.incumbent, study.baseline)
        if name is not None and name not in study.chosen.values()
    }
    curves = []
    for method, setting in (study.chosen | others).items():
        values = estimates.curve(setting, curve.measure)
        passed = estimates.of(setting, CRITERION).mean
        curves.append(values.assign(method=method, setting=setting, passed=passed))
    data = pd.concat(curves).dropna(subset=["mean"])
    students = data[data["method"].isin([*study.chosen])]
    if students.empty:
        return None
    words = {name: name for name in others} | study.in_words
    if study.incumbent is not None:
        words[study.incumbent] = _TODAY
    data["line"] = data["method"].map(words)
    if curve.rule is not None:
        data["line"] += data["passed"].map(": {:.0f}".format)
    # Values start far below 99%: the window starts where the best of them is near it.
    low = max(0.0, min(0.9, float(students["mean"].median()) - 0.1))
    near = students[students["mean"] >= low]
    top = float(near[["mean", "high"]].max().max())
    first_k = int(near["k"].min())
    last_k = int(near["k"].max())
    ticks = [step * 10**power for power in range(8) for step in (1, 2, 5)]
    x = _axis(
        alt.X,
        "candidates passed, k",
        {"type": "log", "domain": (first_k, last_k), "nice": False},
        values=[k for k in ticks if first_k <= k <= last_k],
        format="d",
        labelOverlap=True,
    )
    y_scale = {"domain": (low, top + 0.05 * (top - low)), "nice": False}
    y = _axis(alt.Y, f"{title_of(curve.measure)} at k", y_scale)
    base = alt.Chart().encode(color=_color(study, data, "stroke"), x=x("k"))
    tooltip = ["setting:N", "k:Q", alt.Tooltip("mean:Q", format=".4f")]
    points = base.transform_filter("datum.is_point")
    layers = [
        base.mark_area(opacity=0.15).encode(y=y("low"), y2="high"),
        base.mark_line(strokeWidth=1.9).encode(y=y("mean")),
        # Invisible, to show numbers under the pointer.
        points.mark_point(size=150, fillOpacity=0, strokeOpacity=0).encode(
            y=y("mean"), tooltip=tooltip
        ),
    ]
    if curve.rule is not None:
        on_rule = _values(data.drop_duplicates("line").assign(mean=curve.rule))
        marks = base.mark_point(filled=True, size=50, opacity=1)
        marks = marks.encode(x=x("passed"), y=y("mean")).properties(data=on_rule)
        layers += [_rule(y, curve.rule), marks]
    caption = (
        f"{curve.caption} Bands are 95% intervals. Light gray is the early ranker that filled the "
        "log, brown a list if no student without scores needs fewer."
    )
    # Vega could clip the marks, but a PNG of clipped marks takes seconds.
    lines = data.groupby("line", sort=False)
    in_window = pd.concat([_in_window(line, first_k, low) for _, line in lines])
    chart = alt.layer(*layers, data=_values(in_window))
    finding = findings.share_kept(study, estimates, curve.measure)
    return Figure(curve.measure, curve.title, caption, finding, data, chart)


def _in_window(curve: pd.DataFrame, first_k: int, bottom: float) -> pd.DataFrame:
    """Return the part of a line and its band that is right of `first_k` and above the bottom.

    Where the line or an end of the band crosses the border, it gets a point, interpolated on the
    logarithmic axis. In these new points, `is_point` is False.
    """
    k = curve["k"].to_numpy(float)
    columns = ("low", "mean", "high")
    border = [float(first_k)]
    for column in columns:
        crossing = _crossing(k, curve[column].to_numpy(float), bottom)
        if crossing is not None:
            border.append(crossing)
    all_k = np.union1d(k, border)
    all_k = all_k[all_k >= max(first_k, k[0])]
    part = pd.DataFrame({"k": all_k, "is_point": np.isin(all_k, k)})
    for column in columns:
        part[column] = np.interp(np.log(all_k), np.log(k), curve[column])
    # The new points are at the bottom up to rounding.
    lowest = bottom - 1e-9
    part["mean"] = part["mean"].where(part["mean"] >= lowest)
    part["high"] = part["high"].where(part["high"] >= lowest)
    part["low"] = part["low"].clip(lower=bottom).where(part["high"].notna())
    names = curve[["line", "method", "setting"]].iloc[0]
    return part.dropna(subset=["mean", "high"], how="all").assign(**names)


def _crossing(
    k: Float[np.ndarray, "n"], values: Float[np.ndarray, "n"], bottom: float
) -> float | None:
    """Return the k at which values first rise to the bottom, interpolated.

    None if they begin above it, or never reach it.
    """
    first_above = int(np.argmax(values >= bottom))
    if first_above == 0:
        return None
    neighbors = slice(first_above - 1, first_above + 1)
    return float(np.exp(np.interp(bottom, values[neighbors], np.log(k[neighbors]))))


def _pareto(study: Study) -> Figure | None:
    """Draw the loss against the teacher over that against users, on validation.

    The points of a method are its chosen setting and those that differ from it only in the weight,
    if they trained in full.
    """
    rows = study.trained_in_full
    alike = [column for column in SETTING_COLUMNS if column != "distill_weight"]
    chosen = rows.loc[rows["setting"].isin([*study.chosen.values()]), alike].drop_duplicates()
    points = rows.drop_duplicates("setting").merge(chosen, on=alike)
    data = points[["method", "setting"]].assign(line=points["method"].map(study.in_words))
    data["weight"] = points["distill_weight"].where(points["distill_loss"].notna())
    measures = ("user_bce", "teacher_bce")
    for measure in measures:
        table = by_repeat(rows, measure)
        means = [_numbers(measure, interval(table[name].to_numpy())) for name in data["setting"]]
        for column in _ends(measure):
            data[column] = np.array([numbers[column] for numbers in means], float)
    data = data.dropna(subset=[*measures])
    if data.empty:
        return None
    x = _axis(alt.X, f"{title_of('user_bce')}, mean over tasks (nats)", {"zero": False})
    y = _axis(alt.Y, f"{title_of('teacher_bce')}, mean over tasks (nats)", {"zero": False})
    return Figure(
        "pareto", "Predicting users against following the teacher",
        "Binary cross entropy against user labels and against the teacher's probabilities, means "
        "over tasks, on validation; lower is better for both. One line per method as the distill "
        "weight grows, all else as it was chosen, without settings that halving stopped; bars are "
        "95% intervals over repeats.",
        findings.best_of_losses(data),
        data,
        alt.layer(*_points(study, data, x, y, measures, "weight"), data=_values(data)),
    )  # fmt: skip


def _training(study: Study) -> list[Figure]:
    """Draw the loss and the gradient of the chosen settings over the steps, if there are any."""
    curves = training_curves(study)
    if curves.empty:
        return []
    curves["line"] = curves["method"].map(study.in_words)
    alike = "Of each method the setting that did best on validation, mean over its repeats."
    return [
        _over_steps(
            study, curves, USER_LOSS, "Loss on user labels while training",
            "The loss on the user labels of the batch of a step, in nats. Negatives and further "
            "terms change its size, so compare a line with itself. " + alike,
            findings.falling_losses,
        ),
        _over_steps(
            study, curves, GRADIENT_NORM, "Norm of the gradient while training",
            "The Euclidean norm of the gradient of the dense parameters. A slow rise is usual; a "
            "jump by orders of magnitude says that the rate is too high. " + alike,
            findings.largest_rise,
        ),
    ]  # fmt: skip


def _over_steps(
    study: Study,
    curves: pd.DataFrame,
    measure: str,
    title: str,
    caption: str,
    find: Callable[[pd.DataFrame, str], str],
) -> Figure:
    """Draw a line per method over the steps; `find` says what the data show."""
    name = measure.replace("/", "_")
    data = curves.rename(columns={measure: name})[["method", "setting", "line", "step", name]]
    x = _axis(alt.X, "step", {"nice": False}, format="d")
    # Logarithmic, as losses of methods differ by orders of magnitude.
    y_title = title.removesuffix(" while training").lower()
    y = _axis(alt.Y, y_title, {"type": "log", "nice": False})
    lines = alt.Chart().mark_line(strokeWidth=1.5)
    lines = lines.encode(color=_color(study, data, "stroke"), x=x("step"), y=y(name))
    chart = alt.layer(lines, data=_values(data))
    return Figure(name, title, caption, find(data, name), data, chart)


def _ends(name: str) -> tuple[str, str, str]:
    """Return the columns of a mean and of the ends of its interval."""
    return name, f"{name}_low", f"{name}_high"


def _numbers(name: str, mean: Interval) -> dict[str, float]:
    """Return a mean and the ends of its interval by their columns, see `_ends`."""
    return dict(zip(_ends(name), (mean.mean, mean.low, mean.high), strict=True))
