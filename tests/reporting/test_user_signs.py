"""Tests of the scripts that hold estimates from labels against the truth."""

import runpy
import sys

from tests.reporting import sweeps

SEEDS = (0, 1, 2)


def test_a_gain_by_scores_with_a_wrong_sign_is_counted(tmp_path, monkeypatch, capsys):
    # Of users the scores take 0.02, and the labels that the final ranker chose show 0.06 more.
    users = {"none": (0.90, 0.50), "aux": (0.88, 0.56)}
    rows = []
    for mode, (true, labels) in users.items():
        for seed in SEEDS:
            row = {"mode": mode, "seed": seed}
            for k in (15, 30):
                spread = 0.001 * seed if mode == "aux" else 0
                row |= {
                    f"true_value_captured@{k}": true + spread,
                    f"covered_user_value@{k}": labels + spread,
                    f"ips_user_value@{k}": labels + spread,
                    f"end_to_end_hit_rate@{k}/watch": labels + spread,
                    f"coverage@{k}": 0.9,
                }
            rows.append(row)
    folder = sweeps.write_rows(tmp_path / "sweep", rows)
    monkeypatch.setattr(sys, "argv", ["user_signs.py", str(folder)])
    runpy.run_path("scripts/user_signs.py", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    gain = "gain by scores against a student without"
    # Differences −0.02 + 0.001 of the truth and 0.06 + 0.001 of labels: a ratio of −3.2.
    assert f"| {gain} | covered value | 2 | 0% | 2 | 2 | -3.2 |" in lines
    assert f"| 1.0 | 1.0 | 15 | {gain} | 1 | 0% | 1 | 1 | -3.2 |" in lines


def test_rankers_that_differ_only_by_chance_are_no_sure_pairs(monkeypatch, capsys):
    arguments = ["label_bias.py", "--noises=0", "--seeds=0", "--requests=6"]
    monkeypatch.setattr(sys, "argv", arguments)
    script = runpy.run_path("scripts/label_bias.py")
    # Without errors of the final ranker, a share of them is nothing.
    rankers = [script["Ranker"](errors, 0.0, 0.0) for errors in (0.0, 1.0)]
    script["main"].__globals__["RANKERS"] = rankers
    script["main"]()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 0.0 | covered | 0 | 0 | 0 | 0 | 0 |",
        "| 0.0 | ips | 0 | 0 | 0 | 0 | 0 |",
        "| 0.0 | covered_truth | 0 | 0 | 0 | 0 | 0 |",
    ]
