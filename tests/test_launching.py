"""The files of `examples/launch` parse, and their commands are those of this project.

None of them is run here: what they start belongs to others.
"""

import argparse
import math
import re
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

import absl.flags
import pytest
import yaml
from ml_collections import ConfigDict

from kd_ranker import main
from kd_ranker.config import checks
from kd_ranker.errors import UserError
from kd_ranker.pipeline.remote import place_of
from tests.small import ROOT
from tests.test_docs import config_keys

FOLDER = ROOT / "examples" / "launch"
PAGE = ROOT / "docs" / "launching.md"
PAGES = [PAGE, ROOT / "docs" / "running.md", ROOT / "docs" / "sweeps.md"]
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix == ".sh"]
# The module of a command, or a script that has the flags of one, where its name is another.
ALIASES = {"prepare_data": "prepare", "slurm_array.sh": "sweep", "ray.sh": "sweep"}
NAMES = {name: name for name in main.COMMANDS}
NAMES |= {name.replace("-", "_"): name for name in main.COMMANDS} | ALIASES
COMMAND = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, NAMES))})\s+(--config=.*)")

over_files = pytest.mark.parametrize("path", [*FILES, *PAGES], ids=lambda path: path.name)


class Started(NamedTuple):
    """A command of this project in a file."""

    name: str
    config: ConfigDict
    flags: argparse.Namespace


def texts_of(path) -> Iterator[str]:
    """Yield the texts with commands of a file, each command on one line."""
    text = path.read_text()
    yield re.sub(r"\\\n#?", " ", text)
    if path.suffix == ".yaml":
        for value in values_of(yaml.safe_load(text)):
            if isinstance(value, list):
                yield shlex.join(map(str, value))


def values_of(value) -> Iterator[Any]:
    """Yield a value of YAML and all that it contains."""
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for element in inner:
        yield from values_of(element)


def started_by(path) -> list[Started]:
    """Parse the commands of a file, as the command line does; UserError if one is wrong."""
    found = [pair for text in texts_of(path) for pair in COMMAND.findall(text)]
    return [parsed(NAMES[name], flags) for name, flags in found]


def parsed(name: str, line: str) -> Started:
    """Parse the flags at the start of a line; a variable of the shell is its name."""
    flags = re.findall(
        r"""--[a-z][\w.]*(?:=(?:"[^"]*"|'[^']*'|[^\s"'&;|]+)*)?""", line.partition(" -- ")[0]
    )
    words = [word.replace("$", "") for flag in flags for word in shlex.split(flag)]
    command = main.COMMANDS[name]
    config, namespace = main._parse(command, main._parser(command, name), words)
    checks.validate(config)
    return Started(name, config, namespace)


def test_the_page_has_every_file_and_names_no_other():
    named = re.findall(r"`([a-z_]+\.(?:sh|yaml))`", PAGE.read_text())
    named += re.findall(r"examples/launch/(\w+\.\w+)", PAGE.read_text())
    assert {*named} == {path.name for path in FILES}


@over_files
def test_config_keys_exist(path):
    keys = {*re.findall(r"--config\.([a-z_]\w*(?:\.\w+)*)", path.read_text())}
    assert keys
    assert not keys - config_keys()[0]


# How many commands a file has; most scripts take theirs from the caller, and show one.
NUM_COMMANDS = {"jobset.yaml": 2, "skypilot.yaml": 2}
NUM_COMMANDS |= {"launching.md": 7, "running.md": 10, "sweeps.md": 2}


@over_files
def test_commands_are_those_of_this_project(path):
    assert len(started_by(path)) == NUM_COMMANDS.get(path.name, 1)


WRONG_FLAGS = ["--workdir=a --config.train.stepz=3", "--workdirs=a", "--workdir=a --wider"]


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_flags_that_do_not_exist_are_found(tmp_path, flags):
    path = tmp_path / "wrong.sh"
    path.write_text(f"kd-ranker sweep --config=cascade \\\n  {flags}\n")
    with pytest.raises((UserError, absl.flags.Error)):
        started_by(path)


@over_files
def test_only_one_process_has_its_workdir_at_a_url(path):
    for started in started_by(path):
        if started.config.parallel.processes:
            assert not isinstance(place_of(started.flags.workdir), str)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_show_how_to_call_them(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.stat().st_mode & 0o100
    text = path.read_text()
    assert f"examples/launch/{path.name}" in text
    assert "set -euo pipefail" in text
    modules = re.findall(r"-m experiments\.(\w+)", text)
    assert all((ROOT / "experiments" / f"{module}.py").exists() for module in modules)


TRAINING = [name for name, command in main.COMMANDS.items() if command.as_one]


@pytest.mark.parametrize("name", ["processes.sh", "slurm.sh"])
def test_scripts_accept_the_commands_of_several_processes(name):
    (choice,) = re.findall(r"^  ([a-z_ |]+)\) ;;$", (FOLDER / name).read_text(), re.MULTILINE)
    assert {*choice.split(" | ")} == {command.replace("-", "_") for command in TRAINING}


WRONG_CALLS = [
    ("processes.sh", ["two", "sweep"], "the first argument is the number of processes, not 'two'"),
    ("processes.sh", ["2", "report"], "the second argument is train, train_teacher or sweep, not "),
    ("slurm.sh", ["report"], "the first argument is train, train_teacher or sweep, not 'report'"),
    ("tpu.sh", ["a", "v9-8", "sweep"], "the type of the slice is v5litepod-N, v6e-N or v5p-N, no"),
]


MISSING = [
    ("tpu.sh", ["a", "v6e-16"], "the command is missing: train, train_teacher or sweep"),
    ("tpu.sh", ["a", "v6e-16", "sweep"], "ZONE: is the zone of the slice; export it"),
    ("xpk.sh", ["a", "v6e-16"], "PROJECT: is the project of the cluster; export it"),
]


@pytest.mark.parametrize(("name", "arguments", "line"), MISSING)
def test_what_a_script_for_a_cloud_lacks_is_one_line(name, arguments, line):
    program = ["/bin/bash", str(FOLDER / name), *arguments]
    finished = subprocess.run(program, env={"PATH": ""}, capture_output=True, text=True)
    assert finished.returncode != 0
    assert finished.stderr.endswith(f"{line}\n")
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "arguments", "line"), WRONG_CALLS)
def test_a_wrong_call_is_one_line(name, arguments, line):
    program = ["/bin/bash", str(FOLDER / name), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "ZONE": "zone", "REPOSITORY": "repository"}
    finished = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"{name}: {line}")
    assert finished.stderr.count("\n") == 1


def flags_of(name: str, command: str) -> set[str]:
    """The flags of a command of another tool, up to the first part that has its own."""
    text = (FOLDER / name).read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith(command)]
    return set(re.findall(r"\s--([a-z-]+)", line.partition(" --command")[0]))


def test_the_slice_of_gcloud_has_the_flags_that_it_needs():
    found = flags_of("tpu.sh", "gcloud compute tpus queued-resources create")
    needed = {"node-id", "zone", "accelerator-type", "runtime-version", "spot"}
    assert found == needed


def test_the_workload_of_xpk_has_the_flags_that_it_needs():
    found = flags_of("xpk.sh", "xpk workload create")
    assert found >= {"workload", "cluster", "tpu-type", "docker-image", "max-restarts"}
    # A process that a signal ends has an exit code, which xpk takes for a failure of its program.
    assert "restart-on-user-code-failure" in found


def test_the_job_set_has_a_process_for_each_host():
    job_set = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert job_set["kind"] == "JobSet"
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] > 0
    prepare, sweep = job_set["spec"]["replicatedJobs"]
    assert sweep["dependsOn"] == [{"name": prepare["name"], "status": "Complete"}]
    folders = set()
    for part in (prepare, sweep):
        job = part["template"]["spec"]
        assert job["completions"] == job["parallelism"]
        assert job["backoffLimit"] == 0  # JobSet starts all again, not only the pod that failed
        pod = job["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        (mount,) = container["volumeMounts"]
        (volume,) = pod["volumes"]
        assert mount["name"] == volume["name"]
        assert "persistentVolumeClaim" in volume
        # Without a shell, which would keep SIGTERM to itself.
        assert container["command"][0] == "kd-ranker"
        started = parsed(container["command"][1], shlex.join(container["command"][2:]))
        folders.add(started.config.data.dir)
        assert started.config.data.dir.startswith(f"{mount['mountPath']}/")
        assert started.config.parallel.processes == (part is sweep)
    assert len(folders) == 1
    assert started.flags.workdir.startswith(f"{mount['mountPath']}/")
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert chips == job["completions"] * container["resources"]["limits"]["google.com/tpu"]


def test_the_task_of_skypilot_resumes_on_another_machine():
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert {*task} == {"name", "num_nodes", "resources", "workdir", "envs", "setup", "run"}
    assert task["num_nodes"] == 1
    assert task["resources"]["use_spot"] is True
    assert re.fullmatch(r"\w+:\d+", task["resources"]["accelerators"])
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, check=True, text=True)
    prepare, sweep = started_by(FOLDER / "skypilot.yaml")
    assert (prepare.name, sweep.name) == ("prepare", "sweep")
    assert sweep.flags.break_lock
    assert sweep.flags.workdir == "RUNS/weights"
    assert task["envs"]["RUNS"].startswith("gs://")
    assert not sweep.config.parallel.processes
