"""Features that nearly determine a label, what was shown, or a teacher's order."""

import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import sklearn.metrics

from kd_ranker.config.defaults import feature
from kd_ranker.sources.logs import leaks
from tests.sources import faulty_logs
from tests.sources.logs.test_findings import read_source, write_small_log


def revealed(columns, answer):
    """Column -> the share of the answer's uncertainty that it removes."""
    answer = pd.Series(answer.astype(float))
    return {
        name: leaks.share_revealed(leaks.bins_of(pd.Series(values)), answer)
        for name, values in columns.items()
    }


def test_the_share_revealed_is_the_mutual_information_over_the_entropy():
    rng, number = np.random.default_rng(0), 4000
    p = rng.random(number)
    yes = rng.random(number) < p
    few = np.where(rng.random(number) < 0.7, yes, rng.integers(5, size=number))
    columns = {
        "few": few,
        "many": p,
        # Missing where the answer is no.
        "texts": [f"value {i % 7}" if y else None for i, y in enumerate(yes)],
        "noise": rng.random(number),
        # Each text occurs once, which proves nothing.
        "ids": [str(i) for i in range(number)],
    }
    found = revealed(columns, yes)
    entropy = scipy.stats.entropy([yes.mean(), 1 - yes.mean()])

    def expected(bins):
        bias = (len(np.unique(bins)) - 1) / (2 * number)
        return (sklearn.metrics.mutual_info_score(bins, yes) - bias) / entropy

    assert found["few"] == pytest.approx(expected(few))
    # 20 bins of equal numbers of rows.
    assert found["many"] == pytest.approx(expected(np.argsort(np.argsort(p)) // 200))
    assert found["texts"] > 0.99
    assert found["noise"] == found["ids"] == 0
    # Nor does a single yes.
    single = np.arange(number) == 7
    assert revealed({"same": single.astype(int), "noise": p}, single) == {"same": 0, "noise": 0}


def test_copies_of_a_teacher_have_its_order_within_requests():
    rng = np.random.default_rng(0)
    request = np.repeat(np.arange(200), 10)
    score = rng.random(2000)
    noisy = {f"noise {of}": score + of * rng.normal(size=2000) for of in (0.02, 0.1, 0.4)}
    known = np.where(np.arange(2000) % 3, score, np.nan)
    columns = {
        "logit": np.log(score / (1 - score)),
        "position": -np.round(score, 2),
        "other request": score[::-1],
        "constant": request,
        "sparse": np.where(np.arange(2000) < 29, score, np.nan),
        **noisy,
        "of request": score + 100 * request,
    }
    numbers, requests = pd.DataFrame(columns), pd.Series(request)
    found = leaks.copies_of_teachers(numbers, requests, {"teacher": pd.Series(known)})

    def expected(values):
        """Pearson's correlation of ranks less their mean, over all requests."""
        pairs = []
        for number in range(200):
            of = (request == number) & ~np.isnan(known)
            ranks = [scipy.stats.rankdata(numbers[of]) for numbers in (values, score)]
            pairs.append([each - each.mean() for each in ranks])
        return abs(np.corrcoef(*np.concatenate(pairs, axis=1))[0, 1])

    assert [expected(values) > 0.95 for values in noisy.values()] == [True, False, False]
    assert found == {
        name: {"teacher": pytest.approx(expected(columns[name]))}
        for name in ("logit", "position", "noise 0.02", "of request")
    }


def test_the_data_report_remarks_on_what_features_reveal(tmp_path):
    log = write_small_log(tmp_path / "log")
    table = pq.read_table(log / "part-0.parquet")
    watch, noise = table["watch"].to_pylist(), np.random.default_rng(0).random(table.num_rows)
    shown = np.array([stage == "shown" for stage in table["stage"].to_pylist()])
    teacher = table["teacher_probability_like"].to_pylist()
    columns = {
        "echo": pa.array([2.0 * (y or 0) + n for y, n in zip(watch, noise, strict=True)]),
        "dwell": pa.array(noise, mask=~shown),
        "cubed": pa.array([None if p is None else p**3 for p in teacher]),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    pq.write_table(table, log / "part-0.parquet")
    config = faulty_logs.config(log, tmp_path / "data", allow=("few_positives",))
    config.data.features.update(dict.fromkeys(columns, feature("candidate", "dense")))
    report = read_source(config, tmp_path)
    found = {of["name"]: [*of["reveals"]] for of in report["features"] if "reveals" in of}
    assert found == {"echo": ["label of watch"], "dwell": ["shown"], "cubed": ["teacher of like"]}
    remarks = " ".join(report["remarks"])
    assert re.search(r"'echo' reveals \d+% of the uncertainty of the label of watch", remarks)
    assert re.search(r"'dwell' reveals \d+% of which candidates were shown", remarks)
    assert (
        "'cubed' orders candidates like the teacher of like (rank correlation 1.00): is" in remarks
    )
