"""The figures: their tables against the estimates, and what is drawn of them."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import vl_convert

from kd_ranker.reporting import figures
from kd_ranker.reporting.estimates import Estimates

SVG = "{http://www.w3.org/2000/svg}"
CURVES = ["value_captured", "true_value_captured"]
SHARED = "shared, weight 1"


def figures_by_name(estimates):
    return {figure.name: figure for figure in figures.figures(estimates.study, estimates)}


@pytest.fixture(scope="module")
def drawn(estimates):
    return figures_by_name(estimates)


@pytest.fixture(scope="module")
def files(drawn):
    return {name: figures.files(figure) for name, figure in drawn.items()}


@pytest.fixture(scope="module")
def roots(files):
    return {name: ElementTree.fromstring(formats["svg"]) for name, formats in files.items()}


def texts_of(root):
    return [text.text for text in root.iter(f"{SVG}text")]


def test_every_figure_is_drawn_in_every_format_without_a_date(drawn, files, roots):
    assert list(files) == ["waterfall", "plane", *CURVES, "pareto"]
    for name, formats in files.items():
        assert formats["svg"].startswith(b"<svg")
        assert formats["pdf"].startswith(b"%PDF")
        assert formats["png"].startswith(b"\x89PNG")
        assert not re.search(rb"20\d\d-\d\d-\d\d", formats["svg"])
        assert b"tIME" not in formats["png"]
        if name != "waterfall":
            assert any(text.startswith("aux") for text in texts_of(roots[name]))
    assert figures.files(drawn["plane"])["png"] == files["plane"]["png"]


def test_vega_warns_of_nothing_and_draws_unknown_ends(estimates, capfd, monkeypatch):
    """As of a single repeat: unknown ends are null on the page, and no NaN in a path."""
    draw = vl_convert.vegalite_to_svg
    values = figures._values

    def draw_with_warnings(chart):
        return draw(chart, show_warnings=True)

    def without_ends(data):
        ends = data.columns[data.columns.str.endswith(("low", "high"))]
        return values(data.assign(**dict.fromkeys(ends, np.nan)))

    monkeypatch.setattr(vl_convert, "vegalite_to_svg", draw_with_warnings)
    monkeypatch.setattr(figures, "_values", without_ends)

    for figure in figures_by_name(estimates).values():
        assert b"NaN" not in figures.files(figure)["svg"]
        assert "NaN" not in figures.page_chart(figure)
    output = capfd.readouterr()
    assert "WARN" not in output.out + output.err


def test_the_page_has_the_numbers_and_no_name_ends_its_script(drawn, estimates):
    chart = json.loads(figures.page_chart(drawn["pareto"]))
    values = pd.DataFrame(chart["datasets"][chart["data"]["name"]])
    columns = ["user_bce", "user_bce_low", "teacher_bce_high"]
    np.testing.assert_allclose(values[columns], drawn["pareto"].data[columns], atol=1e-9)
    hostile = {f"</script>{method}": setting for method, setting in estimates.study.chosen.items()}
    words = {method: method for method in hostile}
    renamed = Estimates(estimates.study._replace(chosen=hostile, in_words=words))
    assert "<" not in figures.page_chart(figures_by_name(renamed)["plane"])


def test_the_pareto_front_has_a_line_a_method_a_point_a_weight(drawn, estimates):
    data = drawn["pareto"].data
    assert list(data["method"].unique()) == ["none", "aux", "shared"]
    assert list(data["line"].unique()) == ["none", "aux, bce on scores", "shared, bce on scores"]
    assert list(data.loc[data["method"] == "shared", "weight"]) == [0.3, 1.0]
    # All else as it was chosen.
    settings_of_aux = data.loc[data["method"] == "aux", "setting"]
    assert list(settings_of_aux) == ["aux (teacher), weight 0.3", "aux (teacher), weight 1"]
    (none,) = data[data["method"] == "none"].to_dict("records")
    assert np.isnan(none["weight"])
    rows = estimates.study.rows.query("setting == 'none' and split == 'validation'")
    assert none["user_bce"] == pytest.approx(rows.filter(like="user_bce/").to_numpy().mean())
    assert none["user_bce_low"] < none["user_bce"] < none["user_bce_high"]


def test_the_pareto_front_leaves_out_settings_that_halving_stopped(estimates):
    is_stopped = estimates.study.rows["setting"] == "shared, weight 0.3"
    study = estimates.study._replace(rows=estimates.study.rows.assign(is_stopped=is_stopped))
    data = figures_by_name(Estimates(study))["pareto"].data
    assert list(data.loc[data["method"] == "shared", "weight"]) == [1.0]
    assert list(data.loc[data["method"] == "aux", "weight"]) == [0.3, 1.0]


@pytest.mark.parametrize("measure", CURVES)
def test_curves_show_the_chosen_settings_and_the_incumbent(drawn, roots, estimates, measure):
    data = drawn[measure].data
    assert list(data["method"].unique()) == ["none", "aux", "shared", "incumbent"]
    shared = data[data["method"] == "shared"].reset_index(drop=True)
    curve = estimates.curve(SHARED, measure)
    pd.testing.assert_frame_equal(shared[list(curve)], curve)
    # The legend of the final value has the number at 99%.
    legend = []
    for line in data.drop_duplicates("method").to_dict("records"):
        passed = estimates.of(line["setting"], "passed_for_99").mean
        number = f": {passed:.0f}" if measure == "value_captured" else ""
        words = estimates.study.in_words.get(line["method"], "today's early ranker")
        legend.append(f"{words}{number}")
    assert [text for text in texts_of(roots[measure]) if text in legend] == legend


def test_the_window_of_a_curve_begins_where_students_are_near(drawn, estimates):
    chart = drawn["value_captured"].chart.to_dict()
    area = chart["layer"][0]["encoding"]
    data = drawn["value_captured"].data
    students = data[data["method"].isin([*estimates.study.chosen])]

    low, high = area["y"]["scale"]["domain"]
    first, last = area["x"]["scale"]["domain"]

    assert low == pytest.approx(min(0.9, students["mean"].median() - 0.1))
    assert high > students["high"].max()
    assert (first, last) == (students["k"][students["mean"] >= low].min(), students["k"].max())
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if first <= k <= last]
    assert area["x"]["axis"]["values"] == ticks


def test_a_curve_is_cut_at_the_border_of_its_window():
    names = {"line": "a", "method": "a", "setting": "a"}
    numbers = {"k": [1, 10, 100], "low": [0.1, 0.3, 0.7], "mean": [0.2, 0.4, 0.8]}
    curve = pd.DataFrame(numbers | {"high": [0.4, 0.8, 1.0]}).assign(**names)

    cut = figures._in_window(curve, 2, 0.6).set_index("k")

    # On the logarithmic axis, the high end reaches 0.6 halfway from 1 to 10, the mean halfway from
    # 10 to 100, and the low end three quarters of that way.
    ends = [10**0.5, 10, 10**1.5, 10**1.75, 100]
    assert list(cut.index) == pytest.approx(ends)
    assert cut["high"].tolist() == pytest.approx([0.6, 0.8, 0.9, 0.95, 1.0])
    assert cut["mean"].tolist() == pytest.approx([np.nan, np.nan, 0.6, 0.7, 0.8], nan_ok=True)
    assert cut["low"].tolist() == pytest.approx([0.6, 0.6, 0.6, 0.6, 0.7])
    assert cut["is_point"].tolist() == [False, True, False, False, True]


def test_a_curve_that_begins_in_the_window_is_not_drawn_before():
    names = {"line": "a", "method": "a", "setting": "a"}
    ends = {end: [0.7, 0.8] for end in ("low", "mean", "high")}
    curve = pd.DataFrame({"k": [10, 100], **ends}).assign(**names)
    assert figures._in_window(curve, 2, 0.6)["k"].tolist() == [10, 100]


def test_the_waterfall_goes_from_today_to_the_best_with_scores(drawn, roots, estimates):
    data = drawn["waterfall"].data
    steps = {
        # One ranker has one bar, with both of its names.
        "today's early ranker": "incumbent", "mode none, best without scores": "none",
        "best with scores": estimates.study.best_with_scores,
    }  # fmt: skip
    assert dict(zip(data["line"], data["setting"], strict=True)) == steps
    for line in data.to_dict("records"):
        mean = estimates.of(line["setting"], "passed_for_99")
        assert (line["mean"], line["low"], line["high"]) == pytest.approx(mean[:3], nan_ok=True)
    names = {name for step in steps for name in step.split(", ")}
    drawn_texts = {"".join(text.itertext()) for text in roots["waterfall"].iter(f"{SVG}text")}
    all_text = " ".join(drawn_texts)
    assert all(name in all_text for name in names)
    assert {f"{mean:.0f}" for mean in data["mean"]} <= drawn_texts


def test_a_ranker_has_the_same_color_in_the_waterfall_and_in_the_plane(drawn, estimates):
    colors = drawn["waterfall"].chart.to_dict()["layer"][0]["encoding"]["color"]["scale"]
    steps = dict(zip(colors["domain"], colors["range"], strict=True))
    methods = list(estimates.study.chosen)
    best = drawn["waterfall"].data.set_index("line").loc["best with scores", "setting"]
    (method_of_best,) = [name for name, it in estimates.study.chosen.items() if it == best]
    assert steps == {
        "today's early ranker": figures._INCUMBENT,
        "mode none, best without scores": figures._COLORS[methods.index("none")],
        "best with scores": figures._COLORS[methods.index(method_of_best)],
    }
    plane = drawn["plane"].chart.to_dict()["layer"][-1]["encoding"]["color"]["scale"]
    colors_of_plane = dict(zip(plane["domain"], plane["range"], strict=True))
    words = estimates.study.in_words[method_of_best]
    assert colors_of_plane[words] == steps["best with scores"]


@pytest.mark.parametrize("name", ["plane", *CURVES, "pareto"])
def test_the_columns_of_a_legend_fit_the_figure(drawn, name):
    spec = json.loads(figures.page_chart(drawn[name]))
    columns = spec["config"]["legend"]["columns"]
    longest = max(map(len, drawn[name].data["line"]))
    # About 6 pixels a character, and 50 for the symbol.
    assert columns == 1 or columns * (6 * longest + 50) <= figures._WIDTH


def test_the_plane_marks_methods_against_the_best_without(drawn, estimates):
    data = drawn["plane"].data
    assert estimates.study.baseline == "none"
    assert list(data["method"]) == ["aux", "shared"]
    assert list(data["line"]) == ["aux, bce on scores", "shared, bce on scores"]
    for mark in data.to_dict("records"):
        users = estimates.gap(mark["setting"], "none", "true_value_for_99")
        for name, mean in (("users", users), ("saving", estimates.cost_saved(mark["setting"]))):
            found = [mark[f"{name}{end}"] for end in ("", "_low", "_high")]
            assert found == pytest.approx(mean[:3])


def test_the_planes_axes_contain_the_origin_and_the_margin(drawn, estimates):
    chart = drawn["plane"].chart.to_dict()
    axes = {}
    for layer in chart["layer"]:
        for channel in ("x", "y"):
            if "scale" in layer["encoding"].get(channel, {}):
                axes[channel] = layer["encoding"][channel]["scale"]["domain"]
    margin = estimates.study.config.report.margin
    assert axes["x"][0] < 0 < axes["x"][1]
    assert axes["y"][0] < -margin < 0 < axes["y"][1]
