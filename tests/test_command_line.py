"""`kd-ranker`: its commands, their help, and the completion of their flags."""

import subprocess
import sys
from pathlib import Path

import pytest

from kd_ranker.config.keys import DATA_KEYS, KEYS
from kd_ranker.experiments import command_line
from tests.small import ROOT

KD_RANKER = Path(sys.executable).with_name("kd-ranker")


def call(*arguments, program=(KD_RANKER,), **options):
    return subprocess.run(
        [*map(str, program), *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_each_entry_point_is_a_command():
    files = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert {*command_line.COMMANDS.values()} == files - {"__init__", "command_line"}


def test_without_a_name_the_commands_are_listed(tmp_path):
    listed = call(cwd=tmp_path)
    assert listed.returncode == 0
    assert all(f"    {name}" in listed.stdout for name in command_line.COMMANDS)
    unknown = call("swep")
    assert unknown.returncode == 2
    assert "invalid choice: 'swep'" in unknown.stderr


@pytest.mark.parametrize(
    "program", [(KD_RANKER, "sweep"), (sys.executable, "-m", "experiments.sweep")]
)
def test_help_has_an_example_and_every_key_with_its_value_in_the_config(program):
    told = call("--help", "--config=cascade:small", program=program, cwd=ROOT)
    assert told.returncode == 0, told.stderr
    assert "Trains the students of config.sweep." in told.stdout
    name = "kd-ranker sweep" if program[0] == KD_RANKER else "python -m experiments.sweep"
    assert f"    {name} --config=configs/sweeps/cascade.py --workdir=runs/sweep" in told.stdout
    words = told.stdout.split()
    assert {f"--config.{key}" for key in KEYS | DATA_KEYS["cascade"]} <= {*words}
    assert words[words.index("--config.data.num_users") + 1] == "50"  # 4000 without :small
    help_of_steps = " ".join(words[words.index("--config.train.steps") + 1 :][:3])
    assert help_of_steps == f"20 {KEYS['train.steps'].help}"


def test_help_of_a_wrong_config_is_one_line():
    told = call("sweep", "--help", "--config=nope")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("error: --config=nope: there is no file nope, and the package")
    assert told.stderr.count("\n") == 1


def test_help_of_a_report_has_no_config():
    told = call("report", "-h")
    assert told.returncode == 0
    assert "--workdir=FOLDER [WORKDIR ...]" in told.stdout
    assert "--config" not in told.stdout


def test_a_shell_completes_commands_and_keys():
    script = call("--print-completion", "bash").stdout
    start, _, word = "_shtab_kd_ranker", "kd-ranker", "--config.teacher.opt"
    asked = f"""
{script}
COMP_WORDS=(kd-ranker sweep {word}); COMP_CWORD=2; {start}; echo "${{COMPREPLY[@]}}"
COMP_WORDS=(kd-ranker train); COMP_CWORD=1; {start}; echo "${{COMPREPLY[@]}}"
"""
    keys, commands = subprocess.run(
        ["bash", "-c", asked], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    expected = {f"--config.{key}" for key in KEYS if key.startswith("teacher.opt")}
    assert {*keys.split()} == expected
    assert {*commands.split()} == {"train", "train-teacher"}
