"""Features that tell nearly alone what a ranker is to foretell."""

import json
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import sklearn.metrics

from kd_ranker.config.features import feature
from kd_ranker.sources.logs import leaks
from tests.sources import faulty_logs
from tests.sources.logs.test_findings import write_small_log


def told(columns, answer):
    """Column -> the share of the answer's uncertainty that it removes."""
    table = pd.DataFrame(columns)
    return {
        name: leaks.share_revealed(leaks.bins_of(table[name]), table[answer].astype(float))
        for name in columns
        if name != answer
    }


def test_the_share_revealed_is_the_mutual_information_over_the_entropy():
    rng = np.random.default_rng(0)
    p, number = rng.random(4000), 4000
    yes = rng.random(number) < p
    few = np.where(rng.random(number) < 0.7, yes, rng.integers(5, size=number))
    columns = {
        "few": few,
        "many": p,
        "texts": [f"value {i % 7}" if y else None for i, y in enumerate(yes)],
        "noise": rng.random(number),
        "ids": [str(i) for i in range(number)],
        "yes": yes.astype(np.int8),
    }
    found = told(columns, "yes")
    base = yes.mean()
    entropy = -(base * np.log(base) + (1 - base) * np.log(1 - base))

    def expected(bins):
        bias = (len(np.unique(bins)) - 1) / (2 * number)
        return (sklearn.metrics.mutual_info_score(bins, yes) - bias) / entropy

    assert found["few"] == pytest.approx(expected(few))
    # 20 bins of equal numbers of rows.
    assert found["many"] == pytest.approx(expected(np.argsort(np.argsort(p)) // 200))
    # A value is missing where the answer is no.
    assert found["texts"] > 0.99
    assert found["noise"] == 0
    # Each text is met once: of that, nothing is known.
    assert found["ids"] == 0


def test_a_single_yes_proves_nothing():
    rng = np.random.default_rng(0)
    yes = np.arange(3000) == 7
    columns = {"same": yes.astype(int), "noise": rng.random(3000), "yes": yes.astype(np.int8)}
    assert told(columns, "yes") == {"same": 0, "noise": 0}


def test_copies_of_a_teacher_are_those_of_the_same_order_within_requests():
    rng = np.random.default_rng(0)
    request = np.repeat(np.arange(200), 10)
    score = rng.random(2000)
    noisy = {f"noise {of}": score + of * rng.normal(size=2000) for of in (0.02, 0.1, 0.4)}
    columns = {
        "request": request,
        "score": np.where(np.arange(2000) % 3, score, np.nan),
        "logit": np.log(score / (1 - score)),
        "position": -np.round(score, 2),
        "other request": score[::-1],
        "constant": request,
        "sparse": np.where(np.arange(2000) < 29, score, np.nan),
        **noisy,
        "of request": score + 100 * request,
    }
    table = pd.DataFrame(columns)
    numbers = table.drop(columns=["request", "score"])
    found = leaks.copies_of_teachers(numbers, table["request"], {"teacher": table["score"]})

    def expected(values):
        """Pearson's correlation of ranks less their mean, over all requests."""
        pairs = []
        for number in range(200):
            of = (request == number) & ~np.isnan(columns["score"])
            ranks = [scipy.stats.rankdata(numbers[of]) for numbers in (values, score)]
            pairs.append([each - each.mean() for each in ranks])
        return abs(np.corrcoef(*np.concatenate(pairs, axis=1))[0, 1])

    assert [expected(values) > 0.95 for values in noisy.values()] == [True, False, False]
    assert found == {
        name: {"teacher": pytest.approx(expected(columns[name]))}
        for name in ("logit", "position", "noise 0.02", "of request")
    }


def test_the_data_report_remarks_on_features_that_tell_a_label_or_what_was_shown(tmp_path):
    log = write_small_log(tmp_path / "log")
    table = pq.read_table(log / "part-0.parquet")
    watch, noise = table["watch"].to_pylist(), np.random.default_rng(0).random(table.num_rows)
    shown = np.array([stage == "shown" for stage in table["stage"].to_pylist()])
    table = table.append_column(
        "echo", pa.array([2.0 * (y or 0) + n for y, n in zip(watch, noise, strict=True)])
    )
    table = table.append_column("dwell", pa.array(noise, mask=~shown))
    teacher = [None if p is None else p**3 for p in table["teacher_probability_like"].to_pylist()]
    table = table.append_column("cubed", pa.array(teacher))
    pq.write_table(table, log / "part-0.parquet")
    config = faulty_logs.config(log, tmp_path / "data", allow=("few_positives",))
    config.data.features.echo = feature("candidate", "dense")
    config.data.features.dwell = feature("candidate", "dense")
    config.data.features.cubed = feature("candidate", "dense")
    source = faulty_logs.open_source(config)
    source.write_beside(tmp_path)
    source.close()
    report = json.loads((tmp_path / "data_report.json").read_text())
    leaks = {of["name"]: of["reveals"] for of in report["features"] if "reveals" in of}
    assert {name: list(of) for name, of in leaks.items()} == {
        "echo": ["label of watch"],
        "dwell": ["shown"],
        "cubed": ["teacher of like"],
    }
    remarks = " ".join(report["remarks"])
    assert re.search(r"'echo' reveals \d+% of the uncertainty of the label of watch", remarks)
    assert re.search(r"'dwell' reveals \d+% of which candidates were shown", remarks)
    assert (
        "'cubed' orders candidates like the teacher of like (rank correlation 1.00): is" in remarks
    )
