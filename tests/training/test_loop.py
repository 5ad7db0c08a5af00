import pytest

from kd_ranker.training import loop


@pytest.mark.parametrize("eval_every", [0, 6])
def test_steps_are_taken_at_once_up_to_the_next_output_or_end(eval_every):
    ends = {"short": 7, "long": 23, "as_long": 23}
    outputs = loop.Outputs(
        log_every=4, checkpoint_every=10, eval_every=eval_every, ends=ends, halving=(9,)
    )
    stops = {4, 7, 8, 9, 10, 12, 16, 20, 23} | ({6, 18} if eval_every else set())
    for step in range(23):
        expected = min(stop for stop in stops if stop > step)
        assert outputs.next_stop(step) == expected
