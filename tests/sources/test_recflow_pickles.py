"""RecFlow's pickles: arrays come back, and whatever would run is refused and does not run."""

import collections
import os
import pickle

import numpy as np
import pytest

from kd_ranker.errors import UserError
from kd_ranker.sources.recflow import read_events


def sequences_in(path, content, protocol=3, numpy_1=False):
    written = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    if numpy_1:
        written = written.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(written)
    return read_events(path, np.array([7, 8]))


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("numpy_1", [True, False])
@pytest.mark.parametrize("factory", [None, tuple])
def test_arrays_come_back(tmp_path, protocol, numpy_1, factory):
    array = np.arange(30).reshape(3, 10)
    content = {np.int64(8): array, 9: array}
    if factory:
        content = collections.defaultdict(factory, content)
    if numpy_1 and protocol == 4:
        return  # names have their length before them
    read = sequences_in(tmp_path / "day.pkl", content, protocol, numpy_1)
    assert read["request_id"].to_pylist() == [8] * 3
    assert read["video_id"].to_pylist() == array[:, 0].tolist()
    assert read["viewed"].to_pylist() == array[:, 7].tolist()


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, "posix.mkdir"), (eval, "builtins.eval"), (np.fromfile, "numpy.*fromfile")],
)
def test_code_is_refused_by_its_name_and_does_not_run(tmp_path, function, name):
    made = tmp_path / "made"
    argument = f"__import__('os').mkdir({str(made)!r})" if function is eval else str(made)
    with pytest.raises(UserError, match=f"it names {name}, which is not allowed") as caught:
        sequences_in(tmp_path / "day.pkl", {8: Runs(function, argument)})
    assert "\n" not in str(caught.value)
    assert not made.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Ran out of input"),
        (pickle.dumps({8: np.arange(99)})[:-9], ""),
        ([1], "need at least one array"),
        ({8: np.zeros((2, 10))}, "found float64"),
        ({8: np.full((2, 10), None)}, "found object"),
        ({8: np.zeros((2, 9), int)}, r"found int64 \[views, 9\]"),
        ({9: np.zeros((2, 10), int)}, "need at least one array"),
    ],
)
def test_other_contents_are_one_line(tmp_path, content, message):
    expected = r"day.pkl must be a pickle of request id -> whole numbers \[views, 10\]: "
    with pytest.raises(UserError, match=expected + message):
        sequences_in(tmp_path / "day.pkl", content)
