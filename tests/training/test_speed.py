import pytest

from kd_ranker.training import speed
from kd_ranker.training.speed import SpeedMeter


class Clock:
    """A clock that stands still until it is moved on."""

    seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(speed, "matrix_rate", lambda: 1000.0)
    return Clock()


def test_rates_and_shares_are_those_since_the_last_restart(clock):
    meter = SpeedMeter(clock)
    clock.seconds += 50
    meter.add_steps(1000)
    meter.restart()

    with meter.spent_on("data"):
        clock.seconds += 1
    meter.add_steps(6)
    clock.seconds += 5
    with meter.spent_on("evaluation"):
        clock.seconds += 2
    meter.add_steps(10)
    with meter.spent_on("data"):
        clock.seconds += 1
    with meter.spent_on("checkpoint"):
        clock.seconds += 1
    found = meter.scalars(requests=32, candidates=20, flops=50.0)

    # 16 steps in 10 seconds, of which 5 went to the steps.
    assert found.pop("device/memory", 0) >= 0
    assert found == pytest.approx({
        "speed/steps": 1.6, "speed/requests": 51.2, "speed/candidates": 1024,
        "time/step": 0.5, "time/data": 0.2, "time/evaluation": 0.2, "time/checkpoint": 0.1,
        "device/flops": 0.08,
    })  # fmt: skip


def test_without_steps_there_is_nothing_to_say(clock):
    meter = SpeedMeter(clock)
    clock.seconds += 1
    assert meter.scalars(requests=32, candidates=20, flops=50.0) == {}


def test_a_large_product_has_a_rate():
    assert speed.matrix_rate() > 1e8
