"""A short form of `scripts/fault_test.py`; that itself does as many rounds as one likes."""

import contextlib
import importlib.util
import signal

import pytest

from tests.small import ROOT, run

_SPEC = importlib.util.spec_from_file_location("fault_test", ROOT / "scripts" / "fault_test.py")
fault_test = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fault_test)


@pytest.mark.parametrize(
    ("code", "lines", "fits"),
    [
        (0, [], True),
        (-15, [], True),
        (143, ["stopped by SIGTERM; and so on"], True),
        (143, ["error: a.csv"], False),
        (1, [], False),
        (2, ["error: a.csv"], False),
    ],
)
def test_an_exit_that_does_not_fit_the_signal_is_a_failure(code, lines, fits):
    with contextlib.nullcontext() if fits else pytest.raises(fault_test.Fault):
        fault_test.check_end(signal.SIGTERM, code, lines)


def test_a_traceback_is_a_failure_whatever_the_exit_code(tmp_path):
    class Ended:
        exitcode = 0

        def join(self, seconds):
            pass

    errors = tmp_path / "errors"
    errors.write_text("W1 a warning\nrun: sweep\nerror: one line\n")
    assert fault_test.Attempt(Ended(), errors).end() == (0, ["error: one line"])
    errors.write_text("Traceback (most recent call last):\n")
    with pytest.raises(fault_test.Fault):
        fault_test.Attempt(Ended(), errors).end()


def test_another_byte_or_a_missing_file_is_a_difference():
    fault_test._compare({"a": b"1"}, {"a": b"1", "b": b"2"})
    for found in ({"a": b"2"}, {}):
        with pytest.raises(fault_test.Fault, match="other results than uninterrupted: a"):
            fault_test._compare({"a": b"1"}, found)


@pytest.mark.long
def test_rounds_end_with_the_same_results(tmp_path, monkeypatch):
    # Each of many processes compiles the same, so that it pays to keep all of it.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    flags = ["--rounds", "3", "--seed", "3", "--minutes", "20", "--folder", str(tmp_path)]
    finished = run("scripts/fault_test.py", *flags)
    assert finished.returncode == 0, finished.stderr
    assert "3 rounds, no difference, no traceback" in finished.stdout
