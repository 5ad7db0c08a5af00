import numpy as np
import pytest

from kd_ranker.training.optimizers import SCHEDULES


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 0), (20, 50), (1, 0)])
def test_schedules_reach_their_peak_and_never_stand_still(name, steps, warmup):
    schedule = SCHEDULES[name](steps, warmup)
    factors = np.array([float(schedule(step)) for step in range(1, steps + 1)])
    assert factors[: max(steps - 1, 1)].min() > 0 or steps == 1
    assert factors.max() <= 1 + 1e-6
    if warmup < steps:
        assert factors.max() > 0.97 or steps == 1
    if name == "cosine":
        assert factors[-1] == pytest.approx(0.0, abs=1e-6)
    elif warmup < steps:
        assert factors[-1] == pytest.approx(1.0)
