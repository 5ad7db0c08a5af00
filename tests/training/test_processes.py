"""Several processes that train as one, against one process with as many devices.

They are real processes on this machine. `scripts/test_processes.sh` has those that take long too.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from kd_ranker import api
from kd_ranker.evaluation import results
from kd_ranker.pipeline.trained import open_ranker
from tests import forked, small
from tests.training.steps import assert_close

long = pytest.mark.long
CHANGES = {
    "parallel__devices": 0,
    "parallel__mapping": "shard_map",
    "train__steps": 12,
    "train__checkpoint_every": 4,
    "train__log_every": 4,
    "train__eval_every": 0,
    "distill__mode": "shared",
    "teacher__source": "live",
}


def run_together(number, devices, *arguments, of_last=(), program=("-m",)):
    """Runs an entry point by a number of processes with a number of devices each, to their end.

    The last process gets the arguments `of_last` too.
    """
    environment = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{small.free_port()}",
        "JAX_NUM_PROCESSES": str(number),
        "XLA_FLAGS": re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"]),
    }
    processes = []
    for index in range(number):
        process_arguments = arguments if index < number - 1 else (*arguments, *of_last)
        process = forked.Program(
            *program,
            *process_arguments,
            "--config.parallel.processes=True",
            **environment,
            JAX_PROCESS_ID=str(index),
        )
        processes.append(process)
    return [process.ended() for process in processes]


def flags(world, workdir, **changes):
    return world.flags(workdir, **(CHANGES | changes))


def trained_by_one_process(world):
    """The workdir of a student that one process has trained on 4 devices."""
    config = world.config(**CHANGES | {"parallel__devices": 4})
    return world.made("of_one_process", lambda folder: api.train(config, folder))


def assert_same_student(workdir, world):
    other = trained_by_one_process(world)
    assert_close(open_ranker(workdir).ranker.parameters, open_ranker(other).ranker.parameters, 1e-5)
    assert_same_results(workdir, other)


def assert_same_results(workdir, other):
    found = pd.read_csv(workdir / results.FILE)
    expected = pd.read_csv(other / results.FILE)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3, atol=1e-3)


_OF_GLOO = re.compile(
    r"(?m)^(?:\[Gloo\] Rank |\d+| is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : )*\n"
)
"""What Gloo, by which CPUs exchange, writes past Python, in pieces and from its own threads."""


def output_of_first(ended):
    """The output of the first process; all have ended well, and the others wrote nothing."""
    for process in ended:
        assert process.returncode == 0, process.stderr
    first, *others = [_OF_GLOO.sub("", process.stdout) for process in ended]
    assert not any(others)
    return first


@pytest.mark.parametrize(
    ("number", "devices", "tables"),
    [(2, 2, "sharded"), pytest.param(4, 1, "replicated", marks=long)],
)
def test_processes_train_the_student_that_one_does(world, tmp_path, number, devices, tables):
    workdir = tmp_path / "run"
    run_flags = flags(world, workdir, parallel__tables=tables)

    output = output_of_first(run_together(number, devices, "experiments.train", *run_flags))

    assert "results:" in output
    assert_same_student(workdir, world)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    expected_lines = (trained_by_one_process(world) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(expected_lines)
    assert not [path for path in workdir.iterdir() if path.name.startswith(".")]


def swept_by_processes(world, tmp_path, **changes):
    """The workdir of a sweep by two processes, whose results are those of one process."""
    changes = {"sweep__modes": ("none", "aux"), "sweep__seeds": (0, 1), **changes}
    at_once = world.config(**(CHANGES | changes | {"parallel__devices": 4}))
    expected = tmp_path / "by_one_process"
    api.sweep(at_once, expected)
    workdir = tmp_path / "sweep"

    ended = run_together(2, 2, "experiments.sweep", *flags(world, workdir, **changes))

    output_of_first(ended)
    assert_same_results(workdir, expected)
    return workdir


@long
def test_processes_have_runs_of_their_own_in_a_sweep(world, tmp_path):
    swept_by_processes(world, tmp_path)


@long
def test_processes_stop_the_settings_that_one_does(world, tmp_path):
    halving = {"sweep__weights": (0.5, 1.0, 4.0), "sweep__halving": (4,)}

    workdir = swept_by_processes(world, tmp_path, **halving)

    steps = set(pd.read_csv(workdir / results.FILE)["step"].dropna())
    assert {4, 12} <= steps


@long
@pytest.mark.parametrize(("before", "after"), [((4, 1), (1, 8)), ((1, 4), (2, 1))])
def test_a_run_resumes_with_other_processes(world, tmp_path, before, after):
    workdir = tmp_path / "run"
    program = ("-c", small._INTERRUPTED)
    killed = ["experiments.train", "saving", "run", "8", str(int(signal.SIGKILL))]
    ended = run_together(*before, *killed, *flags(world, workdir), program=program)
    assert {process.returncode for process in ended} == {-9}
    assert (workdir / "checkpoints" / "4").is_dir()

    output_of_first(run_together(*after, "experiments.train", *flags(world, workdir)))

    assert_same_student(workdir, world)


@pytest.mark.parametrize(
    ("differing", "line"),
    [
        ("--config.seed=7", "process 1 has another config than process 0; start all alike"),
        pytest.param("--workdir=", "process 1 does not see what process 0 writes to", marks=long),
    ],
)
def test_processes_that_differ_end_with_one_line_of_the_first(world, tmp_path, differing, line):
    if differing.endswith("="):
        differing += str(tmp_path / "other")
    run_flags = flags(world, tmp_path / "run")

    first, last = run_together(2, 1, "experiments.train", *run_flags, of_last=[differing])

    assert first.returncode == 2
    assert last.returncode == 2
    (error,) = [text for text in first.stderr.splitlines() if text.startswith("error: ")]
    assert error.startswith(f"error: {line}")
    assert not [text for text in last.stderr.splitlines() if text.startswith("error: ")]
    assert not list(tmp_path.iterdir())


@long
def test_processes_that_get_a_signal_save_and_resume(world, tmp_path):
    workdir = tmp_path / "run"
    program = ("-c", small._INTERRUPTED)
    # At step 4, so after the few steps of the next call.
    stopped = ["experiments.train", "logging", "run", "4", str(int(signal.SIGTERM))]
    run_flags = flags(world, workdir, train__checkpoint_every=12)

    ended = run_together(2, 2, *stopped, *run_flags, program=program)
    assert {process.returncode for process in ended} == {143}, ended
    (saved,) = (workdir / "checkpoints").iterdir()
    assert 4 < int(saved.name) < CHANGES["train__steps"]
    output_of_first(run_together(1, 4, "experiments.train", *run_flags))

    assert_same_student(workdir, world)


def script(*arguments, devices):
    """Starts `examples/launch/processes.sh`, with a number of devices for each process."""
    xla_flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PORT": str(small.free_port()),
        "XLA_FLAGS": xla_flags,
    }
    program = [str(small.ROOT / "examples" / "launch" / "processes.sh"), *arguments]
    return subprocess.Popen(
        program, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@long
def test_the_script_trains_with_two_processes_as_one_does(world, tmp_path):
    workdir = tmp_path / "run"
    started = script("2", "train", *flags(world, workdir), devices=2)
    _, stderr = started.communicate(timeout=900)
    assert started.returncode == 0, stderr
    assert_same_student(workdir, world)


@long
def test_the_script_passes_a_signal_on(world, tmp_path):
    workdir = tmp_path / "run"
    started = script("2", "train", *flags(world, workdir, train__steps=100_000), devices=1)
    until = time.monotonic() + 900
    while not any(workdir.glob("checkpoints/[0-9]*")):
        assert started.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    try:
        _, stderr = started.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 143, stderr
    assert stderr.count("stopped by SIGTERM") == 2


def test_processes_that_nothing_has_started_are_a_line(world, tmp_path):
    run_flags = flags(world, tmp_path / "run")

    finished = small.run("-m", "experiments.train", *run_flags, "--config.parallel.processes=True")

    assert finished.returncode == 2
    line = "error: parallel.processes=True, and neither Slurm, Open MPI nor a pod defines"
    assert line in finished.stderr
