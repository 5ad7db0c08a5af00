"""Formats of times that are texts."""

import datetime

import pytest

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.times import FORMATS, check_format, find_formats

# Of a day, a month and a year that differ in every format, over more days than a year has months.
MOMENTS = [datetime.datetime(2026, 11, day, 17, 5, 9, 250_000) for day in range(3, 24)]


@pytest.mark.parametrize("time_format", FORMATS)
def test_a_format_is_found_in_what_python_writes_by_it(time_format):
    moments = [moment.astimezone(datetime.UTC) for moment in MOMENTS]
    texts = [moment.strftime(time_format) for moment in moments]
    assert find_formats(texts)[0] == time_format


@pytest.mark.parametrize(
    "text", ["soon", "5", "2026", "1.2.24", "30/02/2026", "12/11/1026", "31.12", "10.0.12.7"]
)
def test_other_texts_have_no_format(text):
    assert find_formats([text]) == []


def test_all_texts_must_fit():
    texts = ["12/11/2026"] * 50
    assert find_formats(texts) == ["%d/%m/%Y", "%m/%d/%Y"]
    assert find_formats([*texts, "soon"]) == []
    assert find_formats([*texts, "13/11/2026"]) == ["%d/%m/%Y"]


def test_times_that_are_close_decide_between_days_and_months():
    assert find_formats(["03/04/2026", "03/11/2026"])[0] == "%m/%d/%Y"
    assert find_formats(["04/03/2026", "11/03/2026"])[0] == "%d/%m/%Y"


@pytest.mark.parametrize("time_format", ["%Q", "noon", "%d/%m/%Y %"])
def test_what_is_no_format_is_one_line(time_format):
    with pytest.raises(UserError, match=r"data\.time_format='.*' is no format; write it as for"):
        check_format(time_format)
