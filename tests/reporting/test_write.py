"""The report as a whole: its files, and what it says of sweeps that lack something."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from kd_ranker import api
from kd_ranker.errors import UserError
from kd_ranker.requests.lock import hold
from tests.reporting import sweeps

FIGURES = ["waterfall", "plane", "value_captured", "true_value_captured", "pareto"]
TABLES = ["cascade", *(f"cascade-{name}" for name in ("difference", "cost", "timeout", "tuning"))]


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module", autouse=True)
def without_pictures():
    with sweeps.without_pictures():
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sweep, and the folder of its report."""
    folder = tmp_path_factory.mktemp("report")
    sweep, output = sweeps.write_sweep(folder / "sweep"), folder / "output"
    before = files_below(sweep)
    report = api.report(sweep, output=output)
    assert files_below(sweep) == before
    (answer,) = report.answers
    assert answer.startswith("cascade: ")
    assert str(report) == f"{answer}\nreport: {output / 'report.html'}"
    return sweep, output


def test_every_file_is_written_with_all_numbers(written):
    tables = ["cascade.csv", "claims.csv", "claims.md"]
    tables += [f"{table}.{end}" for table in TABLES for end in ("md", "tex")]
    assert set(files_below(written[1])) == {
        "report.html",
        *(f"tables/{name}" for name in tables),
        *(f"figures/cascade-{name}.{end}" for name in FIGURES for end in ("svg", "pdf", "png")),
    }
    numbers = pd.read_csv(written[1] / "tables" / "cascade.csv", keep_default_na=False)
    claims = pd.read_csv(written[1] / "tables" / "claims.csv", keep_default_na=False)
    assert {"mean", "low", "high", "n", "difference", "pairs", "best"} <= set(numbers)
    assert "true_value_captured@400" in set(numbers["measure"])
    assert set(numbers["mode"]) == {"none", "aux", "shared"}
    assert set(claims["claim"]) == set("abcdefg")


def test_the_same_inputs_give_the_same_tables_and_page(written, tmp_path):
    api.report(written[0], output=tmp_path)
    assert files_below(written[1]) == files_below(tmp_path)


def test_measures_and_keys_that_are_gone_change_nothing(written, tmp_path):
    sweep, output = tmp_path / "sweep", tmp_path / "output"
    shutil.copytree(written[0], sweep)
    config = json.loads((sweep / "config.json").read_text())
    config["funnel"]["policies"] = ["uniform"]
    (sweep / "config.json").write_text(json.dumps(config))
    sums_path = sweep / sweeps.OF_REQUESTS[0]
    sums = pd.read_parquet(sums_path)
    is_student = sums["run"].str.contains("seed")
    for policy in ("uniform", "hindsight"):
        sums[f"policy_scored/{policy}"] = sums["requests"].where(is_student)
    sums.to_parquet(sums_path)
    measures = {"scored_by/uniform": 30.0, "saving_by/hindsight": 0.7}
    sweeps.change(sweep, lambda frame: frame.assign(**measures))

    api.report(sweep, output=output)

    assert files_below(output / "tables") == files_below(written[1] / "tables")


def test_a_held_sweep_is_reported_into_another_folder_only(tmp_path):
    small_sweep = {"modes": ("none",), "seeds": (0,), "without": sweeps.OF_REQUESTS}
    sweep = sweeps.write_sweep(tmp_path / "sweep", **small_sweep)
    with hold(sweep):
        assert api.report(sweep, output=tmp_path / "output").page.exists()
        with pytest.raises(UserError, match=f"{sweep} is held by process"):
            api.report(sweep, output=sweep)


def with_diverged_students(frame):
    steps = [None if role == "teacher" else 9 for role in frame["role"]]
    return frame.assign(non_finite_step=steps)


def with_unknown_numbers(frame):
    return frame.assign(alignment_ratio=None, passed_for_99=None)


NOT_KNOWN = "The saving is unknown: "
DIVERGED = "none-weight0.0-seed{} (step {})"


@pytest.mark.parametrize(
    ("options", "change", "in_answer", "in_page", "figures"),
    [
        ({}, None, "The final ranker's scores save", "excludes 0", 5),
        ({"modes": ("none",)}, None, "no measured student learns from the scores", "", 4),
        ({"gain": -0.3}, None, "scores save any of the funnel's compute is undecided", "", 5),
        ({"true_values": False}, None, "The log cannot show the effect", "not measured", 3),
        ({}, with_diverged_students, f"{NOT_KNOWN}the loss of every student",
         DIVERGED.format(0, 9), 1),
        ({}, with_unknown_numbers, f"{NOT_KNOWN}no test",
         "check data.teacher and value_weights", 0),
        ({"frozen": ["none-weight0.0-seed1"]}, None, "must pass", DIVERGED.format(1, 700), 5),
        # Without an interval.
        ({"seeds": (0,), "without": sweeps.OF_REQUESTS}, None, "without an interval", "", 3),
    ],
)  # fmt: skip
def test_sweeps_without_a_part(tmp_path, options, change, in_answer, in_page, figures):
    sweeps.write_sweep(tmp_path, **({"seeds": (0, 1), "weights": (1.0,)} | options))
    if change:
        sweeps.change(tmp_path, change)
    (answer,), path, *_ = api.report(tmp_path, output=tmp_path)
    sentence, page = " ".join(answer.split()), path.read_text()
    assert sentence.startswith("cascade: ")
    assert in_answer in sentence
    assert in_page in page
    assert page.count('class="chart"') == figures
    assert not re.search(r">\s*nan\b", page, re.IGNORECASE)
    tables = tmp_path / "tables"
    assert "nan" not in (tables / "cascade.md").read_text().lower()
    assert (tables / "cascade-difference.md").exists() == ("unknown" not in sentence)
    numbers = pd.read_csv(tables / "cascade.csv", keep_default_na=False)
    compared = numbers[(numbers["mode"] != "none") & (numbers["measure"] == "passed_for_99")]
    if "frozen" in options:
        # It takes its repeat out of the pairs.
        assert set(compared["pairs"]) == {1}
        assert set(compared["n"]) == {2}
    if "without an interval" in in_answer:
        assert "95%" not in sentence
        assert "±" not in (tables / "cascade.tex").read_text().replace("± is half", "")


def test_a_single_run_has_one_run_without_a_name(tmp_path):
    single = {"modes": ("shared",), "weights": (1.0,), "seeds": (0,)}
    sweeps.write_sweep(tmp_path, **single, without=sweeps.OF_REQUESTS)
    sweeps.change(tmp_path, lambda frame: frame[frame["role"] == "student"].assign(run=None))
    (answer,), *_ = api.report(tmp_path, output=tmp_path)
    sentence = " ".join(answer.split())
    assert "no measured student needs no scores" in sentence
    assert "sweep none and another mode" in sentence
    # There are no requests to draw, and no ranker without scores to compare users with.
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {"cascade-pareto", "cascade-waterfall"}


def test_faults_that_data_allow_accepts_are_below_the_answer(tmp_path):
    data_report = {"allowed": [{"name": "rejected", "text": "20 of 50 are rejected"}]}
    parts = [tmp_path / "one", tmp_path / "two"]
    for seed, part in enumerate(parts):
        sweeps.write_sweep(part, modes=("none", "shared"), weights=(1.0,), seeds=(seed,))
        (part / "data_report.json").write_text(json.dumps(data_report))
    (answer,), page, *_ = api.report(*parts, output=tmp_path)
    warning = "Accepted by data.allow: rejected: 20 of 50 are rejected."
    assert answer.splitlines()[-1] == f"  note: {warning}"
    assert f'<p class="note warning">{warning}</p>' in page.read_text()
    (parts[0] / "data_report.json").write_text("{")
    with pytest.raises(UserError, match=r"one/data_report.json is damaged"):
        api.report(*parts, output=tmp_path)
