import signal
import time

import pytest

from kd_ranker.training.interruption import until_interrupted


class Asked(BaseException):
    pass


def ask(*_):
    raise Asked


@pytest.fixture
def alarm():
    before = signal.signal(signal.SIGALRM, ask)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, 0.05)
    signal.signal(signal.SIGALRM, before)


def test_work_without_interruption_gives_its_value_or_its_error():
    assert until_interrupted(lambda stop: stop()) is False
    with pytest.raises(ZeroDivisionError):
        until_interrupted(lambda _: 1 / 0)


def test_interrupted_work_ends_in_its_own_good_time_before_the_interruption_goes_on(alarm):
    steps = []

    def work(stop):
        alarm()
        while not stop():
            steps.append("step")
            time.sleep(0.01)
        steps.append("saved")

    with pytest.raises(Asked):
        until_interrupted(work)
    assert steps[0] == "step"
    assert steps[-1] == "saved"


def test_interrupted_work_that_cannot_end_well_says_why(alarm):
    def work(stop):
        alarm()
        while not stop():
            time.sleep(0.01)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room") as caught:
        until_interrupted(work)
    assert isinstance(caught.value.__context__, Asked)
