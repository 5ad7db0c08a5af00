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
        self.asked = options
        return SimpleNamespace(remote=lambda *arguments: pickle.dumps((self.function, arguments)))

    def wait(self, waiting, num_returns):
        assert num_returns == 1
        return [waiting[-1]], waiting[:-1]

    def get(self, sent):
        function, arguments = pickle.loads(sent)
        self.called.append(arguments)
        try:
            return function(*arguments)
        except UserError as error:
            raise RayTaskError(error) from error
        except SystemExit as error:
            raise RayError from error


@pytest.fixture
def ray(monkeypatch):
    found = OneMachine()
    monkeypatch.setattr(cluster, "_open", lambda address: found)
    monkeypatch.chdir(Path.cwd())  # where a call has changed it, back to this one
    return found


def square_root(number, folder):
    if number == 99:
        raise SystemExit
    if number < 0:
        raise UserError(f"{number} has none")
    return number**0.5, Path.cwd() == folder


def test_results_come_in_the_order_of_the_calls_and_are_made_in_the_same_folder(
    ray, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = cascade("small")
    config.ray.update(cpus=2, retries=5)
    calls = [(number, tmp_path) for number in (1, 4, 9)]
    found = cluster.call_on_cluster(config, square_root, calls, "roots")
    assert found == [(1, True), (2, True), (3, True)]
    assert (ray.asked["num_cpus"], ray.asked["max_retries"]) == (2, 5)
    assert not ray.opened


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (-1, "roots on the cluster: -1 has none"),
        (99, "roots: a task lost its machine more than 3 times; what was saved stays: start again"),
    ],
)
def test_a_call_that_fails_is_told_at_once_before_those_ahead_of_it_end(ray, bad, fault):
    calls = [(number, Path()) for number in (1, 4, bad)]
    with pytest.raises(UserError) as caught:
        cluster.call_on_cluster(cascade("small"), square_root, calls, "roots")
    assert str(caught.value) == fault
    assert len(ray.called) == 1
    assert not ray.opened


def test_a_machine_with_too_little_is_told_before_anything_is_sent(ray):
    config = cascade("small")
    config.ray.gpus = 1
    with pytest.raises(UserError, match="the most are 2 and 0"):
        cluster.call_on_cluster(config, square_root, [(1, Path())], "roots")
    assert not ray.called


MY_LOSS = """
from kd_ranker import configs
from kd_ranker.distillation.losses import LOSSES, Loss, bce

LOSSES["of_mine"] = Loss(bce)

def get_config(variant=""):
    config = configs.cascade("small")
    config.distill.loss = "of_mine"
    return config
"""


def names_a_loss(name):
    return name in LOSSES


def test_a_config_file_that_registers_a_loss_runs_where_the_tasks_do(ray, tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "of_mine", None)  # removed when the test ends
    file = tmp_path / "my_loss.py"
    file.write_text(MY_LOSS)
    monkeypatch.chdir(tmp_path)
    config = main.read_config("my_loss.py")
    assert config.registered_by == str(file)
    del LOSSES["of_mine"]  # as on another machine
    cluster.register.cache_clear()

    def look():
        return cluster.call_on_cluster(config, names_a_loss, [("of_mine",)], "a look")

    assert look() == [True]
    file.unlink()
    cluster.register.cache_clear()
    with pytest.raises(UserError, match=r"my_loss\.py, which registers .* is not on "):
        look()
    file.write_text("1 / 0")
    with pytest.raises(UserError, match=r"my_loss\.py does not load: ZeroDivisionError"):
        look()


@pytest.mark.parametrize("name", ["cascade:small", "configs/sweeps/cascade.py"])
def test_a_config_of_the_package_registers_nothing(name):
    config = main.read_config(f"{name}")
    assert config.registered_by == ""
