"""What runs on a cluster of Ray, with a stand-in for Ray; `tests/cluster` has the real one."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from kd_ranker import main
from kd_ranker.configs import cascade
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.errors import UserError
from kd_ranker.pipeline import cluster
from tests.faults import fault_of


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class OneMachine:
    """Calls what is sent here and now, the last one first, from bytes as another machine would."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self):
        self.opened, self.called = True, []

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def shutdown(self):
        self.opened = False

    def remote(self, function):
        self.function = function
        return self

    def options(self, **options):
        self.wanted = options
        return SimpleNamespace(remote=lambda *arguments: pickle.dumps((self.function, arguments)))

    def wait(self, waiting, num_returns):
        assert num_returns == 1
        return [waiting[-1]], waiting[:-1]

    def get(self, sent):
        function, arguments = pickle.loads(sent)
        self.called.append(arguments)
        try:
            function(*arguments)
        except UserError as error:
            raise RayTaskError(error) from error
        except SystemExit as error:
            raise RayError from error


@pytest.fixture
def ray(monkeypatch, tmp_path):
    """The stand-in; calls run in a folder of the test."""
    found = OneMachine()
    monkeypatch.setattr(cluster, "_open", lambda address: found)
    monkeypatch.chdir(tmp_path)
    return found


def call(function, *numbers, **resources):
    config = cascade("small")
    config.ray.update(resources)
    cluster.call_on_cluster(config, function, [(number,) for number in numbers], "marks")


def mark(number):
    if number == 99:
        raise SystemExit
    if number < 0:
        raise UserError(f"{number} is no number")
    Path(f"mark{number}").touch()


def test_calls_are_made_in_the_same_folder(ray, tmp_path):
    call(mark, 1, 4, 9, cpus=2, retries=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mark1", "mark4", "mark9"]
    assert (ray.wanted["num_cpus"], ray.wanted["max_retries"]) == (2, 5)
    assert not ray.opened


@pytest.mark.parametrize(
    ("numbers", "resources", "fault", "calls"),
    [
        ((1, 4, -1), {}, "marks on the cluster: -1 is no number", 1),
        ((1, 4, 99), {}, "marks: a task lost its machine more than ray.retries=3 times; start", 1),
        ((1,), {"gpus": 1}, "no machine of the cluster has ray.cpus=1 and ray.gpus=1; choo", 0),
    ],
)  # fmt: skip
def test_a_call_that_fails_ends_all_of_them(ray, numbers, resources, fault, calls):
    assert fault_of(call, mark, *numbers, **resources).startswith(fault)
    assert len(ray.called) == calls
    assert not ray.opened


MY_LOSS = """
from kd_ranker import configs
from kd_ranker.distillation.losses import LOSSES, Loss, bce

LOSSES["of_mine"] = Loss(bce)

def get_config(variant=""):
    config = configs.cascade("small")
    config.distill.loss = "of_mine"
    return config
"""


def need_loss(name):
    assert name in LOSSES


def test_a_config_file_that_registers_a_loss_runs_in_the_tasks(ray, tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "of_mine", None)  # removed when the test ends
    file = tmp_path / "my_loss.py"
    file.write_text(MY_LOSS)
    config = main.read_config("my_loss.py")
    assert config.registered_by == str(file)

    def call_elsewhere():
        """As on a machine that has not read the file."""
        LOSSES.pop("of_mine", None)
        cluster.register.cache_clear()
        cluster.call_on_cluster(config, need_loss, [("of_mine",)], "a look")

    call_elsewhere()
    file.unlink()
    with pytest.raises(UserError, match=r"my_loss\.py, which registers .* is not on "):
        call_elsewhere()
    file.write_text("1 / 0")
    with pytest.raises(UserError, match=r"my_loss\.py does not load: ZeroDivisionError"):
        call_elsewhere()
