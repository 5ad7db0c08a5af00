import io

from tqdm import tqdm

from kd_ranker.training import loop
from kd_ranker.training.loop import skip_steps


def test_steps_that_are_skipped_do_not_count_as_pace():
    with tqdm(total=4000, file=io.StringIO(), mininterval=0) as bar:
        skip_steps(bar, 1000)
        assert (bar.n, bar.initial) == (1000, 1000)
        bar.update(1)
        # A rate that took the skipped steps for work would be a thousand times the real one.
        elapsed = bar.format_dict["elapsed"]
        assert bar.format_dict["n"] - bar.format_dict["initial"] == 1
        assert bar.format_dict["rate"] is None or bar.format_dict["rate"] < 10 / max(elapsed, 1e-9)


def test_a_bar_that_is_not_shown_is_left_alone():
    skip_steps(tqdm(total=10, disable=True), 5)


def test_unknown_ids_are_those_of_the_group_that_trained_on_most():
    groups = [{"item": 1, "user": 0}, {"item": 5, "user": 0}]
    assert loop._unknown_ids(groups) == {"unknown_ids/item": 5, "unknown_ids/user": 0}
