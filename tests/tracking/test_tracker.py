from pathlib import Path

from tests.tracking.recorded import TRACKED, RecordedRuns


def tracker_of(**changes):
    tracker = RecordedRuns()
    tracker.start(TRACKED._replace(**changes))
    tracker.begin(Path("."), 0)
    return tracker


def test_each_run_of_a_sweep_gets_its_scalars_by_their_plain_names():
    tracker = tracker_of()
    scalars = {"loss/aux": 1.0, "loss/none/1": 2.0, "eval/auc/like/aux": 3.0, "unknown_ids/item": 4}
    tracker.write(5, scalars)
    assert tracker.calls == [
        ("open", "", {"train.steps": 20}),
        ("write", "aux", 5, {"loss": 1.0, "eval/auc/like": 3.0, "unknown_ids/item": 4}),
        ("write", "none/1", 5, {"loss": 2.0, "unknown_ids/item": 4}),
    ]


def test_a_run_that_has_ended_gets_no_scalars_of_the_others():
    tracker = tracker_of()
    tracker.write(5, {"loss/aux": 1.0, "loss/none/1": 2.0})
    tracker.write(6, {"loss/aux": 1.0})
    tracker.write(6, {"speed/steps": 9.0})
    assert tracker.calls[-2:] == [
        ("write", "aux", 6, {"loss": 1.0}),
        ("write", "aux", 6, {"speed/steps": 9.0}),
    ]
    # Nor does one of the next cohort's before it has some of its own.
    tracker.begin(Path("."), 0)
    tracker.write(1, {"speed/steps": 9.0})
    assert len(tracker.calls) == 5


def test_without_a_sweep_the_scalars_are_those_of_the_command():
    tracker = tracker_of(command="train", runs={})
    tracker.write(5, {"loss": 1.0, "eval/auc/like": 3.0})
    assert tracker.calls[-1] == ("write", "", 5, {"loss": 1.0, "eval/auc/like": 3.0})


def test_a_part_leaves_the_page_of_the_sweep_to_others():
    assert tracker_of(is_part=True).calls == []


def test_ids_of_runs_differ_and_have_no_character_that_is_refused():
    tracker = tracker_of()
    assert tracker.id_of("") == TRACKED.id
    assert tracker.id_of("aux") != tracker.id_of("none/1")
    assert set(tracker.id_of("none/1")) <= set("0123456789abcdef-")
