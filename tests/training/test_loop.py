import io

import pytest
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.training import loop
from kd_ranker.training.loop import skip_steps


def test_steps_that_are_skipped_do_not_count_as_pace():
    now = 0.0
    with tqdm(total=4000, file=io.StringIO(), mininterval=0) as bar:
        # A clock of its own: on a busy machine, the real one may stop anywhere.
        bar._time, bar.start_t, bar.last_print_t = lambda: now, now, now
        now = 1.0
        skip_steps(bar, 1000)
        assert (bar.n, bar.initial) == (1000, 1000)
        now = 3.0
        bar.update(1)
        assert bar.format_dict["n"] - bar.format_dict["initial"] == 1
        # A rate that took the skipped steps for work would be a thousand times this.
        assert bar.format_dict["rate"] == pytest.approx(0.5, rel=0.5)


def test_a_bar_that_is_not_shown_is_left_alone():
    skip_steps(tqdm(total=10, disable=True), 5)


@pytest.mark.parametrize("eval_every", [0, 6])
def test_steps_are_taken_at_once_up_to_the_next_output_or_end_of_a_member(eval_every):
    train = ConfigDict({"log_every": 4, "checkpoint_every": 10, "eval_every": eval_every})
    stops = {4, 7, 8, 10, 12, 16, 20, 23} | ({6, 18} if eval_every else set())
    for step in range(23):
        expected = min(stop for stop in stops if stop > step)
        assert loop._next_stop(step, [7.0, 23.0, 23.0], train) == expected
