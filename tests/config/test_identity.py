"""Datasets, teachers and students by all that makes them."""

from kd_ranker.config import identity
from kd_ranker.config.identity import dataset_name
from kd_ranker.configs import cascade
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.checkpoints import differences


def name(teacher="", **changes):
    config = cascade("small")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return dataset_name(config, teacher)


def test_the_name_follows_what_is_in_the_dataset_and_not_where_it_lies():
    assert name() == name(data__dir="elsewhere") == name(funnel__report_at=(5, 7))
    assert name() == name(funnel__targets=(0.5,))
    assert name() == name(student__width=8, train__steps=7, seed=3)
    others = [name(data__seed=1), name(tasks=("watch",)), name(funnel__passed=20)]
    assert len({name(), *others}) == 4


def test_a_scored_copy_is_named_after_its_teacher_and_the_stage_that_was_scored():
    assert name("abc") == f"{name()}-teacher-abc-retrieved"
    assert name("abc", teacher__stage="passed") == f"{name()}-teacher-abc-passed"


def config_with(**changes):
    config = cascade("small")
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return config


def of_student(dataset="d", teacher="t", name="a", **changes):
    return identity.of_students({name: config_with(**changes)}, {"dataset": dataset}, teacher)


def of_teacher(dataset="d", **changes):
    return identity.of_teacher(config_with(**changes), {"dataset": dataset})


def test_what_a_student_is_made_of_makes_another_one():
    before = of_student()
    for changes in (
        {"seed": 1},
        {"batch__seed": 1},
        {"train__steps": 30},
        {"distill__weight": 3.0},
        {"student__width": 8},
        {"teacher__stage": "passed"},
        {"funnel__passed": 20},
        {"dataset": "another"},
        {"teacher": "another"},
        {"name": "b"},
    ):
        assert of_student(**changes) != before, changes


def test_what_a_student_does_not_depend_on_leaves_it_the_same():
    changes = {f"train__{key}_every": 7 for key in ("log", "checkpoint", "eval")}
    changes |= {"train__eval_limit": 3, "evaluation__limit": 3, "funnel__report_at": (5,)}
    changes |= {"funnel__targets": (0.5,)}
    changes |= {"sweep__seeds": (4, 5), "data__dir": "elsewhere", "teacher__workdir": "elsewhere"}
    assert of_student(**changes) == of_student()


def test_a_teacher_is_not_made_of_what_students_are():
    before = of_teacher()
    same = {"batch__seed": 1, "train__steps": 30, "distill__weight": 3.0, "student__width": 8}
    assert of_teacher(**same, teacher__train__log_every=7) == before
    for changes in (
        {"seed": 1},
        {"teacher__batch__seed": 1},
        {"teacher__train__steps": 30},
        {"teacher__width": 8},
        {"dataset": "another"},
    ):
        assert of_teacher(**changes) != before, changes


def test_the_order_of_members_is_part_of_what_they_are():
    members = {"a": config_with(seed=0), "b": config_with(seed=1)}
    swapped = dict(reversed(members.items()))
    assert identity.of_members(members) != identity.of_members(swapped)


def test_a_config_that_was_written_and_read_is_the_same(tmp_path):
    config = config_with()
    workdirs.write_config(tmp_path, "train", config, {"dataset": "d"})
    read = workdirs.read_config(tmp_path)
    assert identity.of_members({"": read}) == identity.of_members({"": config})


def test_differences_name_what_is_not_shared():
    here = {"members": "a, b", "teacher": "t"}
    assert differences(here, here) == ""
    assert differences({"members": "a, c", "teacher": "t"}, here) == ("members (c there, b now)")
    assert differences({"members": "a, b"}, here) == "teacher (no other there, t now)"
    assert differences(here, {"teacher": "u"}) == (
        "teacher (t there, u now), members (a, b there, no other now)"
    )
