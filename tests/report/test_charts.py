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
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.study import read_studies
from kd_ranker.report.style import colours
from tests.report import sweeps

NAMES = [
    *(
        "waterfall",
        "frontier",
        "plane",
        "value_captured",
        "true_value_captured",
        "saving",
        "survival",
        "pareto",
    ),
    *("calibration", "training"),
]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (study,) = read_studies([sweeps.write_sweep(folder)])
    return {figure.name: figure for figure in figures.figures(study, Estimates(study))}


def panels_of(figure):
    return [json.loads(panel) for panel in charts.page_panels(figure)]


@pytest.fixture(scope="module")
def files(drawn):
    return {name: charts.files(figure) for name, figure in drawn.items()}


def test_every_figure_is_drawn_in_every_format(files):
    assert list(files) == NAMES
    for of_figure in files.values():
        assert list(of_figure) == list(charts.FORMATS)
        assert of_figure["svg"].startswith(b"<svg")
        assert of_figure["pdf"].startswith(b"%PDF")
        assert of_figure["png"].startswith(b"\x89PNG")


def test_files_hold_no_date_and_do_not_depend_on_what_was_drawn_before(drawn, files):
    for name in reversed(NAMES):
        again = charts.files(drawn[name])
        assert [form for form in again if again[form] != files[name][form]] == []
        assert not re.search(rb"20\d\d-\d\d-\d\d", again["svg"])
        assert b"Date" not in again["pdf"]
        assert b"tIME" not in again["png"]


def test_vega_has_nothing_to_warn_of(drawn, monkeypatch, capfd):
    draw = functools.partial(vl_convert.vegalite_to_svg, show_warnings=True)
    monkeypatch.setattr(vl_convert, "vegalite_to_svg", draw)
    for figure in drawn.values():
        charts.files(figure)
        told = capfd.readouterr()
        assert "WARN" not in told.out + told.err


def test_a_figure_is_as_wide_as_a_column_and_its_text_stays_text(files):
    for name in ("frontier", "pareto", "value_captured", "true_value_captured", "survival"):
        root = ElementTree.fromstring(files[name]["svg"])
        assert float(root.get("width").removesuffix("pt")) == pytest.approx(3.5 * 72, abs=1)
        # Width and height in the header of a PNG, at 300 dots an inch.
        assert int.from_bytes(files[name]["png"][16:20]) == pytest.approx(3.5 * 300, abs=5)
        texts = {text.text for text in root.iter(f"{SVG}text")}
        assert any("none" in (text or "") for text in texts)


def test_a_point_lies_where_its_numbers_say(drawn, files):
    """From two points and their places on the page follow the places of all others."""
    figure = drawn["pareto"]
    root = ElementTree.fromstring(files["pareto"]["svg"])
    marks = [
        path
        for group in root.iter(f"{SVG}g")
        if "mark-symbol role-mark" in group.get("class", "")
        for path in group
        if path.get("fill") in colours(["none", "aux", "shared"])
        and "0,0" not in path.get("d", "")[:4]
    ]
    places = [
        tuple(map(float, re.findall(r"[\d.]+", mark.get("transform"))))
        for mark in marks
        if mark.get("transform")
    ][-len(figure.data) :]
    for axis, measure in enumerate(("user_bce", "teacher_bce")):
        numbers = list(figure.data[measure])
        first, last = numbers.index(min(numbers)), numbers.index(max(numbers))
        scale = (places[last][axis] - places[first][axis]) / (numbers[last] - numbers[first])
        expected = [places[first][axis] + scale * (n - numbers[first]) for n in numbers]
        assert [place[axis] for place in places] == pytest.approx(expected, abs=0.05)
    assert places[last][1] < places[first][1]  # up is more


def test_files_and_page_are_drawn_from_the_same_numbers(drawn):
    (panel,) = panels_of(drawn["pareto"])
    data = drawn["pareto"].data
    values = panel["data"]["values"]
    for column in ("user_bce", "user_bce_low", "teacher_bce_high"):
        assert [value[column] for value in values] == pytest.approx(list(data[column]))
    assert [len(panels_of(drawn[name])) for name in NAMES] == [1, 1, 1, 1, 1, 2, 1, 1, 3, 2]


def test_a_modes_colour_is_the_same_everywhere(drawn):
    found = {}
    for name, figure in drawn.items():
        # Its bars are steps and no modes.
        for panel in panels_of(figure) if name != "waterfall" else ():
            scale = panel["layer"][0]["encoding"]["color"]["scale"]
            for line, colour in zip(scale["domain"], scale["range"], strict=True):
                found.setdefault(re.split("[ ,]", line)[0], set()).add(colour)
    assert {mode: len(its) for mode, its in found.items()} == {
        "none": 1, "aux": 1, "shared": 1,
    }  # fmt: skip
    assert len(set.union(*found.values())) == 3


def test_a_mode_that_the_package_does_not_know_gets_a_colour_of_its_own():
    palette = colours(["none", "mine", "aux", "yours"])
    assert len(set(palette)) == 4
    assert [palette[0], palette[2]] == colours(["none", "aux"])
    # A second way of a mode is told from the first, which keeps the colour of the mode.
    assert colours(["aux", "shared", "aux"])[:2] == colours(["aux", "shared"])
    assert len(set(colours(["aux", "shared", "aux"]))) == 3


def test_one_repeat_is_drawn_without_intervals(tmp_path):
    (study,) = read_studies([sweeps.write_sweep(tmp_path, seeds=(0,), modes=("none", "aux"))])
    for figure in figures.figures(study, Estimates(study)):
        assert b"NaN" not in charts.files(figure)["svg"]
        assert all("NaN" not in panel for panel in charts.page_panels(figure))


def test_where_sizes_are_swept_a_colour_is_a_size_and_a_dash_a_student_that_does_not_distil(drawn):
    of_modes = drawn["frontier"].data
    students = of_modes[of_modes["mode"] != figures.REFERENCE]
    both = [
        students.assign(size=size, line=students["line"] + size, cost=students["cost"] * more)
        for size, more in ((", width 8", 1.0), (", width 32", 1.2))
    ]
    references = of_modes[of_modes["mode"] == figures.REFERENCE]
    figure = drawn["frontier"]._replace(data=pd.concat([*both, references], ignore_index=True))
    (panel,) = panels_of(figure)
    scale = panel["layer"][0]["encoding"]["color"]["scale"]
    assert scale["domain"] == ["none, width 8", "aux, width 8", "none, width 32", "aux, width 32"]
    one, same, other, last = scale["range"]
    assert one == same != other == last
    dashes = {
        layer["transform"][0]["filter"]: layer["mark"]["strokeDash"]
        for layer in panel["layer"]
        if "strokeDash" in layer.get("mark", {})
    }
    assert len({tuple(dash) for dash in dashes.values()}) == 2
    assert charts.files(figure)["svg"].startswith(b"<svg")


def test_targets_and_costs_are_told_in_percent_as_they_are(files):
    root = ElementTree.fromstring(files["saving"]["svg"])
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {"95", "99", "99.9", "1", "5", "10", "25%"} <= texts


def test_what_ranks_without_a_model_is_named_and_in_no_legend(drawn, files):
    texts = [
        text.text for text in ElementTree.fromstring(files["frontier"]["svg"]).iter(f"{SVG}text")
    ]
    assert set(sweeps.REFERENCES) <= set(texts)
    (panel,) = panels_of(drawn["frontier"])
    assert panel["layer"][0]["encoding"]["color"]["scale"]["domain"] == ["none", "aux"]


@pytest.mark.parametrize("name", ["value_captured", "true_value_captured", "survival"])
def test_todays_early_ranker_is_named_over_k_and_in_no_legend(drawn, files, name):
    texts = [text.text for text in ElementTree.fromstring(files[name]["svg"]).iter(f"{SVG}text")]
    assert texts.count("incumbent") == 1
    for panel in panels_of(drawn[name]):
        scale = panel["layer"][0]["encoding"]["color"]["scale"]
        assert scale["domain"] == ["none", "aux", "shared"]


def test_the_waterfall_has_a_bar_a_step_with_its_number(drawn, files):
    data = drawn["waterfall"].data
    root = ElementTree.fromstring(files["waterfall"]["svg"])
    texts = [text.text for text in root.iter(f"{SVG}text")]
    # From the top down, each with its own colour.
    assert [text for text in texts if text in set(data["line"])] == list(data["line"])
    assert {f"{number:.0f}" for number in data["mean"]} <= set(texts)
    bars = [
        path
        for group in root.iter(f"{SVG}g")
        if "mark-rect role-mark" in group.get("class", "")
        for path in group
    ]
    # A bar's path begins with its corner and goes on by its width.
    widths = [float(re.search(r"h([\d.]+)", bar.get("d"))[1]) for bar in bars]
    assert np.array(widths) / widths[0] == pytest.approx(
        (data["mean"] / data["mean"][0]).to_numpy(), abs=0.01
    )
    assert len({bar.get("fill") for bar in bars}) == len(data) == 4


def test_the_plane_has_its_margin_and_a_mark_a_way(drawn):
    data = drawn["plane"].data
    (panel,) = panels_of(drawn["plane"])
    _, margin, *_, points = panel["layer"]
    assert [value["margin"] for value in margin["data"]["values"]] == [data["margin"][0]]
    assert points["encoding"]["x"]["field"] == "saving"
    assert points["encoding"]["y"]["field"] == "users"
    for column in ("saving", "users_low", "users_high"):
        drawn_values = [value[column] for value in panel["data"]["values"]]
        assert drawn_values == pytest.approx(list(data[column]))


def test_a_name_cannot_end_the_script_that_holds_it(drawn):
    figure = drawn["survival"]
    data = figure.data.assign(line="</script><script>alert(1)</script>")
    assert all("<" not in panel for panel in charts.page_panels(figure._replace(data=data)))
