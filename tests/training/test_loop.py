import pytest
from ml_collections import ConfigDict

from kd_ranker.training import loop


@pytest.mark.parametrize("eval_every", [0, 6])
def test_steps_are_taken_at_once_up_to_the_next_output_or_end_of_a_member(eval_every):
    train = ConfigDict({"log_every": 4, "checkpoint_every": 10, "eval_every": eval_every})
    stops = {4, 7, 8, 10, 12, 16, 20, 23} | ({6, 18} if eval_every else set())
    for step in range(23):
        expected = min(stop for stop in stops if stop > step)
        assert loop._next_stop(step, [7.0, 23.0, 23.0], train) == expected
