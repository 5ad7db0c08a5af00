"""Findings prevent a dataset unless the config allows them; features may reveal a label."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import sklearn.metrics

from kd_ranker.config.defaults import feature
from kd_ranker.errors import UserError
from kd_ranker.sources.logs.findings import (
    bins_of,
    copies_of_teachers,
    find,
    refusal,
    share_revealed,
    time_hint,
)
from kd_ranker.sources.logs.layout import ALLOWABLE
from kd_ranker.sources.logs.source import REFUSED
from tests.sources import faulty_logs
from tests.sources.faulty_logs import make_rows, write_log

START = 1_700_000_000


def report_of(**changes):
    """A report without findings; `splits__test__rows=0` changes a count."""
    split = dict(first="1990-01-01 00:00:00", last="2099-12-31 23:59:59")
    split |= {"retrieved": 70, "passed": 20, "shown": 10, "positives/watch": 200, "rate/watch": 0.3}
    shares = {"retrieved": 0.0, "passed": 0.25, "shown": 1.0}
    split |= {f"coverage/watch/{stage}": share for stage, share in shares.items()}
    report = {
        "candidates": {"in_the_log": 1000, "used": 900, "rejected": 100},
        "columns": [
            {"key": "data.columns.time", "column": "t", "values": 1000, "out_of_range": 100}
        ],
        "requests": {"candidates": {"0.5": 2}},
        "splits": {of: dict(split) for of in ("train", "validation", "test")},
        "tasks": ["watch"],
        "teacher": {"tasks": ["watch"]},
    }
    for path, value in changes.items():
        *parts, last = path.split("__")
        section = report
        for part in parts:
            section = section[int(part) if part.isdigit() else part]
        section[last] = value
    return report


@pytest.mark.parametrize("changes", [{}, {"splits__train__positives/watch": 3}])
def test_a_report_on_the_edge_has_no_finding(changes):
    assert find(report_of(**changes)) == []
    assert refusal([], ()) == ""


@pytest.mark.parametrize(
    ("changes", "name", "text"),
    [
        ({"candidates__rejected": 101}, "rejected", "101 of 1,000 candidates (10.1%) are rej"),
        ({"columns__0__out_of_range": 101}, "times", "101 of 1,000 values of column 't' are not t"),
        ({"splits__test__last": "2100-01-01 00:00:00"}, "times", "1990-01-01 and 2100-01-01"),
        ({"splits__train__first": "1970-01-20 17:00:00"}, "times", "1970-01-20 and 2099-12-31"),
        ({"splits__test__last": "33658-09-27 01:46:40"}, "times", "and 33658-09-27"),
        ({"splits__train__rate/watch": 0.0}, "one_label", "every label of watch in train is 0"),
        ({"splits__test__rate/watch": 1.0}, "one_label", "every label of watch in test is 1"),
        ({"splits__test__rate/watch": None}, "one_label", "no label of watch in test"),
        ({"requests__candidates": {"0.5": 1}}, "one_candidate",
         "half of the requests have one candidate, which leaves nothing to rank"),
        ({"splits__test__positives/watch": 99}, "few_positives", "below 100: watch has 99 in test"),
        ({"splits__validation__positives/watch": 4}, "few_positives", "watch has 4 in validation"),
        ({"splits__test__coverage/watch/passed": 0.24}, "teacher_coverage",
         "that of watch covers 49.3% of the passed candidates in test"),
        ({"splits__test__coverage/watch/shown": None}, "teacher_coverage", "covers 16.7%"),
    ],
)  # fmt: skip
def test_each_finding_has_its_name_and_its_numbers(changes, name, text):
    (found,) = find(report_of(**changes))
    assert found.name == name
    assert text in found.text


@pytest.mark.parametrize("missing", [5, 0])
def test_a_label_of_1_or_missing_has_advice(missing):
    changes = {f"splits__{split}__rate/watch": 1.0 for split in ("train", "validation", "test")}
    column = {"key": "data.labels.watch", "column": "w", "values": 9, "out_of_range": 0}
    (found,) = find(report_of(columns=[column | {"missing": missing}], **changes))
    assert ("if a missing label means 0, write it by data.sql" in found.text) == bool(missing)


def test_the_refusal_names_all_and_the_flag_that_allows_them_with_what_is_allowed_already():
    changes = {"candidates__rejected": 500, "splits__test__rate/watch": 1.0}
    found = find(report_of(**changes))
    why = refusal(found, ["times"])
    assert why.startswith("rejected: 500 of 1,000")
    assert "; one_label: every label" in why
    assert why.endswith("--config.data.allow=\"('one_label', 'rejected', 'times')\"")
    assert "rejected" not in refusal(found, ["rejected"]).partition(";")[0]
    assert refusal(found, ["rejected", "one_label"]) == ""


@pytest.mark.parametrize(
    ("scale", "per_second", "hint"),
    [
        (1, 1, ""),
        (1, 1000, "; its numbers look like seconds: try --config.data.time_unit=s"),
        (1000, 1, "; its numbers look like milliseconds: try --config.data.time_unit=ms"),
        (10**6, 1000, "; its numbers look like microseconds: try --config.data.time_unit=us"),
        (10**9, 10**6, "; its numbers look like nanoseconds: make them timestamps"),
        (7, 1, "; its numbers, such as 1.19e+10, do not look like times"),
    ],
)
def test_numbers_of_times_in_another_unit_look_like_it(scale, per_second, hint):
    numbers = np.full(3, float(START * scale))
    assert time_hint(numbers, SimpleNamespace(units_per_second=per_second)) == hint
    assert time_hint(numbers[:0], SimpleNamespace(units_per_second=per_second)) == ""


def write_small_log(folder, **columns):
    """A log of `make_rows`, in the present, with other values in some columns."""
    write_log(folder, make_rows(0, requests=60))
    table = pq.read_table(folder / "part-0.parquet")
    # 60 requests, a minute each.
    columns = {"time": lambda values: [value - 10**6 + START for value in values]} | columns
    for name, change in columns.items():
        place = table.schema.get_field_index(name)
        values = pa.array(change(table[name].to_pylist()))
        table = table.set_column(place, name, values)
    pq.write_table(table, folder / "part-0.parquet")
    return folder


def read_source(config, folder):
    """The data report of a log."""
    source = faulty_logs.open_source(config)
    source.write_beside(folder)
    source.close()
    return json.loads((folder / "data_report.json").read_text())


def read(log, folder, allow, **data):
    """The report of a log, or the line that refuses it and the report of that."""
    config = faulty_logs.config(log, folder, allow=allow, **data)
    try:
        folder.mkdir()
        return "", read_source(config, folder)
    except UserError as error:
        return str(error), json.loads((folder / REFUSED / "data_report.json").read_text())


def test_a_small_log_is_refused_and_what_is_allowed_is_a_remark(tmp_path):
    log = write_small_log(tmp_path / "log")
    line, report = read(log, tmp_path / "data", ())
    assert "few_positives: positives below 100: watch has " in line
    assert "--config.data.allow=\"('few_positives',)\"; see " in line
    assert [remark for remark in report["remarks"] if remark.startswith("Refused, few_positives: ")]
    line, report = read(log, tmp_path / "other", ("few_positives", "rejected"))
    assert not line
    assert [allowed["name"] for allowed in report["allowed"]] == ["few_positives"]
    assert f"Allowed, few_positives: {report['allowed'][0]['text']}." in report["remarks"]


def in_milliseconds(values):
    return [1000 * (value - 10**6 + START) for value in values]


def first_request_in_1970(values):
    # All rows of a request: a part of them would be another request.
    return [0 if value == values[0] else value - 10**6 + START for value in values]


@pytest.mark.parametrize(
    ("column", "change", "line"),
    [
        ("time", in_milliseconds, "are not times; its numbers look like milliseconds: try "),
        ("time", first_request_in_1970, "between 1970-01-01 and 2023-11-14; if this is exp"),
        # A timestamp has no unit to try.
        ("time", lambda of: pa.array([x // 1000 for x in in_milliseconds(of)], pa.timestamp("ms")),
         "they are between 1970-01-20 and 1970-01-20; if this is expected, add"),
        ("watch", lambda of: [y and 100 * y for y in of],
         "one_label: every label of watch in train is 0, every label of watch in validation"),
    ],
)  # fmt: skip
def test_a_column_in_another_unit_is_refused(tmp_path, column, change, line):
    log = write_small_log(tmp_path / "log", **{column: change})
    found, _ = read(log, tmp_path / "data", ("few_positives",))
    assert line in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("by_request", "scale", "shift", "hint"),
    [
        (False, 100, 0, ": percentages? then divide by 100."),
        (True, 10, 5, ": logits? then take their sigmoid, or set data.teacher_signal='score'."),
    ],
)
def test_a_teacher_that_is_no_probability_has_a_hint(tmp_path, by_request, scale, shift, hint):
    rows = make_rows(0, requests=60)
    for candidate in (candidate for row in rows for candidate in row.candidates):
        if (value := candidate["teacher_probability_watch"]) is not None:
            candidate["teacher_probability_watch"] = scale * value - shift
    log = write_log(tmp_path / "log", rows, by_request)
    allow = tuple({*ALLOWABLE} - {"teacher_coverage"})
    layout = "request" if by_request else "candidate"
    line, report = read(log, tmp_path / "data", allow, rows=layout)
    assert "teacher_coverage: that of watch covers" in line
    assert f"{hint[:-1]});" in line
    (remark,) = (of for of in report["remarks"] if of.startswith("data.teacher.watch: "))
    assert "of column 'teacher_probability_watch' are not in [0, 1]: " in remark
    assert remark.endswith(hint)
    assert not [of for of in report["remarks"] if of.startswith("data.teacher.like: ")]


def revealed(columns, answer):
    """Column -> the share of the answer's uncertainty that it removes."""
    answer = pd.Series(answer.astype(float))
    return {
        name: share_revealed(bins_of(pd.Series(values)), answer) for name, values in columns.items()
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
    found = copies_of_teachers(numbers, requests, {"teacher": pd.Series(known)})

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
