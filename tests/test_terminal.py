"""What a terminal shows of an answer and of a table."""

import io

import pytest
import termcolor

from kd_ranker.terminal import replace_unprintable, with_bold_verdict

ANSWER = (
    "my log: The scores save 2.5% of the\ncompute (95% interval 1.5 to 3%). For 99% of it, 3 pass."
)


@pytest.fixture(autouse=True)
def forgotten():
    """termcolor asks once for a process whether there is a terminal."""
    termcolor.termcolor.can_colorize.cache_clear()
    yield
    termcolor.termcolor.can_colorize.cache_clear()


def test_the_verdict_is_bold_and_the_rest_is_not(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    before, bold, after = with_bold_verdict(ANSWER).partition("\x1b[1m")
    assert before == "my log: "
    assert (bold + after).endswith("(95% interval 1.5 to 3%).\x1b[0m For 99% of it, 3 pass.")


@pytest.mark.parametrize("variable", ["NO_COLOR", None])
def test_there_is_no_color_where_it_is_not_wanted_or_in_a_pipe(monkeypatch, variable):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    assert with_bold_verdict(ANSWER) == ANSWER


def test_a_text_without_a_sentence_stays():
    assert with_bold_verdict("nothing to say") == "nothing to say"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "6 ± 2, −0.5, “a”, 点"),
        ("ascii", '6 +/- 2, -0.5, "a", ?'),
        ("latin-1", '6 ± 2, -0.5, "a", ?'),
    ],
)
def test_what_an_encoding_lacks_is_written_in_its_letters(encoding, expected):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    replace_unprintable(stream)
    stream.write("6 ± 2, −0.5, “a”, 点")
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == expected
