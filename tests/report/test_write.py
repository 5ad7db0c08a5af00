import csv
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import vl_convert

from kd_ranker import api
from kd_ranker.errors import UserError
from kd_ranker.report import charts
from kd_ranker.requests.lock import hold
from tests import small
from tests.report import sweeps

FIGURES = [
    *("waterfall", "frontier", "plane"),
    *("value_captured", "true_value_captured", "saving", "survival", "pareto"),
    *("calibration", "training"),
]
TABLES = ["cascade", *(f"cascade-{name}" for name in ("difference", "saving", "cost", "tuning"))]


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def report(workdir: Path) -> tuple[str, str]:
    (sentence,), page = api.report(workdir, output=workdir)[:2]
    return sentence, page.read_text()


@pytest.fixture
def quick(monkeypatch):
    """Leaves out the pictures and the script that draws them, which take most of the time."""
    monkeypatch.setattr(charts, "files", lambda figure: {"svg": b"<svg/>"})
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda snippet: "")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sweep, and the folder of its report."""
    folder = tmp_path_factory.mktemp("report")
    sweep, output = sweeps.write_sweep(folder / "sweep"), folder / "output"
    before = files_below(sweep)
    answers, page = api.report(sweep, output=output)[:2]
    assert files_below(sweep) == before
    assert page == output / "report.html"
    assert answers[0].startswith("cascade: ")
    return sweep, output


def test_what_is_written(written):
    tables = ["cascade.csv", "claims.csv", "claims.md"]
    for table in TABLES:
        tables += [f"{table}.md", f"{table}.tex"]
    assert set(files_below(written[1])) == {
        "report.html",
        *(f"tables/{name}" for name in tables),
        *(f"figures/cascade-{name}.{end}" for name in FIGURES for end in ("svg", "pdf", "png")),
    }


def test_the_same_inputs_give_the_same_tables_and_page(written, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "files", lambda figure: {})
    api.report(written[0], output=tmp_path)
    one, other = files_below(written[1]), files_below(tmp_path)
    assert set(one) - set(other) == {name for name in one if name.startswith("figures/")}
    assert [name for name in other if one[name] != other[name]] == []


def test_the_numbers_are_there_in_full(written):
    tables = written[1] / "tables"
    numbers = pd.read_csv(tables / "cascade.csv", keep_default_na=False)
    assert {"mean", "low", "high", "n", "difference", "pairs", "best"} <= set(numbers)
    assert "true_value_captured@400" in set(numbers["measure"])
    assert set(numbers["mode"]) == {"none", "aux", "shared"}
    claims = list(csv.DictReader((tables / "claims.csv").open()))
    assert {claim["claim"] for claim in claims} == set("abcdefg")


@pytest.mark.usefixtures("quick")
def test_a_sweep_that_is_being_written_is_reported_elsewhere_and_not_into_its_folder(tmp_path):
    sweep = sweeps.write_sweep(tmp_path / "sweep")
    with hold(sweep):
        assert api.report(sweep, output=tmp_path / "output").page.exists()
        with pytest.raises(UserError, match=f"{sweep} is held by process"):
            api.report(sweep, output=sweep)


def test_latex_is_complete(written):
    for name in TABLES:
        text = (written[1] / "tables" / f"{name}.tex").read_text()
        first, *body, last = [line for line in text.splitlines() if not line.startswith("%")]
        columns = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", first)[1]
        rules = [line for line in body if line.endswith("rule")]
        assert rules == [r"\toprule", r"\midrule", r"\bottomrule"]
        assert last == r"\end{tabular}"
        for line in (line for line in body if line not in rules):
            assert line.endswith(r"\\")
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
            assert line.count("{") == line.count("}")
            assert len(re.findall(r"(?<!\\)\$", line)) % 2 == 0
            assert not re.search(r"(?<!\\)[%#_]", line)
            assert line.isascii()


@pytest.mark.usefixtures("quick")
def test_markdown_is_complete(tmp_path):
    sweep = sweeps.write_sweep(tmp_path, frozen=["shared-weight1.0-seed1"])
    api.report(sweep, output=sweep)
    text = (sweep / "tables" / "cascade.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    # The teacher, the references, and the best of each way.
    assert len(lines) == 2 + 1 + len(sweeps.REFERENCES) + 3
    assert "Left out, because their loss stopped being finite: shared-weight1.0-seed1" in text
    assert "(step 700)" in text
    assert "excludes 0" in text


@pytest.mark.usefixtures("quick")
def test_one_seed_without_its_requests_has_no_intervals(tmp_path):
    sweeps.write_sweep(tmp_path, seeds=(0,), without=sweeps.OF_REQUESTS)
    sentence, page = report(tmp_path)
    assert "without an interval" in sentence
    assert "95%" not in sentence
    assert "±" not in (tmp_path / "tables" / "cascade.tex").read_text().replace("± is half", "")
    assert '<span class="error">' not in page
    assert "<strong>" not in page


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("options", "begins", "contains"),
    [
        ({"modes": ("none",)}, "cascade: ", "no measured student that learns from them"),
        ({"gain": -0.3}, "cascade: ", "The scores save nothing here"),
        (
            {"dataset": "movielens_100k", "true_values": False},
            "movielens_100k: ",
            "By the labels of the log",
        ),
    ],
)
def test_sweeps_without_a_part_of_the_answer(tmp_path, options, begins, contains):
    sentence, page = report(sweeps.write_sweep(tmp_path, **options))
    assert sentence.startswith(begins)
    assert contains in sentence
    assert "not measured" in page
    differences = list((tmp_path / "tables").glob("*-difference.md"))
    assert bool(differences) == (options.get("modes") != ("none",))


@pytest.mark.usefixtures("quick")
def test_a_single_run_has_one_member_without_a_name(tmp_path):
    sweeps.write_sweep(tmp_path, modes=("shared",), weights=(1.0,), seeds=(0,))
    sweeps.change(tmp_path, lambda frame: frame[frame["role"] == "student"].assign(member=None))
    for name in sweeps.OF_REQUESTS:
        (tmp_path / name).unlink()
    sweeps.finish(tmp_path)
    bins = pd.read_csv(tmp_path / "calibration.csv")
    bins.assign(member=None).to_csv(tmp_path / "calibration.csv", index=False)
    metrics = (tmp_path / "cohorts" / "0" / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(metrics.replace("/shared-weight1.0-seed0", ""))
    (tmp_path / "cohorts" / "0" / "metrics.jsonl").unlink()
    sentence, page = report(tmp_path)
    assert "no measured student that needs none of them" in sentence
    assert "run a sweep" in sentence
    # What each request adds is kept of sweeps alone, which know the teacher as well; and there is
    # no ranker without scores to compare users with.
    assert page.count("Left out") == 6
    assert (tmp_path / "figures" / "cascade-training.svg").exists()


@pytest.mark.usefixtures("quick")
def test_results_alone_are_reported_without_their_figures(tmp_path):
    without = ("calibration.csv", "cohorts/0/metrics.jsonl", "environment.json")
    _, page = report(sweeps.write_sweep(tmp_path, without=(*without, *sweeps.OF_REQUESTS)))
    # All but user against teacher BCE, and what the tables have at their targets.
    assert page.count("Left out:") == 6
    assert "holds no environment.json" in page


@pytest.mark.usefixtures("quick")
def test_members_that_are_all_frozen(tmp_path):
    names = [f"{mode}-seed0" for mode in ("none-weight0.0", "shared-weight1.0")]
    sweeps.write_sweep(tmp_path, modes=("none", "shared"), weights=(1.0, 3.0), seeds=(0, 1))
    sweeps.change(
        tmp_path,
        lambda frame: frame.assign(
            non_finite_step=[None if role == "teacher" else 9 for role in frame["role"]]
        ),
    )
    sentence, page = report(tmp_path)
    assert "passed_for_99 is unknown for every student" in sentence
    for name in names:
        assert f"{name} (step 9)" in page


@pytest.mark.usefixtures("quick")
def test_a_frozen_member_takes_its_repeat_out_of_the_pairs(tmp_path):
    _, page = report(sweeps.write_sweep(tmp_path, frozen=["none-weight0.0-seed1"]))
    assert "none-weight0.0-seed1 (step 700)" in page
    numbers = pd.read_csv(tmp_path / "tables" / "cascade.csv", keep_default_na=False)
    compared = numbers[(numbers["mode"] != "none") & (numbers["measure"] == "passed_for_99")]
    assert set(compared["pairs"]) == {2}
    assert set(compared["n"]) == {3}


@pytest.mark.usefixtures("quick")
def test_cells_that_are_not_known_are_empty(tmp_path):
    sweeps.change(
        sweeps.write_sweep(tmp_path),
        lambda frame: frame.assign(alignment_ratio=None, passed_for_99=None),
    )
    sentence, page = report(tmp_path)
    assert "passed_for_99 is unknown for every student" in sentence
    assert "check data.teacher and value_weights" in sentence
    assert "nan" not in (tmp_path / "tables" / "cascade.md").read_text().lower()
    assert not re.search(r">\s*nan\b", page, re.IGNORECASE)


@pytest.mark.usefixtures("quick")
def test_faults_that_data_allow_accepts_are_below_the_answer(tmp_path):
    data_report = {"candidates": {"in_the_log": 50, "rejected": 20}, "columns": []}
    parts = [tmp_path / "one", tmp_path / "two"]
    for seed, part in enumerate(parts):
        sweeps.write_sweep(part, seeds=(seed,))
        (part / "data_report.json").write_text(json.dumps(data_report))
    (sentence,), page, *_ = api.report(*parts, output=tmp_path)
    answer, warning = sentence.splitlines()
    assert "final ranker needs" in answer
    assert warning == (
        "cascade: data.allow let pass rejected: 20 of 50 candidates (40.0%) are rejected."
    )
    assert f'<p class="caveat warning">{warning}</p>' in page.read_text()
    (parts[0] / "data_report.json").write_text("{")
    with pytest.raises(UserError, match=r"one/data_report.json is damaged"):
        api.report(*parts, output=tmp_path)


@pytest.mark.slow
def test_the_entry_point_prints_the_answers_and_the_page(tmp_path):
    small_sweep = {"weights": (1.0,), "without": sweeps.OF_REQUESTS}
    one = sweeps.write_sweep(tmp_path / "one", **small_sweep)
    two = sweeps.write_sweep(tmp_path / "two", dataset="movielens_100k", **small_sweep)
    output = tmp_path / "output"
    finished = small.run("-m", "experiments.report", f"--workdir={output}", str(one), str(two))
    assert finished.returncode == 0, finished.stderr
    first, second, last = finished.stdout.splitlines()
    assert first.startswith("cascade: ")
    assert second.startswith("movielens_100k: ")
    assert last == f"report: {output / 'report.html'}"
    without = ("calibration.csv", "cohorts/0/metrics.jsonl", *sweeps.OF_REQUESTS)
    three = sweeps.write_sweep(tmp_path / "three", modes=("none",), without=without)
    alone = small.run("-m", "experiments.report", f"--workdir={three}")
    assert alone.returncode == 0, alone.stderr
    assert (three / "report.html").exists()


def test_results_of_an_older_release_are_one_line(tmp_path):
    sweeps.change(sweeps.write_sweep(tmp_path), lambda frame: frame.drop(columns="split"))
    with pytest.raises(UserError, match="an older version wrote it; run the sweep again") as caught:
        api.report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=absent"], "absent holds no results.csv; make a sweep with: python -m experi"),
        ([], "--workdir is missing"),
        (["--workdir=out", "--config=configs/cascade.py"], "config"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message):
    finished = small.run("-m", "experiments.report", *flags)
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert finished.stdout == ""
