"""The trace of some steps, in the files that XProf and Perfetto open."""

import gzip
import json

import pytest

from kd_ranker import api
from kd_ranker.errors import UserError
from kd_ranker.training.profile import Profiler


def traced_steps(workdir):
    """The numbers of the steps that the trace of a run marks."""
    (trace,) = (workdir / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    marks = [event for event in events if event.get("name") == "train"]
    return sorted(int(event["args"]["step_num"]) for event in marks)


def test_the_steps_of_a_window_are_traced_and_nothing_else_changes(world, tmp_path):
    for name, window in (("none", (1, 0)), ("traced", (7, 3)), ("default", ())):
        api.train(world.config(train__profile=window), tmp_path / name)

    assert traced_steps(tmp_path / "traced") == [7, 8, 9]
    assert traced_steps(tmp_path / "default") == [10, 11, 12, 13]
    assert not (tmp_path / "none" / "profile").exists()
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("none", "traced")]
    assert metrics[0] == metrics[1]


def test_a_call_ends_where_the_window_begins_and_takes_one_step_in_it(tmp_path):
    profiler = Profiler(tmp_path, (5, 2))

    most = [profiler.most(step) for step in range(7)]

    assert most[:6] == [4, 3, 2, 1, 1, 1]
    assert most[6] > 1000


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((5000, 2), "until step 5001, and the run takes 20"),
        ((0, 4), "counted from 1"),
        ((3,), "first"),
    ],
)
def test_a_window_beyond_the_run_is_one_line(world, tmp_path, window, message):
    with pytest.raises(UserError, match=message):
        api.train(world.config(train__profile=window), tmp_path)
