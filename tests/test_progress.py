"""Phases, their seconds and bars, by a clock that a test moves."""

import functools
import io
import re
import sys

import pytest

from kd_ranker import api, main
from kd_ranker.progress import Progress, counted


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines():
    return []


@pytest.fixture
def progress(clock, lines):
    return Progress(lines.append, clock)


def test_a_phase_is_a_line_with_its_own_seconds(progress, clock, lines):
    with progress.phase("training"):
        clock.now += 2
        with progress.phase("compiling"):
            clock.now += 33
        clock.now += 5
        with progress.phase("validation"):
            clock.now += 4
    assert lines == ["compiling: 33 s", "validation: 4 s", "training: 7 s"]


def test_the_summary_adds_up_the_phases_of_a_name(progress, clock):
    for seconds in (3, 4):
        with progress.phase("dataset"):
            clock.now += 1
        with progress.phase("training", quiet=True):
            clock.now += seconds
    assert str(progress) == "dataset 2 s, training 7 s"


def test_a_phase_that_fails_shows_no_line(progress, lines):
    def fail():
        with progress.phase("training"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert lines == []


def test_without_a_terminal_a_bar_is_lines_with_the_time_left(progress, clock, lines):
    with progress.bar("training", 2000, "step") as bar:
        for _ in range(7):
            clock.now += 10
            bar.update(100)
    assert lines == [
        "training: 300 of 2,000 steps, 170 s left",
        "training: 600 of 2,000 steps, 140 s left",
    ]


def test_restarting_the_clock_forgets_earlier_updates(progress, clock, lines):
    with progress.bar("training", 1000, "step") as bar:
        bar.update(500)  # of an earlier process
        clock.now += 20  # to compile
        bar.restart_clock()
        clock.now += 30
        bar.update(100)
    assert lines == ["training: 600 of 1,000 steps, 120 s left"]


def test_a_hidden_bar_shows_nothing(progress, clock, lines):
    with progress.bar("training", 10, "step", hidden=True) as bar:
        clock.now += 60
        bar.update(5)
    assert lines == []


def test_a_terminal_has_a_bar_with_lines_above_it(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress = Progress(lambda line: terminal.write(f"{line}\n"), clock)
    with progress.bar("training", 10, "step") as bar:
        clock.now += 60
        bar.update(10)
        progress.show("compiling: 33 s")
    text = terminal.getvalue()
    assert "compiling: 33 s\n" in text
    assert re.search(r"training: 100%.*10/10 \[\d\d:\d\d<00:00", text)
    assert "10 of 10" not in text


def test_without_a_function_for_lines_nothing_is_shown(clock, capsys):
    progress = Progress(clock=clock)
    with progress.phase("training"), progress.bar("training", 10, "step") as bar:
        clock.now += 60
        bar.update(5)
    assert capsys.readouterr() == ("", "")


def test_a_run_names_its_phases_when_they_end(world, tmp_path):
    lines = []
    config = world.config(distill__mode="none", train__steps=2, train__eval_every=1)
    progress = Progress(lines.append)
    api.train(config, tmp_path / "run", progress=progress)
    assert [line.split(":")[0] for line in lines] == [
        "compiling the step, once", "compiling", "training", "validation", "test"
    ]  # fmt: skip
    # A run that is complete compiles nothing.
    lines.clear()
    api.train(config, tmp_path / "run", progress=Progress(lines.append))
    assert [line.split(":")[0] for line in lines] == ["training", "validation", "test"]


def test_a_sweep_ends_with_where_the_time_went(monkeypatch, capsys):
    def sweep(config, workdir, show, progress):
        with progress.phase("training"):
            pass
        with progress.phase("test"):
            pass
        return Students()

    class Students:
        def table(self, wide):
            return f"the table, wide: {wide}"

    monkeypatch.setattr(api, "sweep", sweep)
    config = main.read_config("cascade:small")
    given = main._parser(main.COMMANDS["sweep"], "sweep").parse_args(["--workdir=w", "--wide"])
    assert main.COMMANDS["sweep"].call(api, config, given) == "the table, wide: True"
    output, lines = capsys.readouterr()
    assert output == ""
    assert lines.splitlines() == [
        "training: 0 s", "test: 0 s", "table: 0 s", "time: training 0 s, test 0 s, table 0 s",
    ]  # fmt: skip


def test_parts_are_counted_in_lines_where_there_is_no_terminal(monkeypatch, capsys, clock):
    monkeypatch.setattr("kd_ranker.progress.Progress", functools.partial(Progress, clock=clock))
    for _ in counted(range(4), "retrieve", unit="request"):
        clock.now += 20
    assert capsys.readouterr().err.splitlines() == [
        "retrieve: 2 of 4 requests, 40 s left",
        "retrieve: 4 of 4 requests, 0 s left",
    ]


def test_parts_of_an_unknown_number_are_counted(monkeypatch, capsys, clock):
    monkeypatch.setattr("kd_ranker.progress.Progress", functools.partial(Progress, clock=clock))
    for _ in counted(iter(range(3)), "scoring", unit="part"):
        clock.now += 31
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 1 parts", "scoring: 2 parts", "scoring: 3 parts"
    ]  # fmt: skip
