import errno
import logging
import os

import pytest

from kd_ranker.pipeline import faults


def raised(error, cause=None):
    try:
        raise error from cause
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some room"),
        (errno.EFBIG, "free some room"),
        (errno.EROFS, "name another folder"),
        (errno.EIO, "look after the disk"),
    ],
)
def test_a_fault_of_the_disk_is_told_with_its_path_whatever_it_went_through(number, remedy):
    own = OSError(number, os.strerror(number), "/runs/a")
    assert faults.fault_of(own).startswith(f"{os.strerror(number)}: /runs/a; {remedy}")
    # As a storage below orbax words it, with what it was doing.
    other = ValueError(f'RESOURCE_EXHAUSTED: writing "/runs/b/c" [{os.strerror(number)}]')
    outer = raised(RuntimeError("save failed"), cause=other)
    assert faults.fault_of(outer).startswith(f"{os.strerror(number)}: /runs/b/c; {remedy}")


def test_other_errors_are_no_faults_of_the_machine():
    assert not faults.fault_of(ValueError("shapes differ"))
    assert not faults.fault_of(FileNotFoundError(2, "No such file or directory", "/runs/a"))
    assert "memory does not suffice" in faults.fault_of(MemoryError("4 TiB"))


def test_what_libraries_log_of_such_a_fault_is_left_out():
    def record(message, error=None):
        about = error and (type(error), error, None)
        return logging.LogRecord("orbax", logging.ERROR, "", 1, message, (), about)

    assert faults._tells_something_else(record("a member diverged"))
    assert not faults._tells_something_else(record("it failed: No space left on device"))
    assert not faults._tells_something_else(record("it failed", OSError(28, os.strerror(28))))
