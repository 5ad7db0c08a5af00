import csv
import re
from pathlib import Path

import pandas as pd
import pytest

from kd_ranker.errors import UserError
from kd_ranker.pipeline import commands
from kd_ranker.requests.lock import hold
from tests import small
from tests.report import sweeps

FIGURES = ["pareto", "value_captured", "survival", "calibration", "training"]


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def report(workdir: Path) -> tuple[str, str]:
    (sentence,), page = commands.report([workdir], workdir)
    return sentence, page.read_text()


def test_what_is_written(tmp_path):
    sweep, output = sweeps.write_sweep(tmp_path / "sweep"), tmp_path / "output"
    before = files_below(sweep)
    answers, page = commands.report([sweep], output)
    assert files_below(sweep) == before
    assert page == output / "report.html"
    assert answers[0].startswith("cascade: ")
    tables = ["cascade.csv", "cascade.md", "cascade.tex", "cascade-difference.md",
              "cascade-difference.tex", "claims.csv", "claims.md"]  # fmt: skip
    assert set(files_below(output)) == {
        "report.html",
        *(f"tables/{name}" for name in tables),
        *(f"figures/cascade-{name}.{end}" for name in FIGURES for end in ("svg", "pdf", "png")),
    }


def test_a_sweep_that_is_being_written_is_reported_elsewhere_and_not_into_its_folder(tmp_path):
    sweep = sweeps.write_sweep(tmp_path / "sweep")
    with hold(sweep):
        assert commands.report([sweep], tmp_path / "output")[1].exists()
        with pytest.raises(UserError, match=f"{sweep} is held by process"):
            commands.report([sweep], sweep)


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    sweep = sweeps.write_sweep(tmp_path / "sweep")
    commands.report([sweep], tmp_path / "one")
    commands.report([sweep], tmp_path / "other")
    one, other = files_below(tmp_path / "one"), files_below(tmp_path / "other")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_the_numbers_are_there_in_full(tmp_path):
    sweep = sweeps.write_sweep(tmp_path)
    commands.report([sweep], sweep)
    numbers = pd.read_csv(sweep / "tables" / "cascade.csv", keep_default_na=False)
    assert {"mean", "low", "high", "n", "difference", "pairs", "best"} <= set(numbers)
    assert "true_value_captured@400" in set(numbers["measure"])
    assert set(numbers["mode"]) == {"none", "aux", "shared"}
    claims = list(csv.DictReader((sweep / "tables" / "claims.csv").open()))
    assert {claim["claim"] for claim in claims} == set("abcde")


def test_latex_is_whole(tmp_path):
    sweep = sweeps.write_sweep(tmp_path)
    commands.report([sweep], sweep)
    for name in ("cascade.tex", "cascade-difference.tex"):
        text = (sweep / "tables" / name).read_text()
        lines = [line for line in text.splitlines() if not line.startswith("%")]
        begin = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", lines[0])
        rules = [line for line in lines if line.endswith("rule")]
        assert rules == [r"\toprule", r"\midrule", r"\bottomrule"]
        assert lines[-1] == r"\end{tabular}"
        body = [line for line in lines[1:-1] if line not in rules]
        for line in body:
            assert line.endswith(r"\\")
            assert len(re.findall(r"(?<!\\)&", line)) == len(begin[1]) - 1
            assert line.count("{") == line.count("}")
            assert len(re.findall(r"(?<!\\)\$", line)) % 2 == 0
            assert not re.search(r"(?<!\\)[%#_]", line)
            assert line.isascii()


def test_markdown_is_whole(tmp_path):
    sweep = sweeps.write_sweep(tmp_path, frozen=["shared-weight1.0-seed1"])
    commands.report([sweep], sweep)
    text = (sweep / "tables" / "cascade.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 1 + 9
    assert "Left out, because their loss stopped being finite: shared-weight1.0-seed1" in text
    assert "(step 700)" in text
    assert "excludes 0" in text


def test_one_seed_has_no_intervals(tmp_path):
    sentence, page = report(sweeps.write_sweep(tmp_path, seeds=(0,)))
    assert "one repeat" in sentence
    assert "±" not in (tmp_path / "tables" / "cascade.tex").read_text().replace("± is half", "")
    assert '<span class="error">' not in page
    assert "<strong>" not in page


def test_only_mode_none(tmp_path):
    sentence, page = report(sweeps.write_sweep(tmp_path, modes=("none",)))
    assert "no measured student that distils" in sentence
    assert not (tmp_path / "tables" / "cascade-difference.md").exists()
    assert "not measured" in page


def test_a_single_run_has_one_member_without_a_name(tmp_path):
    sweeps.write_sweep(tmp_path, modes=("shared",), weights=(1.0,), seeds=(0,))
    sweeps.change(tmp_path, lambda frame: frame[frame["role"] == "student"].assign(member=None))
    for name in ("curves.csv", "calibration.csv"):
        frame = pd.read_csv(tmp_path / name)
        frame.assign(member=None).to_csv(tmp_path / name, index=False)
    metrics = (tmp_path / "cohorts" / "0" / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(metrics.replace("/shared-weight1.0-seed0", ""))
    (tmp_path / "cohorts" / "0" / "metrics.jsonl").unlink()
    sentence, page = report(tmp_path)
    assert "no measured student of mode none" in sentence
    assert "run a sweep" in sentence
    assert "Left out" not in page
    assert (tmp_path / "figures" / "cascade-training.svg").exists()


def test_results_alone_are_reported_without_their_figures(tmp_path):
    without = ("curves.csv", "calibration.csv", "cohorts/0/metrics.jsonl", "environment.json")
    _, page = report(sweeps.write_sweep(tmp_path, without=without))
    assert page.count("Left out:") == 4
    assert "holds no environment.json" in page


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
    assert "nothing can be said" in sentence
    for name in names:
        assert f"{name} (step 9)" in page


def test_a_frozen_member_takes_its_repeat_out_of_the_pairs(tmp_path):
    _, page = report(sweeps.write_sweep(tmp_path, frozen=["none-weight0.0-seed1"]))
    assert "none-weight0.0-seed1 (step 700)" in page
    numbers = pd.read_csv(tmp_path / "tables" / "cascade.csv", keep_default_na=False)
    compared = numbers[(numbers["mode"] != "none") & (numbers["measure"] == "passed_for_99")]
    assert set(compared["pairs"]) == {2}
    assert set(compared["n"]) == {3}


def test_cells_that_are_not_known_are_empty(tmp_path):
    sweeps.change(
        sweeps.write_sweep(tmp_path),
        lambda frame: frame.assign(alignment_ratio=None, passed_for_99=None),
    )
    sentence, page = report(tmp_path)
    assert "nothing can be said" in sentence
    assert "nan" not in (tmp_path / "tables" / "cascade.md").read_text().lower()
    assert not re.search(r">\s*nan\b", page, re.IGNORECASE)


def test_a_dataset_without_true_values(tmp_path):
    sentence, _ = report(sweeps.write_sweep(tmp_path, "movielens_100k", true_values=False))
    assert sentence.startswith("movielens_100k: ")


def test_a_saving_that_is_not_there_is_not_told(tmp_path):
    sentence, _ = report(sweeps.write_sweep(tmp_path, gain=-0.3))
    assert "no distilled student" in sentence


@pytest.mark.slow
def test_the_entry_point_prints_the_answers_and_the_page(tmp_path):
    one = sweeps.write_sweep(tmp_path / "one")
    two = sweeps.write_sweep(tmp_path / "two", dataset="movielens_100k")
    output = tmp_path / "output"
    finished = small.run("-m", "experiments.report", f"--workdir={output}", str(one), str(two))
    assert finished.returncode == 0, finished.stderr
    first, second, last = finished.stdout.splitlines()
    assert first.startswith("cascade: ")
    assert second.startswith("movielens_100k: ")
    assert last == f"report: {output / 'report.html'}"
    alone = small.run("-m", "experiments.report", f"--workdir={one}")
    assert alone.returncode == 0, alone.stderr
    assert (one / "report.html").exists()


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
