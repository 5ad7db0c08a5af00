"""The figures as they are drawn: in files, and on the page."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import vl_convert

from kd_ranker.report import charts, figures

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn(estimates):
    return {figure.name: figure for figure in figures.figures(estimates.study, estimates)}


@pytest.fixture(scope="module")
def files(drawn):
    return {name: charts.files(figure) for name, figure in drawn.items()}


def look_of(figure, channel="color"):
    """The color of each line, or its dash, by its name without a number."""
    chart = json.loads(charts.page_chart(figure))
    encoding = chart["encoding"] if channel == "color" else chart["layer"][0]["encoding"]
    scale = encoding[channel]["scale"]
    names = [re.sub(r": [\d.]+%?$", "", name) for name in scale["domain"]]
    return dict(zip(names, scale["range"], strict=True))


def texts_of(files, name):
    root = ElementTree.fromstring(files[name]["svg"])
    return [text.text for text in root.iter(f"{SVG}text")]


def marks_of(svg, kind):
    groups = (of for of in svg.iter(f"{SVG}g") if f"{kind} role-mark" in of.get("class", ""))
    return [path for group in groups for path in group]


def test_every_figure_is_drawn_in_every_format_without_a_date(drawn, files):
    assert set(files) == set(figures.ENTRIES) - {"covered_user_value"}
    for name, of_figure in files.items():
        assert list(of_figure) == list(charts.FORMATS)
        for ending, start in (("svg", b"<svg"), ("pdf", b"%PDF"), ("png", b"\x89PNG")):
            assert of_figure[ending].startswith(start)
        assert not re.search(rb"20\d\d-\d\d-\d\d", of_figure["svg"])
        assert b"tIME" not in of_figure["png"]
        root = ElementTree.fromstring(of_figure["svg"])
        # A column of a paper; that of a PNG is in its header, at 300 dots per inch.
        assert float(root.get("width").removesuffix("pt")) == pytest.approx(3.5 * 72, abs=1)
        assert int.from_bytes(of_figure["png"][16:20]) == pytest.approx(3.5 * 300, abs=5)
        if name != "waterfall":
            assert any(text.startswith("aux") for text in texts_of(files, name))
    assert charts.files(drawn["plane"])["png"] == files["plane"]["png"]


def test_vega_warns_of_nothing_and_draws_unknown_ends(drawn, capfd, monkeypatch):
    """As of a single repeat: unknown ends are null on the page, and no NaN in a path."""
    draw = vl_convert.vegalite_to_svg
    monkeypatch.setattr(
        vl_convert, "vegalite_to_svg", lambda spec: draw(spec, show_warnings=True)
    )  # fmt: skip
    for name in ("frontier", "pareto", "saving", "waterfall"):
        data = drawn[name].data
        ends = data.columns[data.columns.str.endswith(("low", "high"))]
        figure = drawn[name]._replace(data=data.assign(**dict.fromkeys(ends, np.nan)))
        assert b"NaN" not in charts.files(figure)["svg"]
        assert "NaN" not in charts.page_chart(figure)
    output = capfd.readouterr()
    assert "WARN" not in output.out + output.err


def test_marks_are_at_the_places_of_their_numbers(drawn, files):
    """The places of two points give those of all others."""
    data, svg = drawn["pareto"].data, ElementTree.fromstring(files["pareto"]["svg"])
    places = [
        tuple(map(float, re.findall(r"[\d.]+", mark.get("transform"))))
        for mark in marks_of(svg, "mark-symbol")
        if mark.get("fill") not in (None, "none", "transparent")
    ][-len(data) :]
    for axis, measure in enumerate(("user_bce", "teacher_bce")):
        numbers = data[measure].to_numpy()
        first, last = numbers.argmin(), numbers.argmax()
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
    chart = json.loads(charts.page_chart(drawn[name]))
    values = pd.DataFrame(chart["datasets"][chart["data"]["name"]])
    np.testing.assert_allclose(values[columns], drawn[name].data[columns], atol=1e-9)


def test_a_mode_has_the_same_color_in_every_figure(drawn):
    found = {}
    # The bars of the waterfall are steps and not modes.
    for name in sorted(set(drawn) - {"waterfall"}):
        for line, color in look_of(drawn[name]).items():
            found.setdefault(re.split("[ ,]", line)[0], set()).add(color)
    lines = ("none", "aux", "shared", "incumbent")
    assert {line: len(of) for line, of in found.items()} == dict.fromkeys(lines, 1)
    assert len(set.union(*found.values())) == 4


def test_every_line_has_a_separate_color(drawn):
    palette = charts.colors(["none", "mine", "aux", "yours"])
    assert len(set(palette)) == 4
    assert [palette[0], palette[2]] == charts.colors(["none", "aux"])
    # The first line of a mode keeps the color of the mode.
    assert charts.colors(["aux", "shared", "aux"])[:2] == charts.colors(["aux", "shared"])
    assert len(set(charts.colors(["aux", "shared", "aux"]))) == 3
    # A variant of mode none does not get its gray, even if plain mode none is not drawn.
    data = drawn["plane"].data
    variant = data.assign(mode="none", plain=False, line="none, unshown weight")[:1]
    look = look_of(drawn["plane"]._replace(data=pd.concat([variant, data])))
    assert look["none, unshown weight"] not in charts.colors(["none", "aux", "shared"])


def test_with_several_sizes_a_color_is_a_size_and_a_dash_a_student_without_distillation(drawn):
    data = drawn["frontier"].data
    students = data[data["mode"] != charts.REFERENCE]
    both = [students.assign(size=size, line=students["line"] + size) for size in (" 8", " 32")]
    references = data[data["mode"] == charts.REFERENCE]
    figure = drawn["frontier"]._replace(data=pd.concat([*both, references], ignore_index=True))
    colors, dashes = look_of(figure), look_of(figure, "strokeDash")
    assert list(colors) == ["none 8", "aux 8", "none 32", "aux 32", "incumbent"]
    assert colors["none 8"] == colors["aux 8"] != colors["none 32"] == colors["aux 32"]
    assert dashes["none 8"] == dashes["none 32"] != dashes["aux 8"] == dashes["aux 32"]


def test_the_legend_names_every_line_with_the_number_of_its_crossing(drawn, files):
    for name, column, text in (
        ("value_captured", "passed_for_99", "{}: {:.0f}"), ("frontier", "cost_for_99", "{}: {:.1%}")
    ):  # fmt: skip
        crossings = drawn[name].data.drop_duplicates("line")[["line", column]]
        expected = [text.format(*row) for row in crossings.itertuples(index=False)]
        assert [of for of in texts_of(files, name) if ": " in of] == expected
        assert "incumbent" in expected[-1]
    data = drawn["survival"].data
    a_list = data[data["mode"] == charts.REFERENCE].assign(line="show_rate", setting="show_rate")
    figure = drawn["survival"]._replace(data=pd.concat([data, a_list]))
    assert list(look_of(figure)) == ["none", "aux", "shared", "incumbent", "show_rate"]
    texts = set(texts_of(files, "saving"))
    assert {"95", "99", "99.9"} <= texts
    assert any(re.fullmatch(r"\d+%", text) for text in texts)
    # Both are gray, so that only the dash differs.
    for channel, looks in (("color", 1), ("strokeDash", 2)):
        found = look_of(figure, channel)
        assert len({str(found["incumbent"]), str(found["show_rate"])}) == looks


def test_the_waterfall_has_one_bar_per_step_with_its_number(drawn, files):
    data, texts = drawn["waterfall"].data, texts_of(files, "waterfall")
    assert [text for text in texts if text in set(data["line"])] == list(data["line"])
    assert {f"{number:.0f}" for number in data["mean"]} <= set(texts)
    # A step keeps its color if another is missing.
    short = charts.files(drawn["waterfall"]._replace(data=data.drop(index=2)))["svg"]
    bars, fewer = (
        marks_of(ElementTree.fromstring(svg), "mark-rect")
        for svg in (files["waterfall"]["svg"], short)
    )
    # The path of a bar begins with its corner and its width.
    widths = [float(re.search(r"h([\d.]+)", bar.get("d"))[1]) for bar in bars]
    expected = (data["mean"] / data["mean"][0]).to_numpy()
    assert np.array(widths) / widths[0] == pytest.approx(expected, abs=0.01)
    fills = [bar.get("fill") for bar in bars]
    assert len(set(fills)) == len(data) == 4
    assert [bar.get("fill") for bar in fewer] == [fills[0], fills[1], fills[3]]


def test_a_name_cannot_end_the_script_that_holds_it(drawn):
    figure = drawn["survival"]
    data = figure.data.assign(line="</script><script>alert(1)</script>")
    assert "<" not in charts.page_chart(figure._replace(data=data))
