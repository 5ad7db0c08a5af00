import numpy as np
import pandas as pd
import pytest

from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics import ReportAt
from kd_ranker.report import tables
from kd_ranker.report.comparison import comparison
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.study import read_studies
from tests.report import sweeps

TASKS = ("watch",)
REPORT_AT = ReportAt((30,), (0.99,))


def frame_of(tmp_path, rows):
    path = tmp_path / results.FILE
    path.write_text(results.to_csv(rows, results.columns(TASKS, REPORT_AT)))
    return results.read_csv(path)


def row(mode, seed, auc, **more):
    return {
        "dataset": "d", "split": "test", "role": "student", "mode": mode, "serve": "user",
        "seed": seed, "distill_loss": None if mode == "none" else "bce",
        "distill_weight": 0.0 if mode == "none" else 1.0,
        "user_auc/watch": auc, "user_bce/watch": 0.1, "passed_for_99": 100.0 + seed, **more,
    }  # fmt: skip


def cells(text):
    return [line.split() for line in text.splitlines()]


def test_seeds_become_a_mean_and_its_standard_error(tmp_path):
    aucs = (0.61, 0.67, 0.75)
    rows = [
        {
            "dataset": "d",
            "split": "test",
            "role": "teacher",
            "serve": "user",
            "member": "teacher",
            "user_auc/watch": 0.9,
        },
        *(row("none", seed, auc) for seed, auc in enumerate(aucs)),
        row("shared", 0, 0.8),
    ]
    header, teacher, none, shared = cells(tables.summary_table(frame_of(tmp_path, rows), 30))
    assert header[:4] == ["model", "serve", "weight", "seeds"]
    assert teacher[:4] == ["teacher", "user", "1", "0.900"]
    error = np.std(aucs, ddof=1) / np.sqrt(3)
    assert none[:4] == ["none", "user", "3", f"{np.mean(aucs):.3f}±{error:.3f}"]
    # Whole requests need no digits.
    assert f"101±{1 / np.sqrt(3):.0f}" in none
    assert shared[:5] == ["shared", "user", "1", "1", "0.800"]


def test_only_rows_that_differ_in_nothing_but_the_seed_are_joined(tmp_path):
    rows = [
        row("aux", 0, 0.1),
        row("aux", 0, 0.2, serve="blend"),
        row("aux", 0, 0.3, distill_weight=2.0),
        row("aux", 0, 0.4, distill_loss="other"),
        row("aux", 0, 0.5, dataset="other"),
        row("aux", 1, 0.3),
    ]
    lines = cells(tables.summary_table(frame_of(tmp_path, rows), 30))[1:]
    assert len(lines) == 5
    assert "0.200±0.100" in lines[0]


def test_the_text_ends_with_where_the_results_lie(tmp_path):
    frame_of(tmp_path, [row("none", 0, 0.5)])
    text = tables.results_text(tmp_path, 30)
    assert text.endswith(f"results: {tmp_path / results.FILE}")


def test_what_a_sweep_varies_keeps_rows_apart_and_seeds_and_data_seeds_count(tmp_path):
    rows = [
        row("shared", seed, 0.5, temperature=temperature, data_seed=data_seed, learning_rate=0.1)
        for temperature in (1.0, 2.0)
        for seed in (0, 1)
        for data_seed in (0, 1)
    ]
    rows[0]["non_finite_step"] = 7
    frame = pd.DataFrame(rows).reindex(
        columns=[*rows[0], *set(results.columns(TASKS, REPORT_AT)).difference(rows[0])]
    )
    header, one, two = cells(tables.summary_table(frame, 30))
    # A learning rate that all have is not worth a column.
    assert header[:5] == ["model", "serve", "weight", "temperature", "seeds"]
    assert one[:5] == ["shared", "user", "1", "1", "3"]
    assert two[:5] == ["shared", "user", "1", "2", "4"]


def test_losses_that_a_sweep_varies_are_told_apart(tmp_path):
    rows = [row("none", 0, 0.5, distill_loss=None), row("shared", 0, 0.5, distill_loss="bce")]
    header, *_ = cells(tables.summary_table(frame_of(tmp_path, rows), 30))
    assert header[:3] == ["model", "serve", "weight"]
    rows.append(row("shared", 0, 0.5, distill_loss="softmax"))
    header, _, one, two = cells(tables.summary_table(frame_of(tmp_path, rows), 30))
    assert header[:4] == ["model", "serve", "weight", "loss"]
    assert one[:4] == ["shared", "user", "1", "bce"]
    assert two[:4] == ["shared", "user", "1", "softmax"]


def test_whatever_a_sweep_varies_is_told_apart_and_only_seeds_are_averaged(tmp_path):
    rows = [
        row("shared", seed, 0.5 + 0.1 * (width == 8)) | {"student.width": width}
        for width in (8, 16)
        for seed in (0, 1)
    ]
    frame = frame_of(tmp_path, rows).assign(**{"student.width": [8, 8, 16, 16]})
    header, one, two = cells(tables.summary_table(frame, 30))
    assert header[:5] == ["model", "serve", "weight", "width", "seeds"]
    assert (one[3:5], two[3:5]) == (["8", "2"], ["16", "2"])


def test_the_terminal_shows_the_test_split_and_references_by_their_names(tmp_path):
    rows = [
        row("none", 0, 0.5, split="validation"),
        row("none", 0, 0.6),
        *(row(None, 0, auc, role="reference", member=name, distill_weight=None)
          for name, auc in (("oracle", 0.9), ("random", 0.5))),
    ]  # fmt: skip
    header, *lines = cells(tables.summary_table(frame_of(tmp_path, rows), 30))
    assert header[0] == "model"
    assert [line[0] for line in lines] == ["none", "oracle", "random"]
    assert "0.600" in lines[0]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    (study,) = read_studies([sweeps.write_sweep(tmp_path_factory.mktemp("sweep"))])
    return study


def column(table, title):
    return [line[table.columns.index(title)] for line in table.lines]


def test_the_main_table_has_teacher_references_and_the_best_of_each_way_on_test(study):
    estimates = Estimates(study)
    numbers = comparison(study, estimates)
    table = tables.main_table(study, estimates, numbers)
    assert [cell.text for cell in column(table, "mode")] == [
        "oracle", "teacher", "aux", "shared", "none", "show_rate", "incumbent", "random",
    ]  # fmt: skip
    passed = column(table, "passed for 99%")
    assert [passed[at].text for at in (0, 1, 5, 6, 7)] == ["9", "10", "900", "1500", "1900"]
    # A measure that is unknown for a reference is empty.
    assert column(table, "AUC watch")[0] == ("", "", "", False)
    on_test = study.tested.loc[study.tested["mode"] == "aux", "passed_for_99"]
    assert passed[2].value == pytest.approx(on_test.mean())
    differences = tables.difference_table(study, numbers)
    assert [cell.text for cell in column(differences, "mode")] == ["aux", "shared"]
    of_none = study.tested.loc[study.tested["mode"] == "none", "passed_for_99"]
    found = column(differences, "passed for 99%")[0]
    assert found.value == pytest.approx(on_test.mean() - of_none.mean())
    assert found.text.startswith("−")


def test_rows_are_sorted_by_passed_for_99_and_those_that_need_scores_are_marked(tmp_path):
    passed = {"oracle": 5, "top_rate": 320, "show_rate": 350, "incumbent": 380, "random": 1900}
    rows = [
        sweeps.teacher_row(),
        {"mode": "none", "passed": 400},
        {"mode": "shared", "passed": 300},
        {"mode": "aux", "distill_loss": "topk:stage", "passed": 340},
        *(sweeps.reference_row(name, at) for name, at in passed.items()),
        # Unknown numbers are last.
        sweeps.reference_row("popularity", np.nan),
    ]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    estimates = Estimates(study)
    table = tables.main_table(study, estimates, comparison(study, estimates))
    cells_of = ("mode", "scores", "passed for 99%")
    found = [tuple(cell.text for cell in line) for line in zip(
        *(column(table, title) for title in cells_of), strict=True)]  # fmt: skip
    assert found == [
        ("oracle", "", "5"), ("teacher", "", "10"), ("shared", "yes", "300"),
        ("top_rate", "yes", "320"), ("aux", "no", "340"), ("show_rate", "no", "350"),
        ("incumbent", "no", "380"), ("none", "no", "400"), ("random", "", "1900"),
        ("popularity", "no", ""),
    ]  # fmt: skip


def test_the_main_table_is_made_where_nothing_reaches_99_percent(tmp_path):
    rows = [sweeps.teacher_row() | {"passed": np.nan}, {"mode": "none", "passed": np.nan},
            {"mode": "shared", "passed": np.nan}]  # fmt: skip
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    estimates = Estimates(study)
    table = tables.main_table(study, estimates, comparison(study, estimates))
    assert [cell.text for cell in column(table, "mode")] == ["teacher"]


def test_the_tuning_table_has_all_that_was_tried_and_says_what_was_chosen(study):
    table = tables.tuning_table(study)
    assert len(table.lines) == 9
    chosen = [[cell.text for cell in line[:3]] for line in table.lines if line[3].text]
    assert chosen == [["none", "user", ""], ["aux", "teacher", "1"], ["shared", "user", "1"]]
    rows = study.rows[study.rows["split"] == "validation"]
    expected = rows.groupby("setting", sort=False)["passed_for_99"].mean()
    found = [cell.value for cell in column(table, "passed for 99%")]
    assert found == pytest.approx(list(expected))
    # Of each way what was chosen is the least.
    by_mode = {line[0].text: cell for line, cell in zip(table.lines, found, strict=True)
               if line[3].text}  # fmt: skip
    assert by_mode == rows.groupby("mode").apply(
        lambda of: of.groupby("setting")["passed_for_99"].mean().min()
    ).to_dict()  # fmt: skip


def test_the_saving_table_has_a_column_a_target_and_a_line_a_cost(study):
    estimates = Estimates(study)
    table = tables.saving_table(study, estimates)
    assert table.columns == ["setting", "student's cost", "95%", "99%"]
    assert [cell.text for cell in column(table, "student's cost")][:4] == [
        "as measured", "1%", "5%", "10%",
    ]  # fmt: skip
    assert [line[0].text for line in table.lines] == [
        "aux (teacher), weight 1"] * 4 + ["shared, weight 1"] * 4  # fmt: skip
    # By hand: 2000 candidates at 5% of the teacher's cost each, and what passes at the whole cost.
    passed = study.tested.pivot(index="repeat", columns="mode", values="passed_for_95")
    costs = 2000 * 0.05 + passed
    saved = (1 - costs["shared"] / costs["none"]).mean()
    assert table.lines[6][2].value == pytest.approx(saved)
    assert table.lines[6][2].error
    # As measured, aux has heads of its own to pay for.
    flops = {"aux": 900 / 150_000, "none": 800 / 150_000}
    costs = {mode: 2000 * of + passed[mode] for mode, of in flops.items()}
    assert table.lines[0][2].value == pytest.approx((1 - costs["aux"] / costs["none"]).mean())


def test_the_cost_table_has_what_99_percent_takes_and_what_users_have_then(study):
    table = tables.cost_table(study, Estimates(study))
    assert [line[0].text for line in table.lines] == [
        "teacher alone", "none", "aux (teacher), weight 1", "shared, weight 1",
    ]  # fmt: skip
    rows = study.tested[study.tested["mode"] == "shared"]
    cost = column(table, "funnel's cost (%)")
    assert cost[0].text == "100%"
    passed = rows["passed_for_99"].mean()
    assert cost[3].value == pytest.approx(100 * (passed / 2000 + 800 / 150_000))
    assert column(table, "FLOPs a candidate")[0].text == "150,000"
    # Its true value is all but the same curve: 0.02 more of what is 1.02 in the end.
    assert column(table, "true value for 99%")[3].value == pytest.approx(
        (0.99 + 0.02) / 1.02, abs=1e-3
    )
    assert len(table.notes) == 2
    # 128 candidates of 150,000 FLOPs, and three times that of 900.
    assert "scores 128 candidates of each request" in table.notes[1]
    assert "1.92e+07 FLOPs a request, 56 times the 3.46e+05 of a student" in table.notes[1]


def test_costs_of_ones_own_are_what_is_counted(tmp_path):
    costs = {"costs.teacher.candidate": 3.0, "costs.teacher.request": 500.0,
             "costs.student.candidate": 0.1}  # fmt: skip
    (study,) = read_studies([sweeps.write_sweep(tmp_path, changes=costs)])
    estimates = Estimates(study)
    table = tables.cost_table(study, estimates)
    passed = study.tested.pivot(index="repeat", columns="mode", values="passed_for_99")
    each = 500 + 2000 * 0.1 + 3 * passed
    share = 100 * each["aux"].mean() / (500 + 2000 * 3)
    assert column(table, "funnel's cost (%)")[2].value == pytest.approx(share)
    assert "in the units of costs" in table.notes[0]
    saved = tables.saving_table(study, estimates)
    saving = (1 - each["aux"] / each["none"]).mean()
    assert column(saved, "99%")[0].value == pytest.approx(saving)
    rows = study.tested[study.tested["mode"] == "aux"]
    assert rows["funnel_cost_saving"].mean() == pytest.approx(saving)
    # What if a student cost 5%: of the teacher's candidate, whatever the config says of students.
    each = 500 + 2000 * 0.05 * 3 + 3 * passed
    assert column(saved, "99%")[2].value == pytest.approx((1 - each["aux"] / each["none"]).mean())
    assert "in the units of costs" in saved.notes[0]


def test_without_a_baseline_there_is_neither_difference_nor_saving(tmp_path):
    sweeps.write_sweep(tmp_path, modes=("aux", "shared"))
    sweeps.change(tmp_path, lambda frame: frame[frame["role"] != "reference"])
    (study,) = read_studies([tmp_path])
    estimates = Estimates(study)
    assert tables.saving_table(study, estimates) is None
    assert tables.difference_table(study, comparison(study, estimates)) is None
