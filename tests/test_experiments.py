import json
import os
import signal
import socket
import subprocess
import sys
import tomllib

import pytest

from kd_ranker import api, configs, main
from kd_ranker.config import checks, defaults
from kd_ranker.config.keys import DATA_KEYS, KEYS
from kd_ranker.config.runs import sweep_runs
from kd_ranker.errors import UserError, command
from kd_ranker.evaluation import results
from kd_ranker.training import workdir as workdirs
from tests import small
from tests.faults import fault_of
from tests.small import CONFIG, ROOT

# Checkpoints, evaluations and lines at steps of their own.
OFTEN = {"train__log_every": 1, "train__checkpoint_every": 3, "train__eval_every": 5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/nope.py"], "--config=configs/nope.py: there is no file configs/nope"),
        (["--config=configs/cascade.py:huge"], "no variant :huge; the variants are: :items"),
        ([CONFIG, "--config.train.step=3"], "'train.step' does not exist; did you mean 'train.ste"),
        ([CONFIG, "--config.bogus", "3"], "config key 'bogus' does not exist; docs/config.md"),
        ([CONFIG, "--noconfig.distill.afine"], "did you mean 'distill.affine'?"),
        ([CONFIG, "--config.train.steps=abc"], "--config.train.steps=abc"),
        ([CONFIG, "--bogus"], "Unknown command line flag 'bogus'"),
        ([CONFIG, "more"], "'more' is not a flag; flags look like --name=value"),
        ([CONFIG, "--workdir="], "--workdir is missing; it is the folder for the files of the run"),
        ([], "--config is missing; give one, such as --config=configs/cascade.py"),
        (["report", "--config.seed=3"], "'--config.seed=3' is not a flag of this command, which"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_flags_is_one_line_and_exit_code_2(
    flags, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(ROOT)
    name, *flags = flags if flags[:1] == ["report"] else ["train", *flags]
    with pytest.raises(SystemExit) as caught:
        main.run_command(main.COMMANDS[name], name, [f"--workdir={tmp_path / 'w'}", *flags])
    assert caught.value.code == 2
    output, line = capsys.readouterr()
    assert message in line
    assert line.startswith("error: ")
    assert (output, line.count("\n")) == ("", 1)
    assert not (tmp_path / "w").exists()


def test_a_config_file_that_does_not_load_says_why(tmp_path):
    file = tmp_path / "config.py"
    for text, message in (
        ("import kd_rankerr\n", "does not load: ModuleNotFoundError: No module named 'kd_rankerr'"),
        ("config = 3\n", "does not load: KeyError: 'get_config'"),
    ):
        file.write_text(text)
        assert message in fault_of(main.read_config, str(file))


A_CONFIG = """
from kd_ranker.configs import cascade

def get_config(variant=""):
    return cascade("small")

def sweep(config, variant=""):
    for weight in (0.1, 3.0):
        yield {{"distill.weight": weight * config.optimizer.learning_rate, "seed": {seed}}}
"""


def test_the_runs_of_a_config_file_see_the_flags(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(A_CONFIG.format(seed="int(variant or 0)"))

    config = main.read_config(f"{file}:7", ["--config.optimizer.learning_rate=10"])

    assert config.sweep.runs == (
        {"distill.weight": 1.0, "seed": 7},
        {"distill.weight": 30.0, "seed": 7},
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return []", "does not load: the sweep yields no run"),
        ("return ['aux']", "does not load: run 0 of the sweep is 'aux'; it must be a dict"),
        (
            "return [{'distil.mode': 'aux'}]",
            "run 0 of the sweep sets 'distil.mode', which no sweep",
        ),
        (
            "return [{'seed': 1}, {'seed': 1}]",
            "runs 0 and 1 of the sweep are the same: {'seed': 1}",
        ),
        ("return 1 / 0", "does not load: ZeroDivisionError: division by zero"),
    ],
)
def test_a_bad_list_of_runs_is_one_line(tmp_path, body, message):
    file = tmp_path / "config.py"
    before, _, _ = A_CONFIG.partition("    for weight")
    file.write_text(f"{before}    {body}\n")

    def load():
        checks.validate(main.read_config(str(file)))

    assert message in fault_of(load)


@pytest.mark.parametrize("key", ["sweep.ways", "distill.terms", "teacher.signal"])
def test_a_key_of_an_earlier_version_names_the_new_one(key):
    fault = fault_of(main.read_config, "cascade:small", [f"--config.{key}=x"])
    assert fault.startswith(f"config key '{key}' is of an earlier version; ")


def parsed(name, *flags):
    """The config of a command with these flags."""
    command = main.COMMANDS[name]
    config, _ = main._parse(command, main._parser(command, name), flags)
    return config


def test_a_sweep_resumes_without_its_config_file(world):
    workdir = world.sweep()
    stored = workdirs.read_config(workdir)

    config = parsed("sweep", f"--workdir={workdir}", "--config.sweep.extend=True")

    assert config.sweep.extend
    assert sweep_runs(config).keys() == sweep_runs(stored).keys()


def test_a_run_of_a_registered_loss_resumes_with_its_config(tmp_path):
    config = configs.cascade("small")
    config.registered_by = str(tmp_path / "my_loss.py")
    config.distill.loss = "mine"
    (tmp_path / workdirs.CONFIG_FILE).write_text(config.to_json())

    fault = fault_of(parsed, "sweep", f"--workdir={tmp_path}")

    assert fault.endswith("to resume it, name that file in --config")


def test_a_workdir_without_a_run_needs_a_config(tmp_path):
    assert fault_of(parsed, "sweep", f"--workdir={tmp_path}").startswith("--config is missing")


@pytest.mark.parametrize("given", ["cascade:small", "configs/cascade.py:small"])
def test_the_package_has_its_configs_in_any_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.read_config(given).to_dict() == configs.cascade("small").to_dict()
    assert main.read_config("sweeps/cascade").to_dict() == configs.sweeps.cascade().to_dict()


def test_flags_override_keys_by_the_types_of_these():
    flags = ["--config.train.steps=3", "--noconfig.distill.affine", "--config.tasks", "('like',)"]
    flags += ["--config.sweep.weights=(0.3, 1.0)", "--config.seed", "-3"]
    config = main.read_config("cascade:small", flags)
    assert (config.train.steps, config.seed, config.distill.affine) == (3, -3, False)
    assert (config.tasks, config.sweep.weights) == (("like",), (0.3, 1.0))


def test_a_home_folder_is_found_in_the_paths_of_a_config(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = defaults.get_config("parquet")
    config.data.path, config.teacher.workdir = "~/log/*.parquet", "runs/~"
    own = api._copied(config)
    assert own.data.path == str(tmp_path / "log/*.parquet")
    assert own.teacher.workdir == "runs/~"
    assert config.data.path == "~/log/*.parquet"


def test_a_command_prints_its_result_or_one_line_of_error(world, tmp_path):
    data, file = world.root / "datasets", tmp_path / "file"
    finished = kd_ranker("prepare", CONFIG, f"--config.data.dir={data}", "--thorough")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"dataset: {data}")
    file.write_text("")
    movielens = ["--config=configs/movielens.py", "--config.data.path=/absent"]
    for name, flags, message in (
        ("train", world.flags(file), str(file)),
        ("prepare", movielens, "/absent/u.data does not ex"),
    ):
        finished = kd_ranker(name, *flags)
        assert finished.returncode == 2, finished.stderr
        (line,) = finished.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert finished.stdout == ""


@pytest.mark.slow
def test_an_interrupted_run_resumes_and_ends_the_same(world, tmp_path, caplog):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    config, flags = world.config(**OFTEN), world.flags(stopped, **OFTEN)
    api.train(config, whole)
    for number, moment, step in (
        (signal.SIGKILL, "logging", 5),
        (signal.SIGTERM, "logging", 8),
        (signal.SIGKILL, "saving", 12),
        (signal.SIGHUP, "logging", 16),
    ):
        program = number, "experiments.train", moment, "stopped", step
        finished = small.run_and_signal(*program, flags)
        assert not (stopped / results.FILE).exists()
        if number == signal.SIGKILL:
            assert finished.returncode == -number
            continue
        assert finished.returncode == 128 + number
        # Threads of others may write too as the process ends.
        lines = [
            line for line in finished.stderr.splitlines() if line.startswith(("stopped", "error"))
        ]
        assert len(lines) == 1
        assert lines[0].startswith(f"stopped by {signal.Signals(number).name}; ")
        last = max(int(path.name) for path in (stopped / "checkpoints").iterdir())
        # The signal may reach the main thread a step later.
        assert step <= last <= step + 1
        assert not list(stopped.glob(".*"))
    api.train(config, stopped)
    assert "damaged" not in caplog.text
    for name in (results.FILE, "metrics.jsonl"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    lines = (stopped / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))


@pytest.mark.slow
def test_a_workdir_is_held_by_its_run_until_that_ends_or_dies(world, tmp_path):
    whole = world.made("shared", lambda folder: api.train(world.config(), folder))
    workdir = tmp_path / "held"
    with small.stopped("experiments.train", "held", 15, world.flags(workdir)) as first:
        before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
        # By the same run, and by whatever else writes to the folder, before it reads there that the
        # folder belongs to a run of train.
        for command in (
            lambda: api.train(world.config(), workdir),
            lambda: api.sweep(world.config(), workdir),
            lambda: api.train_teacher(world.config(), workdir),
            lambda: api.report(workdir),
        ):
            with pytest.raises(UserError) as caught:
                command()
            who = f"process {first.pid} on {socket.gethostname()} since 20"
            assert str(caught.value).startswith(f"{workdir} is held by {who}")
        assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    assert first.returncode == -signal.SIGKILL
    api.train(world.config(), workdir)
    for name in (results.FILE, "metrics.jsonl"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()
    assert not list(workdir.glob(".lock*"))


def test_nothing_that_the_entry_points_import_is_tensorflow():
    program = "import sys, kd_ranker.api; sys.exit('tensorflow' in sys.modules)"
    assert small.run("-c", program).returncode == 0
    assert "tensorflow" not in sys.modules


def kd_ranker(*arguments):
    """What the console command of the package does."""
    return small.run("-m", "kd_ranker", *arguments)


def test_each_command_has_a_module_and_is_listed_without_a_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"kd-ranker": "kd_ranker.main:main"}
    texts = [path.read_text() for path in (ROOT / "experiments").glob("[a-z]*.py")]
    called = {name for name in main.COMMANDS for text in texts if f'main("{name}")' in text}
    assert (called, len(texts)) == ({*main.COMMANDS}, len(main.COMMANDS))
    for name in main.COMMANDS:
        assert command(name) == f"kd-ranker {name}"
    listed, unknown = kd_ranker(), kd_ranker("swep")
    assert listed.returncode == 0
    assert all(f"    {name} " in listed.stdout for name in main.COMMANDS)
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: no command 'swep'; choose from run, prepare, train-te")


def test_help_has_an_example_and_every_key_with_its_value():
    shown = kd_ranker("sweep", "--help", "--config=cascade:small")
    assert shown.returncode == 0, shown.stderr
    assert "Train the students of a list of runs" in shown.stdout
    assert "    kd-ranker sweep --config=configs/sweeps/cascade.py --workdir=runs" in shown.stdout
    words = shown.stdout.split()
    assert {f"--config.{key}" for key in KEYS | DATA_KEYS["cascade"]} <= {*words}
    assert words[words.index("--config.data.num_users") + 1] == "50"  # 4000 without :small
    help_of_steps = " ".join(words[words.index("--config.train.steps") + 1 :][:3])
    assert help_of_steps == f"20 {KEYS['train.steps'].help}"


def test_help_is_legible_in_ascii_and_ends_with_its_reader():
    script = "from kd_ranker.main import main; main()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, "sweep", "--help"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout.readline().startswith(b"usage: kd-ranker sweep")
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_a_benchmark_writes_what_it_promises(tmp_path):
    """The shape of the JSON; whether a bar is met is measured by hand, on a quiet machine."""
    path = tmp_path / "layout.json"
    finished = small.run("-m", "scripts.bench", "layout", "--runs=2", f"--json={path}")
    assert finished.returncode == 0, finished.stderr
    written = json.loads(path.read_text())
    assert json.loads(finished.stdout) == written
    assert {"name", "ratio", "bar", "passed", "floor", "device", "versions"} <= written.keys()
    assert written["passed"] == (written["ratio"] <= written["bar"])
