"""What each way to serve inherits of the final ranker's errors, by the script that shows it."""

import runpy
import sys

import pytest

from tests.reporting import sweeps


def test_a_gain_that_the_truth_lacks_is_inherited(tmp_path, monkeypatch, capsys):
    # Final and true value that each method keeps with 30 passed, by the two draws of the data.
    kept = {
        ("none", "user"): [(0.90, 0.90), (0.80, 0.80)],
        ("aux", "user"): [(0.93, 0.91), (0.83, 0.81)],
        ("aux", "teacher"): [(0.95, 0.88), (0.87, 0.80)],
    }
    folders = []
    for draw in (0, 1):
        rows = [
            {"mode": mode, "serve": serve, "passed": 100 if mode == "none" else 80,
             "value_captured@30": kept[mode, serve][draw][0],
             "true_value_captured@30": kept[mode, serve][draw][1]}
            for mode, serve in kept
        ]  # fmt: skip
        folders.append(sweeps.write_rows(tmp_path / str(draw), rows))
    monkeypatch.setattr(sys, "argv", ["inherited.py", *map(str, folders)])

    runpy.run_path("scripts/inherited.py", run_name="__main__")

    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    changes = {tuple(line[2:4]): [float(cell.split()[0]) for cell in line[5:]] for line in lines}
    # In percent. Teacher heads keep 5 and 7 more of the final value, and 2 less and 0 of the true.
    assert changes["aux", "user"] == pytest.approx([3.0, 1.0, 2.0])
    assert changes["aux", "teacher"] == pytest.approx([6.0, -1.0, 7.0])
