"""The tables of runs: their columns, choices and savings worked by hand, their files."""

import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from kd_ranker import manifest
from kd_ranker.config import schema
from kd_ranker.configs import cascade
from kd_ranker.errors import UserError
from kd_ranker.evaluation import request_files, results, setting_names
from kd_ranker.evaluation.evaluate import PerRequest
from kd_ranker.evaluation.metrics.metric import ReportAt
from kd_ranker.evaluation.request_files import PerRequestByRanker
from tests.sweeps import needs_scores

TASKS = ("watch", "like")


def test_the_columns_are_the_contracts_in_its_order():
    columns = results.columns(TASKS, ReportAt((10, 50), (0.99, 0.995)))
    contract = [
        *results.KEYS, *setting_names.OTHER_KEYS,
        "user_bce/watch", "user_bce/like", "user_auc/watch", "user_calibration/watch",
        "teacher_bce/watch", "teacher_kl/like", "alignment_ratio", "alignment_ratio_bce",
        "survival@10", "survival@50", "value_captured@10", "true_value_captured@50",
        "hit_rate@10/watch", "hit_rate@10/like", "hit_rate@50/watch", "end_to_end_hit_rate@10/like",
        "teacher_ndcg", "teacher_tau", "passed_for_99", "passed_for_99.5", "flops_per_candidate",
        "cost_ratio", "funnel_cost_saving", "non_finite_step", "run",
    ]  # fmt: skip
    assert [column for column in columns if column in contract] == contract
    assert {key.title for key in schema.sweepable()} <= set(columns)
    assert len(set(columns)) == len(columns)


def test_unknown_numbers_are_empty_fields(tmp_path):
    rows = [
        {"mode": "", "seed": None, "step": None, "alignment_ratio": math.nan},
        {"mode": "none", "seed": 0, "step": 20, "alignment_ratio": 1 / 3},
    ]
    text = results.to_csv(rows, ["mode", "seed", "step", "alignment_ratio", "absent"])
    assert text == "mode,seed,step,alignment_ratio,absent\n,,,,\nnone,0,20,0.3333333,\n"
    path = tmp_path / results.FILE
    path.write_text(text)
    frame = results.read_csv(path)
    assert frame["mode"].tolist()[1] == "none"
    assert math.isnan(frame["alignment_ratio"][0])
    assert frame["alignment_ratio"][1] == pytest.approx(1 / 3)
    assert pd.isna(frame["absent"]).all()


@pytest.mark.parametrize(
    ("mode", "loss", "expected"),
    [
        ("aux", "softmax:scores", "softmax"),
        ("aux", "topk:stage+2*bce", "topk:stage + 2 * bce"),
        ("none", "softmax", None),
    ],
)
def test_a_row_has_the_terms_of_the_loss(mode, loss, expected):
    config = cascade("small")
    config.distill.mode = mode
    config.distill.loss = loss
    assert setting_names.setting_of(config)["distill_loss"] == expected


def row(role, mode, seed, passed, flops, **more):
    distilled = mode not in (None, "", "none")
    loss = "bce" if distilled else None
    return dict.fromkeys(setting_names.OTHER_KEYS) | {
        "dataset": "d", "split": "validation", "role": role, "mode": mode, "seed": seed,
        "passed_for_99": passed, "non_finite_step": None, "run": f"{mode}-seed{seed}",
        "flops_per_candidate": flops, "learning_rate": 0.01, "data_seed": 0, "serve": "user",
        "distill_loss": loss, "distill_weight": float(distilled),
        "needs_scores": needs_scores(role, loss),
        "temperature": 1.0 if distilled else None, "candidates": 2000.0,
        "user_loss": "bce" if mode else None, "unshown_weight": 0.0 if mode else None,
        "scored_for_99": passed, **more,
    }  # fmt: skip


NAN = math.nan


def test_savings_worked_by_hand():
    small = {"candidates": 11.0, "data_seed": 5}
    rows_and_savings = [
        (row("teacher", None, 0, 10.0, 200.0), NAN),
        # 2000 · 10 + 200 · 200 = 60,000
        (row("student", "none", 0, 200.0, 10.0), 0),
        # 2000 · 10 + 125 · 200 = 45,000: a quarter less, whatever its learning rate
        (row("student", "shared", 0, 125.0, 10.0), 0.25),
        (row("student", "shared", 0, 125.0, 10.0, learning_rate=0.02), 0.25),
        # 2000 · 12 + 240 · 200 = 72,000: a fifth more
        (row("student", "aux", 0, 240.0, 12.0), -0.2),
        # The baseline of its own seed: 2000 · 10 + 400 · 200 = 100,000
        (row("student", "none", 1, 400.0, 10.0), 0),
        (row("student", "shared", 1, 200.0, 10.0), 0.4),
        # No baseline of this seed, of this order of the data.
        (row("student", "shared", 2, 200.0, 10.0), NAN),
        (row("student", "shared", 0, 200.0, 10.0, data_seed=1), NAN),
        # It never captures 99 percent.
        (row("student", "aux", 0, NAN, 10.0, learning_rate=0.03), NAN),
        # It diverged, so it is no baseline either.
        (row("student", "none", 0, 1.0, 10.0, learning_rate=0.1, non_finite_step=7.0), NAN),
        # The final ranker scores no more than a request has, of 11 candidates on average:
        # 11 · 10 + 8 · 200 = 1,710 and 11 · 10 + 6 · 200 = 1,310.
        (row("student", "none", 0, 90.0, 10.0, scored_for_99=8.0, **small), 0),
        (row("student", "shared", 0, 30.0, 10.0, scored_for_99=6.0, **small), 1 - 1310 / 1710),
    ]
    rows, savings = zip(*rows_and_savings, strict=True)
    found = results.fill_savings(pd.DataFrame(rows))["funnel_cost_saving"]
    assert found.tolist() == pytest.approx(list(savings), nan_ok=True)


def write_tables(folder, rows, columns):
    folder.mkdir(parents=True)
    (folder / results.FILE).write_text(results.to_csv(rows, columns))
    curves = [{"run": row["run"], "k": 1, "survival": 1 / 3} for row in rows]
    (folder / results.CURVES_FILE).write_text(results.to_csv(curves, results.curves_columns(TASKS)))
    (folder / results.CALIBRATION_FILE).write_text("run\n")
    return folder


def test_runs_are_joined_as_they_were_written(tmp_path):
    columns = results.columns(TASKS, ReportAt((10,), (0.99,)))
    teacher = row("teacher", None, 0, 10.0, 200.0, run="teacher")
    none = row("student", "none", 0, 200.0, 10.0, run="none-seed0")
    shared = row("student", "shared", 0, 125.0, 10.0, run="shared", step=7)
    aux = row("student", "aux", 0, 240.0, 12.0, run="aux")
    on_test = {"split": "test"}
    # Of the second run only shared was chosen, and references are measured beside the first.
    random = row("reference", None, 0, 900.0, 0.0, run="random", split="test")
    tested = [[teacher | on_test, none | on_test, random], [teacher | on_test, shared | on_test]]
    validation = [
        write_tables(tmp_path / "validation" / "0", [teacher, none], columns),
        write_tables(tmp_path / "validation" / "1", [teacher, shared, aux], columns),
    ]
    test = [
        write_tables(tmp_path / "test" / "0", tested[0], columns),
        write_tables(tmp_path / "test" / "1", tested[1], columns),
    ]

    joined = results.join(validation, test)

    expected = [teacher, none, shared, aux, *tested[0], shared | on_test]
    savings = [NAN, 0.0, 0.25, -0.2, NAN, 0.0, NAN, 0.25]
    filled = [
        row | {"funnel_cost_saving": saving, "saving_over_none": saving}
        for row, saving in zip(expected, savings, strict=True)
    ]
    assert joined[results.FILE] == results.to_csv(filled, columns)
    # The other tables are those of the test split.
    assert [line.split(",")[0] for line in joined[results.CURVES_FILE].splitlines()] == [
        "run", "teacher", "none-seed0", "random", "shared",
    ]  # fmt: skip


def labeled(*rows):
    frame = setting_names.with_labels(pd.DataFrame(rows))
    return frame.sort_index()


def test_settings_methods_and_repeats_are_named_by_their_keys():
    first = row("student", "shared", 0, 1.0, 10.0) | {"student.width": 8, "train.steps": 50}
    # Seeds that agree in six digits are different ones.
    same_setting = [{"seed": 20240101}, {"seed": 20240102}, {"data_seed": 1}]
    same_method = [
        {"distill_weight": 3.0}, {"temperature": 2.0}, {"learning_rate": 0.1}, {"train.steps": 9},
        {"serve": "other"}, {"train.steps": None},
    ]  # fmt: skip
    another_method = [
        {"mode": "aux"}, {"distill_loss": "topk"}, {"student.width": 16}, {"user_loss": "softmax"},
        {"unshown_weight": 0.1}, {"student.item_rows": 1048576}, {"student.item_rows": 1048583},
    ]  # fmt: skip
    changes = [*same_setting, *same_method, *another_method]

    frame = labeled(first, *(first | change for change in changes))

    settings = frame["setting"].tolist()
    assert settings[:4] == [settings[0]] * 4
    assert len(set(settings)) == 1 + len(same_method) + len(another_method)
    methods = frame["method"].tolist()
    assert methods[:10] == [methods[0]] * 10
    assert len(set(methods)) == 1 + len(another_method)
    assert frame["repeat"].nunique() == 4


def student(mode, seed, passed, serve="user", rate=0.01):
    more = {"serve": serve, "learning_rate": rate, "run": f"{mode}-rate{rate}-seed{seed}"}
    return row("student", mode, seed, passed, 10.0, **more)


RANKERS = pd.DataFrame(
    [
        row("teacher", None, 0, 10.0, 200.0, run="teacher"),
        row("reference", None, 0, 1.0, 0.0, run="oracle"),
        *(student("none", seed, 200.0 + seed) for seed in (0, 1)),
        *(student("none", seed, 190.0, rate=0.1) for seed in (0, 1)),
        *(student("aux", seed, 50.0, serve) for seed in (0, 1) for serve in ("user", "teacher")),
        *(student("aux", seed, 41.0 - seed, "blend") for seed in (0, 1)),
        # The best by far, of which a run diverged.
        student("shared", 0, 10.0, rate=0.1),
        student("shared", 1, math.nan, rate=0.1) | {"non_finite_step": 7.0},
        *(student("shared", seed, 90.0) for seed in (0, 1)),
    ]
)


def test_the_runs_of_the_chosen_settings_with_the_heads_to_read():
    heads = {"aux-rate0.01": "blend", "none-rate0.1": "user", "shared-rate0.01": "user"}
    chosen = {f"{name}-seed{seed}": [head] for name, head in heads.items() for seed in (0, 1)}
    test = RANKERS[RANKERS["learning_rate"] != 0.1].assign(split="test", passed_for_99=1.0)
    # Whatever the test says.
    for frame in (RANKERS, pd.concat([RANKERS, test])):
        assert setting_names.chosen(frame) == chosen
    assert setting_names.chosen(RANKERS.assign(non_finite_step=7.0)) == {}
    # Of equals the first in the order of settings, not of the file.
    equals = RANKERS[RANKERS["mode"] == "aux"].assign(passed_for_99=100.0)
    assert setting_names.chosen(equals) == setting_names.chosen(equals[::-1])


def test_the_best_run_is_the_best_repeat_of_the_best_setting():
    test = pd.DataFrame([student("none", 0, 1.0) | {"split": "test"}])
    # Whatever the test says.
    for frame in (RANKERS, pd.concat([RANKERS, test])):
        assert setting_names.best_run(frame) == ("aux-rate0.01-seed1", "blend")
    named = {"aux-rate0.01-seed0": "blend", "none-rate0.1-seed1": "user"}
    for name, serve in named.items():
        assert setting_names.best_run(RANKERS, name) == (name, serve)
    # It diverged, or was never measured.
    for name in ("shared-rate0.1-seed1", "shared-seed9"):
        assert setting_names.best_run(RANKERS, name) is None


MADE_OF = {"config": "a"}


def test_tables_are_known_by_their_rankers_and_their_bytes(tmp_path):
    tables = {results.CURVES_FILE: "k\n1\n", results.FILE: "m\n2\n"}
    results.write_tables(tmp_path, tables, MADE_OF)
    assert (tmp_path / results.FILE).read_text() == "m\n2\n"
    assert manifest.has_provenance(tmp_path, MADE_OF)
    assert not manifest.has_provenance(tmp_path, {"config": "b"})
    assert manifest.has_provenance(tmp_path)
    (tmp_path / results.CURVES_FILE).write_text("k\n3\n")
    assert not manifest.has_provenance(tmp_path, MADE_OF)
    assert not manifest.has_provenance(tmp_path)
    with pytest.raises(UserError, match=f"{results.CURVES_FILE} has changed; again"):
        manifest.check(tmp_path, "again")

    class Dying(dict):
        def items(self):
            yield results.FILE, "m\n3\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.write_tables(tmp_path, Dying(), MADE_OF)
    assert not manifest.has_provenance(tmp_path, MADE_OF)
    with pytest.raises(UserError, match="is not finished; again"):
        manifest.check(tmp_path, "again")


def each_of(seed, requests, ks, tasks):
    def draw(*shape):
        return generator.normal(size=shape).astype(np.float32)

    generator = np.random.default_rng(seed)
    single = {"user_bce": draw(requests, tasks), "requests": np.ones(requests, np.float32)}
    single["requests"][0] = np.nan
    return PerRequest(
        single, {"survival": draw(requests, ks), "positives_kept": draw(requests, ks, tasks)}
    )


@pytest.mark.parametrize(
    ("requests", "ks", "tasks"),
    # The last have as many k as tasks, and as requests.
    [(5, (1, 4, 9), TASKS), (1, (1, 4), TASKS[:1]), (2, (1, 9), TASKS), (1, (1,), TASKS[:1])],
)
def test_terms_of_requests_are_read_as_they_were_written(tmp_path, requests, ks, tasks):
    rankers = [("teacher", "user"), ("aux-seed0", "user"), ("aux-seed0", "blend"), ("", "user")]
    each = {who: each_of(i, requests, len(ks), len(tasks)) for i, who in enumerate(rankers)}
    files = request_files.request_files(PerRequestByRanker(np.array(ks), each), tasks)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = request_files.read_requests(tmp_path)
    np.testing.assert_array_equal(found.ks, ks)
    assert list(found.each) == rankers
    for ranker, written in each.items():
        for arrays, arrays_read in zip(written, found.each[ranker], strict=True):
            assert {array.dtype for array in arrays_read.values()} == {np.dtype(np.float32)}
            np.testing.assert_equal(arrays_read, arrays)
    # Others read them as tables.
    table = pq.read_table(tmp_path / request_files.REQUEST_CURVES_FILE).to_pandas()
    columns = [f"positives_kept/{task}" for task in tasks]
    assert list(table) == ["run", "serve", "request", "k", "survival", *columns]
    rows = table[(table["serve"] == "blend") & (table["k"] == ks[-1])].sort_values("request")
    expected = each["aux-seed0", "blend"].curves["positives_kept"][:, -1]
    np.testing.assert_array_equal(rows[columns], expected)


def test_curves_are_kept_at_few_k_with_the_named_ones():
    ks = request_files.spaced_ks(2000, [200, 333, 5000])
    assert {1, 200, 333, 2000} <= set(ks)
    assert ks == sorted(ks)
    assert len(ks) < 80
    # Small steps: a line between two of them is near the curve.
    assert (np.array(ks[11:]) / ks[10:-1]).max() < 1.2
    assert request_files.spaced_ks(5, [200]) == [1, 2, 3, 4, 5]
