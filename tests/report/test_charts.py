"""The figures as they are drawn: in files, and as panels of the page."""

import functools
import json
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import vl_convert

from kd_ranker.report import charts, figures

SVG = "{http://www.w3.org/2000/svg}"
PANELS = {
    "waterfall": 1, "frontier": 1, "plane": 1, "value_captured": 1, "true_value_captured": 1,
    "saving": 2, "survival": 1, "pareto": 1, "calibration": 3, "training": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn(estimates):
    return {figure.name: figure for figure in figures.figures(estimates.study, estimates)}


@pytest.fixture(scope="module")
def files(drawn):
    return {name: charts.files(figure) for name, figure in drawn.items()}


def panels_of(figure):
    return [json.loads(panel) for panel in charts.page_panels(figure)]


def scale_of(panel):
    """The color of each line."""
    scale = panel["encoding"]["color"]["scale"]
    return dict(zip(scale["domain"], scale["range"], strict=True))


def texts_of(files, name):
    root = ElementTree.fromstring(files[name]["svg"])
    return [text.text for text in root.iter(f"{SVG}text")]


def marks_of(files, name, kind):
    root = ElementTree.fromstring(files[name]["svg"])
    groups = (of for of in root.iter(f"{SVG}g") if f"{kind} role-mark" in of.get("class", ""))
    return [path for group in groups for path in group]


def test_every_figure_is_drawn_in_every_format_without_a_date(drawn, files):
    assert list(files) == list(PANELS)
    for name, of_figure in files.items():
        assert list(of_figure) == list(charts.FORMATS)
        assert of_figure["svg"].startswith(b"<svg")
        assert of_figure["pdf"].startswith(b"%PDF")
        assert of_figure["png"].startswith(b"\x89PNG")
        assert not re.search(rb"20\d\d-\d\d-\d\d", of_figure["svg"])
        assert b"tIME" not in of_figure["png"]
        assert len(panels_of(drawn[name])) == PANELS[name]
    assert charts.files(drawn["plane"])["png"] == files["plane"]["png"]


def test_vega_warns_of_nothing(drawn, capfd, monkeypatch):
    draw = functools.partial(vl_convert.vegalite_to_svg, show_warnings=True)
    monkeypatch.setattr(vl_convert, "vegalite_to_svg", draw)
    for name in ("waterfall", "frontier", "pareto", "saving"):
        charts.files(drawn[name])
        output = capfd.readouterr()
        assert "WARN" not in output.out + output.err


@pytest.mark.parametrize(
    "name", ["frontier", "pareto", "value_captured", "true_value_captured", "survival"]
)
def test_a_figure_is_as_wide_as_a_column_and_its_text_stays_text(files, name):
    root = ElementTree.fromstring(files[name]["svg"])
    assert float(root.get("width").removesuffix("pt")) == pytest.approx(3.5 * 72, abs=1)
    # Width in the header of a PNG, at 300 dots per inch.
    assert int.from_bytes(files[name]["png"][16:20]) == pytest.approx(3.5 * 300, abs=5)
    assert "none" in texts_of(files, name)


def test_marks_are_at_the_places_of_their_numbers(drawn, files):
    """The places of two points on the page give those of all others."""
    data = drawn["pareto"].data
    places = [
        tuple(map(float, re.findall(r"[\d.]+", mark.get("transform"))))
        for mark in marks_of(files, "pareto", "mark-symbol")
    ][-len(data) :]
    for axis, measure in enumerate(("user_bce", "teacher_bce")):
        numbers = list(data[measure])
        first, last = numbers.index(min(numbers)), numbers.index(max(numbers))
        scale = (places[last][axis] - places[first][axis]) / (numbers[last] - numbers[first])
        expected = [places[first][axis] + scale * (n - numbers[first]) for n in numbers]
        assert [place[axis] for place in places] == pytest.approx(expected, abs=0.05)
    assert places[last][1] < places[first][1]  # up is more


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("pareto", ["user_bce", "user_bce_low", "teacher_bce_high"]),
        ("plane", ["saving", "users_low", "users_high", "margin"]),
    ],
)
def test_the_page_holds_the_numbers_of_the_figure(drawn, name, columns):
    (panel,) = panels_of(drawn[name])
    values = panel["datasets"][panel["data"]["name"]]
    for column in columns:
        found = [value[column] for value in values]
        assert found == pytest.approx(list(drawn[name].data[column]), abs=1e-9)


def test_a_mode_has_the_same_color_in_every_figure(drawn):
    found = {}
    for name, figure in drawn.items():
        # Its bars are steps and not modes.
        for panel in panels_of(figure) if name != "waterfall" else ():
            for line, color in scale_of(panel).items():
                found.setdefault(re.split("[ ,]", line)[0], set()).add(color)
    assert {mode: len(its) for mode, its in found.items()} == {"none": 1, "aux": 1, "shared": 1}
    assert len(set.union(*found.values())) == 3


def test_every_line_has_a_color_of_its_own():
    palette = charts.colors(["none", "mine", "aux", "yours"])
    assert len(set(palette)) == 4
    assert [palette[0], palette[2]] == charts.colors(["none", "aux"])
    # The first line of a mode keeps the color of the mode.
    assert charts.colors(["aux", "shared", "aux"])[:2] == charts.colors(["aux", "shared"])
    assert len(set(charts.colors(["aux", "shared", "aux"]))) == 3


def test_a_variant_of_mode_none_does_not_get_its_gray(drawn):
    """Also in a figure without plain mode none."""
    data = drawn["plane"].data
    variant = data.assign(mode="none", plain=False, line="none, unshown weight")[:1]
    figure = drawn["plane"]._replace(data=pd.concat([variant, data]))
    (panel,) = panels_of(figure)
    assert scale_of(panel)["none, unshown weight"] not in charts.colors(["none", "aux", "shared"])


def test_one_repeat_is_drawn_without_intervals(drawn):
    """Unknown ends are null on the page, and no NaN in a path."""
    for name in ("frontier", "pareto", "saving", "waterfall"):
        data = drawn[name].data
        ends = data.columns[data.columns.str.endswith(("low", "high"))]
        figure = drawn[name]._replace(data=data.assign(**dict.fromkeys(ends, np.nan)))
        assert b"NaN" not in charts.files(figure)["svg"]
        assert all("NaN" not in panel for panel in charts.page_panels(figure))


def test_with_several_sizes_a_color_is_a_size_and_a_dash_a_student_without_distillation(drawn):
    data = drawn["frontier"].data
    students = data[data["mode"] != figures.REFERENCE]
    both = [
        students.assign(size=size, line=students["line"] + size, cost=students["cost"] * more)
        for size, more in ((", width 8", 1.0), (", width 32", 1.2))
    ]
    references = data[data["mode"] == figures.REFERENCE]
    figure = drawn["frontier"]._replace(data=pd.concat([*both, references], ignore_index=True))
    (panel,) = panels_of(figure)
    scale = scale_of(panel)
    assert list(scale) == ["none, width 8", "aux, width 8", "none, width 32", "aux, width 32"]
    one, same, other, last = scale.values()
    assert one == same != other == last
    values = pd.DataFrame(panel["datasets"][panel["data"]["name"]])
    assert values.groupby("serve")["mode"].unique().map(list).to_dict() == {
        "undistilled": ["none"], "user": ["aux"],
    }  # fmt: skip
    svg = ElementTree.fromstring(charts.files(figure)["svg"])
    dashes = {of.get("stroke-dasharray") for of in svg.iter(f"{SVG}path")} - {None}
    assert {"1,0", "4,2"} <= dashes


def test_targets_and_costs_are_in_percent(files):
    assert {"95", "99", "99.9", "1", "5", "10", "25%"} <= set(texts_of(files, "saving"))


def test_references_are_named_and_in_no_legend(drawn, files):
    assert {"oracle", "incumbent", "random", "show_rate"} <= set(texts_of(files, "frontier"))
    (panel,) = panels_of(drawn["frontier"])
    assert list(scale_of(panel)) == ["none", "aux"]
    for name in ("value_captured", "true_value_captured", "survival"):
        assert texts_of(files, name).count("incumbent") == 1
        (panel,) = panels_of(drawn[name])
        assert list(scale_of(panel)) == ["none", "aux", "shared"]


def test_the_waterfall_has_one_bar_per_step_with_its_number(drawn, files):
    data, texts = drawn["waterfall"].data, texts_of(files, "waterfall")
    assert [text for text in texts if text in set(data["line"])] == list(data["line"])
    assert {f"{number:.0f}" for number in data["mean"]} <= set(texts)
    bars = marks_of(files, "waterfall", "mark-rect")
    # The path of a bar begins with its corner and its width.
    widths = [float(re.search(r"h([\d.]+)", bar.get("d"))[1]) for bar in bars]
    expected = (data["mean"] / data["mean"][0]).to_numpy()
    assert np.array(widths) / widths[0] == pytest.approx(expected, abs=0.01)
    fills = [bar.get("fill") for bar in bars]
    assert len(set(fills)) == len(data) == 4
    # A step keeps its color if another is missing.
    short = drawn["waterfall"]._replace(data=data.drop(index=2))
    without = marks_of({"waterfall": charts.files(short)}, "waterfall", "mark-rect")
    assert [bar.get("fill") for bar in without] == [fills[0], fills[1], fills[3]]


def test_a_name_cannot_end_the_script_that_holds_it(drawn):
    figure = drawn["survival"]
    data = figure.data.assign(line="</script><script>alert(1)</script>")
    assert all("<" not in panel for panel in charts.page_panels(figure._replace(data=data)))
