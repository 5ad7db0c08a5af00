"""Findings prevent a dataset unless the config allows them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.findings import find, refusal
from kd_ranker.sources.logs.layout import ALLOWABLE
from kd_ranker.sources.logs.source import REFUSED
from tests.sources import faulty_logs
from tests.sources.faulty_logs import make_rows, write_log

START = 1_700_000_000


def report_of(**changes):
    """A report that says nothing against its log; `splits__test__rows=0` changes a count."""
    split = dict(first="1990-01-01 00:00:00", last="2099-12-31 23:59:59")
    split |= {"retrieved": 70, "passed": 20, "shown": 10, "positives/watch": 200, "rate/watch": 0.3}
    shares = {"retrieved": 0.0, "passed": 0.25, "shown": 1.0}
    split |= {f"coverage/watch/{stage}": share for stage, share in shares.items()}
    report = {
        "candidates": {"in_the_log": 1000, "used": 900, "rejected": 100},
        "columns": [
            {"key": "data.columns.time", "column": "t", "values": 1000, "out_of_range": 100}
        ],
        "requests": {},
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


def test_a_report_on_the_edge_says_nothing():
    assert find(report_of()) == []
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
        ({"requests__candidates_a_request": {"quantiles": {"0.5": 1}}}, "one_candidate",
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


def test_a_label_of_1_or_missing_has_advice():
    changes = {f"splits__{split}__rate/watch": 1.0 for split in ("train", "validation", "test")}
    column = {"key": "data.labels.watch", "column": "w", "values": 9, "out_of_range": 0}
    for missing, advice in ((5, True), (0, False)):
        columns = [column | {"missing": missing}]
        (found,) = find(report_of(columns=columns, **changes))
        assert ("if a missing label means 0, write it by data.sql" in found.text) == advice


def test_few_positives_of_training_are_its_own_matter():
    assert find(report_of(**{"splits__train__positives/watch": 3})) == []


def test_the_refusal_names_all_and_the_flag_that_allows_them_with_what_is_allowed_already():
    changes = {"candidates__rejected": 500, "splits__test__rate/watch": 1.0}
    found = find(report_of(**changes))
    why = refusal(found, ["times"])
    assert why.startswith("rejected: 500 of 1,000")
    assert "; one_label: every label" in why
    assert why.endswith("--config.data.allow=\"('one_label', 'rejected', 'times')\"")
    assert "rejected" not in refusal(found, ["rejected"]).partition(";")[0]
    assert refusal(found, ["rejected", "one_label"]) == ""


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


def scaled(number, by=lambda value: value):
    return lambda values: [None if value is None else by(value) * number for value in values]


def read(log, folder, allow):
    """The report of a log, or the line that refuses it and the report of that."""
    config = faulty_logs.config(log, folder, allow=allow)
    try:
        source = faulty_logs.open_source(config)
    except UserError as error:
        return str(error), json.loads((folder / REFUSED / "data_report.json").read_text())
    beside = folder / "beside"
    beside.mkdir()
    source.write_beside(beside)
    source.close()
    return "", json.loads((beside / "data_report.json").read_text())


def test_a_small_log_is_refused_and_what_is_allowed_is_a_remark(tmp_path):
    log = write_small_log(tmp_path / "log")
    line, report = read(log, tmp_path / "data", ())
    assert "\n" not in line
    assert "few_positives: positives below 100: watch has " in line
    assert "--config.data.allow=\"('few_positives',)\"; see " in line
    assert [remark for remark in report["remarks"] if remark.startswith("Refused, few_positives: ")]
    line, report = read(log, tmp_path / "other", ("few_positives", "rejected"))
    assert not line
    assert [allowed["name"] for allowed in report["allowed"]] == ["few_positives"]
    assert f"Allowed, few_positives: {report['allowed'][0]['text']}." in report["remarks"]


@pytest.mark.parametrize(
    ("scale", "unit", "hint"),
    [
        (1, "ms", "they are between 1970-01-20 and 1970-01-20; its numbers look like seconds: try "
         "--config.data.time_unit=s"),
        (1, "us", "look like seconds: try --config.data.time_unit=s"),
        (1000, "s", "are not times; its numbers look like milliseconds: try "
         "--config.data.time_unit=ms"),
        (1000, "us", "look like milliseconds: try --config.data.time_unit=ms"),
        (10**6, "ms", "look like microseconds: try --config.data.time_unit=us"),
        (10**9, "us", "its numbers look like nanoseconds: make them timestamps"),
        (7, "s", "do not look like times"),
        (7, "s", "they are between 2347-"),
    ],
)  # fmt: skip
def test_times_in_another_unit_say_what_they_look_like(tmp_path, scale, unit, hint):
    log = write_small_log(tmp_path / "log", time=scaled(scale, lambda value: value - 10**6 + START))
    config = faulty_logs.config(log, tmp_path / "data", allow=("few_positives",), time_unit=unit)
    with pytest.raises(UserError) as caught:
        faulty_logs.open_source(config)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_few_times_that_are_far_off_are_no_matter_of_units(tmp_path):
    def time(values):
        # All of a request: a part of one would be another request's.
        return [0 if value == values[0] else value - 10**6 + START for value in values]

    line, _ = read(write_small_log(tmp_path / "log", time=time), tmp_path / "data", ())
    assert "times: they are between 1970-01-01 and 2023-11-14; few_positives: " in line


def test_timestamps_of_the_wrong_unit_have_no_unit_to_try(tmp_path):
    time = scaled(1, lambda value: value - 10**6 + START)
    log = write_small_log(
        tmp_path / "log", time=lambda values: pa.array(time(values), pa.timestamp("ms"))
    )
    line, _ = read(log, tmp_path / "data", ("few_positives",))
    assert "they are between 1970-01-20 and 1970-01-20; if this is expected, add" in line


@pytest.mark.parametrize("by_request", [False, True])
@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda value: 100 * value, ": percentages? then divide by 100."),
        (
            lambda value: 10 * value - 5,
            ": logits? then take their sigmoid, or set data.teacher_signal='score'.",
        ),
    ],
)
def test_a_teacher_that_is_no_probability_says_what_it_looks_like(
    tmp_path, by_request, change, hint
):
    rows = make_rows(0, requests=60)
    for row in rows:
        for candidate in row.candidates:
            if (value := candidate["teacher_probability_watch"]) is not None:
                candidate["teacher_probability_watch"] = change(value)
    log = write_log(tmp_path / "log", rows, by_request)
    config = faulty_logs.config(
        log, tmp_path / "data", rows="request" if by_request else "candidate",
        allow=tuple({*ALLOWABLE} - {"teacher_coverage"}),
    )  # fmt: skip
    with pytest.raises(UserError, match="teacher_coverage: that of watch covers") as caught:
        faulty_logs.open_source(config)
    assert f"{hint[:-1]});" in str(caught.value)
    report = json.loads((tmp_path / "data" / REFUSED / "data_report.json").read_text())
    (remark,) = (of for of in report["remarks"] if of.startswith("data.teacher.watch: "))
    assert "of column 'teacher_probability_watch' are not in [0, 1]: " in remark
    assert remark.endswith(hint)
    assert not [of for of in report["remarks"] if of.startswith("data.teacher.like: ")]


def test_labels_of_0_and_100_are_refused(tmp_path):
    log = write_small_log(tmp_path / "log", watch=scaled(100))
    line, _ = read(log, tmp_path / "data", ("few_positives",))
    assert (
        "one_label: every label of watch in train is 0, every label of watch in validation" in line
    )
    assert "rejected: " in line
