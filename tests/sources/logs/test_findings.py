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
    find,
    rank_correlations,
    refusal,
    share_revealed,
    time_hint,
)
from kd_ranker.sources.logs.layout import ALLOWABLE
from kd_ranker.sources.logs.verdict import REFUSED
from kd_ranker.sources.logs.written_after import known_ratio, share_shown_first
from tests.sources import faulty_logs
from tests.sources.faulty_logs import make_rows, write_log

START = 1_700_000_000
IN_ALL_SPLITS = {f"splits__{of}__rate/watch": 1.0 for of in ("train", "validation", "test")}


def report_of(**changes):
    """A report without findings; `splits__test__rows=0` changes a count."""
    split = dict(first="1990-01-01 00:00:00", last="2099-12-31 23:59:59")
    split |= {"retrieved": 70, "passed": 20, "shown": 10, "positives/watch": 100, "rate/watch": 0.3}
    shares = {"retrieved": 0.0, "passed": 0.25, "shown": 1.0}
    split |= {f"coverage/watch/{stage}": share for stage, share in shares.items()}
    time = {"key": "data.columns.time", "column": "t", "values": 1000, "out_of_range": 100}
    label = {"key": "data.labels.watch", "column": "w", "values": 9, "out_of_range": 0}
    report = {
        "candidates": {"in_the_log": 1000, "used": 900, "rejected": 100},
        "columns": [time, label | {"missing": 5}],
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


@pytest.mark.parametrize(
    ("changes", "name", "text"),
    [
        ({}, "", ""),
        ({"candidates__rejected": 101}, "rejected", "101 of 1,000 candidates (10.1%) are rej"),
        ({"columns__0__out_of_range": 101}, "times", "101 of 1,000 values of column 't' are not t"),
        ({"splits__test__last": "2100-01-01 00:00:00"}, "times", "1990-01-01 and 2100-01-01"),
        ({"splits__train__first": "1970-01-20 17:00:00"}, "times", "1970-01-20 and 2099-12-31"),
        ({"splits__train__rate/watch": 0.0}, "one_label", "every label of watch in train is 0"),
        ({"splits__test__rate/watch": 1.0}, "one_label", "every label of watch in test is 1"),
        ({"splits__test__rate/watch": None}, "one_label", "no label of watch in test"),
        (IN_ALL_SPLITS, "one_label", "if a missing label means 0, write it by data.sql"),
        ({"requests__candidates": {"0.5": 1}}, "one_candidate",
         "half of the requests have one candidate, which leaves nothing to rank"),
        ({"splits__test__positives/watch": 99}, "few_positives",
         "99 of 100 needed positives of watch in test"),
        ({"splits__test__coverage/watch/passed": 0.24}, "teacher_coverage",
         "that of watch covers 49.3% of the passed candidates in test"),
        ({"splits__train__lowest/watch": 0.5, "splits__train__highest/watch": 0.5},
         "constant_teacher", "that of watch is 0.5 for every candidate in train: it orders"),
        ({"splits__test__coverage/watch/shown": None}, "teacher_coverage", "covers 16.7%"),
    ],
)  # fmt: skip
def test_each_finding_has_its_name_and_its_numbers(changes, name, text):
    found = find(report_of(**changes))
    assert [finding.name for finding in found] == [name] * bool(name)
    assert not found or text in found[0].text


def test_a_refusal_names_all_findings_and_the_flag_for_them():
    changes = {"candidates__rejected": 500, "splits__test__rate/watch": 1.0}
    found = find(report_of(**changes))
    why = refusal(found, ["times"])
    assert why.startswith("rejected: 500 of 1,000")
    assert "; one_label: every label" in why
    assert why.endswith("--config.data.allow=\"('one_label', 'rejected', 'times')\"")
    assert "rejected" not in refusal(found, ["rejected"]).partition(";")[0]
    assert refusal(found, ["rejected", "one_label"]) == refusal([], ()) == ""


def test_many_findings_may_have_one_cause():
    changes = {
        "candidates__rejected": 500,
        "columns__0__out_of_range": 900,
        "splits__test__rate/watch": 1.0,
    }
    assert "; first check the columns in the config, which" in refusal(
        find(report_of(**changes)), []
    )
    changes.pop("candidates__rejected")
    assert "first check" not in refusal(find(report_of(**changes)), [])


@pytest.mark.parametrize(
    ("scale", "per_second", "hint"),
    [
        (1, 1, ""),
        (1, 1000, "; its numbers look like times in s: try --config.data.time_unit=s"),
        (1000, 1, "; its numbers look like times in ms: try --config.data.time_unit=ms"),
        (10**9, 10**6, "; its numbers look like nanoseconds: make them timestamps"),
        (7, 1, "; its numbers, such as 1.19e+10, do not look like times"),
    ],
)
def test_numbers_of_times_in_another_unit_look_like_it(scale, per_second, hint):
    numbers = np.full(3, float(START * scale))
    assert time_hint(numbers, [], SimpleNamespace(units_per_second=per_second)) == hint
    assert time_hint(numbers[:0], [], SimpleNamespace(units_per_second=per_second)) == ""


@pytest.mark.parametrize(
    ("texts", "time_format", "remedy"),
    [
        (["24/12/2024 18:00"], "", "try --config.data.time_format='%d/%m/%Y %H:%M'"),
        (["24/12/2024"], "%m/%d/%Y", "try --config.data.time_format='%d/%m/%Y'"),
        (["at noon"], "", "write their format, as for strptime, in data.time_format"),
        (["24/12/2024"], "%d/%m/%Y", "write their format, as for strptime, in data.time_format"),
    ],
)
def test_texts_of_times_in_another_format_look_like_it(texts, time_format, remedy):
    hint = time_hint(np.zeros(0), texts, SimpleNamespace(time_format=time_format))
    assert hint == f"; one is {texts[0]!r}: {remedy}"


def write_small_log(folder, by_request=False, **columns):
    """A log of `make_rows`, in the present, with other values in some columns."""
    path = write_log(folder, make_rows(0, requests=60), by_request) / "part-0.parquet"
    table = pq.read_table(path)
    # 60 requests, a minute each.
    columns = {"time": lambda values: [value - 10**6 + START for value in values]} | columns
    for name, change in columns.items():
        values = pa.array(change(table[name].to_pylist()))
        table = table.drop_columns([name]).append_column(name, values)
    pq.write_table(table, path)
    return folder


def read(log, folder, allow, **data):
    """The report of a log, or the line that refuses it and the report of that."""
    config = faulty_logs.config(log, folder, allow=allow, **data)
    folder.mkdir()
    try:
        source = faulty_logs.open_source(config)
    except UserError as error:
        return str(error), json.loads((folder / REFUSED / "data_report.json").read_text())
    source.write_side_files(folder)
    source.close()
    return "", json.loads((folder / "data_report.json").read_text())


def test_a_small_log_is_refused_and_what_is_allowed_is_a_remark(tmp_path):
    log = write_small_log(tmp_path / "log")
    line, report = read(log, tmp_path / "data", ())
    assert re.search(r"few_positives: \d+ of 100 needed positives of watch in validation, ", line)
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


def as_logits(lists):
    return [[None if p is None else 10 * p - 5 for p in of] for of in lists]


@pytest.mark.parametrize(
    ("column", "change", "by_request", "line", "remark"),
    [
        ("time", in_milliseconds, False,
         "are not times; its numbers look like times in ms: try ", ""),
        ("time", first_request_in_1970, False,
         "between 1970-01-01 and 2023-11-14; if this is exp", ""),
        # A timestamp has no unit to try.
        ("time", lambda of: pa.array([x // 1000 for x in in_milliseconds(of)], pa.timestamp("ms")),
         False, "they are between 1970-01-20 and 1970-01-20; if this is expected, add", ""),
        ("watch", lambda of: [y and 100 * y for y in of], False,
         "one_label: every label of watch in train is 0, every label of watch in validation",
         r"data\.labels\.watch: \d+ values of column 'watch' are not 0 or 1; it holds 0 to 100"),
        ("teacher_probability_watch", lambda of: [None if p is None else 100 * p for p in of],
         False, "teacher_coverage: that of watch covers",
         r"data\.teacher\.watch: \d+ values .* are not in \[0, 1\]; it holds .* "
         "divide percentages by 100"),
        ("teacher_probability_watch", as_logits, True, "teacher_coverage: that of watch covers",
         r"not in \[0, 1\]; it holds -.* take the sigmoid of logits, "
         r"or set data\.teacher_signal='score'"),
    ],
)  # fmt: skip
def test_a_column_in_another_unit_is_refused(tmp_path, column, change, by_request, line, remark):
    log = write_small_log(tmp_path / "log", by_request, **{column: change})
    allow = tuple({*ALLOWABLE} - {line.partition(":")[0], "times", "one_label"})
    rows = "request" if by_request else "candidate"
    found, report = read(log, tmp_path / "data", allow, rows=rows)
    assert line in found
    assert "\n" not in found
    assert re.search(remark, " ".join(report["remarks"]))


def test_the_share_revealed_is_information_over_entropy():
    rng, number = np.random.default_rng(0), 4000
    p = rng.random(number)
    yes = rng.random(number) < p
    few = np.where(rng.random(number) < 0.7, yes, rng.integers(5, size=number))

    def revealed(values, answer=yes):
        return share_revealed(pd.Series(values), pd.Series(answer.astype(float)))

    # Many numbers are put into 20 bins of equal numbers of rows.
    bins = np.argsort(np.argsort(p)) // 200
    cases = ((few, few), (p, bins), (np.where(p > 0.96, p, 0), p > 0.96))
    for values, of in cases:
        entropy = scipy.stats.entropy([yes.mean(), 1 - yes.mean()])
        bias = (len(np.unique(of)) - 1) / (2 * number)
        expected = (sklearn.metrics.mutual_info_score(of, yes) - bias) / entropy
        assert revealed(values) == pytest.approx(expected)
    # Texts that are missing if the answer is no.
    assert revealed([f"value {i}" if y else None for i, y in enumerate(yes)]) > 0.99
    assert revealed(rng.random(number)) < 0.01
    # A text that occurs once proves nothing, nor does a single yes.
    assert revealed([str(i) for i in range(number)]) == 0
    single = np.arange(number) == 7
    assert revealed(single.astype(int), single) == revealed(p, single) == 0


def test_copies_of_a_teacher_have_its_order_within_requests():
    rng, rows = np.random.default_rng(0), np.arange(2000)
    request, score = pd.Series(rows // 10), rng.random(2000)
    teacher = pd.Series(np.where(rows % 3, score, np.nan))
    columns = {
        "logit": np.log(score / (1 - score)),
        "position": -np.round(score, 2),
        "of request": score + 100 * (rows // 10),
        "noise": score + 0.1 * rng.normal(size=2000),
        "other request": score[::-1],
    }
    others = {"constant": rows // 10, "sparse": np.where(rows < 29, score, np.nan)}
    found = rank_correlations(pd.DataFrame(columns | others), request, teacher)
    assert np.isnan(found.pop("constant"))

    def expected(values):
        """Pearson's correlation of ranks less their mean, over all requests."""
        pairs = []
        for number in range(200):
            of = (rows // 10 == number) & teacher.notna().to_numpy()
            ranks = [scipy.stats.rankdata(numbers[of]) for numbers in (values, score)]
            pairs.append([each - each.mean() for each in ranks])
        return abs(np.corrcoef(*np.concatenate(pairs, axis=1))[0, 1])

    by_hand = {name: expected(values) for name, values in columns.items()}
    assert found.to_dict() == pytest.approx(by_hand)


def test_the_share_of_the_shown_that_a_column_has_first():
    request = pd.Series([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    shown = pd.Series([1, 1, 0, 0, 1, 0, 0, 0, 1, 1]).astype(bool)  # all of the last request
    nothing = np.nan
    columns = {
        "score": [9, 8, 7, 6, 5, 4, nothing, 3, 0, 0],
        "position": [1, 2, 3, 4, 1, 2, 3, 4, 1, 2],
        "half": [9, 1, 7, 6, 1, 4, 8, 3, 0, 0],  # finds one of three
        "nothing": [nothing] * 10,
    }
    found = share_shown_first(pd.DataFrame(columns, dtype=float), request, shown)
    assert found["score"] == found["position"] == 1
    # By chance 2 · 2/4 + 1/4 of the three are first; the smallest of "half" finds two of them.
    by_chance = 2 * 2 / 4 + 1 / 4
    assert found["half"] == pytest.approx((2 - by_chance) / (3 - by_chance))
    assert 0 <= found["nothing"] <= 1
    rng = np.random.default_rng(0)
    many = pd.Series(np.repeat(np.arange(500), 20))
    noise = pd.DataFrame({"noise": rng.random(10_000), "same": 0.0})
    assert (share_shown_first(noise, many, pd.Series(rng.random(10_000) < 0.3)) < 0.03).all()
    assert (share_shown_first(noise, many, pd.Series(False, many.index)) == 0).all()


def test_how_often_a_value_is_known_of_others():
    passed = pd.Series(np.arange(1000) < 200)
    known = pd.Series(np.arange(1000) % 10 < 7)
    assert known_ratio(known, passed) == 1
    assert known_ratio(known & passed, passed) == 0
    some = known & (passed | (np.arange(1000) % 10 < 1))
    assert known_ratio(some, passed) == pytest.approx(0.1 / 0.7)
    assert known_ratio(known & passed, pd.Series(np.arange(1000) < 20)) == 1  # too few to tell


def test_a_score_that_the_config_lacks_gets_a_remark(tmp_path):
    """It is known for 70% of the passed, or for all candidates, and the log names no teacher."""
    log = write_small_log(tmp_path / "log")
    table = pq.read_table(log / "part-0.parquet")
    stage = np.array(table["stage"].to_pylist())
    rng = np.random.default_rng(0)
    request, _ = pd.factorize(table["request_id"].to_pandas())
    noise = rng.random(table.num_rows)
    columns = {
        "voto": pa.array(noise, mask=(stage == "retrieved") | (rng.random(table.num_rows) < 0.3)),
        "ordine": pa.array(noise + (stage == "shown") + 10 * rng.random(len(stage))[request]),
        "prezzo": pa.array(noise, mask=rng.random(table.num_rows) < 0.3),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    pq.write_table(table, log / "part-0.parquet")
    features = faulty_logs.config(log, tmp_path).data.features.to_dict()
    features |= dict.fromkeys(columns, feature("candidate", "dense"))
    _, report = read(log, tmp_path / "data", ("few_positives",), features=features, teacher={})
    found = {of["name"]: [*of["reveals"]] for of in report["features"] if "reveals" in of}
    assert found == {"voto": ["known_passed"], "ordine": ["order"]}
    remarks = " ".join(report["remarks"])
    assert "'voto' is known 0% as often where a candidate was not passed: is it known be" in remarks
    assert "'ordine' has 100% of the shown candidates first, more than chance: is it" in remarks


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
    features = faulty_logs.config(log, tmp_path).data.features.to_dict()
    features |= dict.fromkeys(columns, feature("candidate", "dense"))
    _, report = read(log, tmp_path / "data", ("few_positives",), features=features)
    found = {of["name"]: [*of["reveals"]] for of in report["features"] if "reveals" in of}
    assert found == {"echo": ["label of watch"], "dwell": ["shown"], "cubed": ["teacher of like"]}
    remarks = " ".join(report["remarks"])
    assert re.search(r"'echo' reveals \d+% of the uncertainty of the label of watch", remarks)
    assert re.search(r"'dwell' reveals \d+% of which candidates were shown", remarks)
    copy = "'cubed' orders candidates like the teacher of like (rank correlation 1.00): is"
    assert copy in remarks


def test_the_share_of_scored_candidates_is_in_the_report(tmp_path):
    log = write_small_log(tmp_path / "log")
    _, report = read(log, tmp_path / "data", ("few_positives",))
    table = pq.read_table(log / "part-0.parquet").to_pandas()
    proper = [table[f"teacher_probability_{task}"].between(0, 1) for task in ("watch", "like")]
    assert 0 < (proper[0] & proper[1]).mean() < 1
    for of in report["splits"].values():
        stages = ("retrieved", "passed", "shown")
        for task in ("watch", "like"):
            scored = sum((of[f"coverage/{task}/{stage}"] or 0) * of[stage] for stage in stages)
            assert of["scored_share"] <= scored / of["candidates"] + 1e-9
        assert 0 < of["scored_share"] < 1
    share = f"{report['splits']['test']['scored_share']:.1%}"
    assert f"Scored by the final ranker: {share} of the test candidates." in " ".join(
        report["remarks"]
    )
    _, report = read(log, tmp_path / "other", ("few_positives",), teacher={})
    assert "scored_share" not in report["splits"]["test"]
    assert "Scored by" not in " ".join(report["remarks"])


def test_requests_that_are_scored_whole_are_counted(tmp_path):
    log = write_small_log(tmp_path / "log")
    path = log / "part-0.parquet"
    table = pq.read_table(path).to_pandas()
    beyond = table["stage"] == "retrieved"
    is_whole = table["request_id"].isin(sorted(table["request_id"].unique())[::3])
    for task in ("watch", "like"):
        column = f"teacher_probability_{task}"
        table[column] = np.where(beyond & ~is_whole, np.nan, 0.5)
    table["version"] = table["version"].iloc[0]
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), path)

    _, report = read(log, tmp_path / "data", ("few_positives", "constant_teacher"))

    whole = report["splits"]["test"]["scored_beyond_passed"]
    requests = report["splits"]["test"]["requests"]
    assert 0 < whole < requests
    remarks = " ".join(report["remarks"])
    assert f"beyond the passed candidates: {whole} of {requests} test requests." in remarks
    assert "count as worth nothing" not in remarks


def test_a_log_of_passed_candidates_alone_has_a_remark(tmp_path):
    log = write_small_log(tmp_path / "log")
    table = pq.read_table(log / "part-0.parquet")
    missing = "No candidate was retrieved and not passed"
    _, report = read(log, tmp_path / "all", ("few_positives",))
    assert missing not in " ".join(report["remarks"])
    passed = [stage != "retrieved" for stage in table["stage"].to_pylist()]
    pq.write_table(table.filter(pa.array(passed)), log / "part-0.parquet")
    _, report = read(log, tmp_path / "passed", ALLOWABLE)
    assert missing in " ".join(report["remarks"])


def test_times_with_and_without_a_zone_have_a_remark(tmp_path):
    def as_texts(zone):
        def change(values):
            texts = [str(np.datetime64(of - 10**6 + START, "s")) for of in values]
            return [text + zone(text) for text in texts]

        return change

    for number, (zone, is_mixed) in enumerate(
        ((lambda text: "+02:00" if text[15] in "02468" else "", True), (lambda _: "Z", False),
         (lambda _: "", False))
    ):  # fmt: skip
        log = write_small_log(tmp_path / f"log{number}", time=as_texts(zone))
        _, report = read(log, tmp_path / f"data{number}", ALLOWABLE)
        remarks = " ".join(report["remarks"])
        assert ("have a time zone; the others are read as UTC" in remarks) == is_mixed


def test_a_log_with_many_guests_is_refused_with_a_remedy(tmp_path):
    def change(users):
        return [None if number % 3 == 0 else user for number, user in enumerate(users)]

    refusal_line, _ = read(write_small_log(tmp_path / "log", user_id=change), tmp_path / "data", ())
    assert "missing_user" in refusal_line
    assert "; give guests an id per request, by data.sql" in refusal_line


@pytest.mark.parametrize(("guests", "has_remark"), [(0.3, True), (0.05, False)])
def test_a_user_with_a_large_part_of_the_requests_has_a_remark(tmp_path, guests, has_remark):
    def change(requests):
        return [-1 if number % 60 < 60 * guests else number for number in requests]

    log = write_small_log(tmp_path / "log")
    table = pq.read_table(log / "part-0.parquet")
    users = pa.array(change(table["request_id"].to_pylist()))
    table = table.drop_columns(["user_id"]).append_column("user_id", users)
    pq.write_table(table, log / "part-0.parquet")
    _, report = read(log, tmp_path / "data", ALLOWABLE)
    assert ("One user has 30% of the requests" in " ".join(report["remarks"])) == has_remark


def test_numbers_of_a_vector_that_share_a_remark_have_one(tmp_path):
    log = write_small_log(tmp_path / "log")
    table = pq.read_table(log / "part-0.parquet")
    table = table.append_column("v", pa.array([[1.0, 2.0, 3.0]] * table.num_rows))
    pq.write_table(table, log / "part-0.parquet")
    features = faulty_logs.config(log, tmp_path).data.features.to_dict()
    features |= {"v": feature("candidate", "dense", length=3)}
    _, report = read(log, tmp_path / "data", ("few_positives",), features=features)
    same = [of for of in report["remarks"] if "has the same value everywhere" in of]
    assert same == ["Feature 'v' (3 of its numbers) has the same value everywhere."]
