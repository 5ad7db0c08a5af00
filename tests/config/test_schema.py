"""The table of keys, and the config values by which datasets, teachers and students are known."""

import pytest

from kd_ranker.config.schema import fingerprint
from kd_ranker.configs import cascade
from kd_ranker.pipeline.datasets import dataset_name
from kd_ranker.training import workdir as workdirs


def config_with(**changes):
    config = cascade("small")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def name(teacher="", **changes):
    return dataset_name(config_with(**changes), teacher)


def of_student(name="a", **changes):
    return fingerprint({name: config_with(**changes)}, "student")


def of_teacher(**changes):
    return fingerprint({"": config_with(**changes)}, "teacher")


def test_the_name_of_a_dataset_depends_on_its_content_only():
    assert name() == name(data__dir="elsewhere") == name(funnel__report_at=(5, 7))
    assert name() == name(funnel__targets=(0.5,))
    assert name() == name(student__width=8, train__steps=7, seed=3)
    others = [name(data__seed=1), name(tasks=("watch",)), name(funnel__passed=20)]
    assert len({name(), *others}) == 4


def test_a_scored_copy_is_named_after_its_teacher_and_the_stage_that_was_scored():
    assert name("abc") == f"{name()}-teacher-abc-retrieved"
    assert name("abc", teacher__stage="passed") == f"{name()}-teacher-abc-passed"


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"batch__seed": 1}, {"train__steps": 30}, {"distill__weight": 3.0},
    {"student__width": 8}, {"teacher__stage": "passed"}, {"funnel__passed": 20}, {"name": "b"},
])  # fmt: skip
def test_a_value_that_influences_a_student_changes_its_fingerprint(change):
    assert of_student(**change) != of_student()


def test_a_value_without_influence_does_not():
    changes = {f"train__{key}_every": 7 for key in ("log", "checkpoint", "eval")}
    changes |= {"train__eval_limit": 3, "evaluation__limit": 3, "funnel__report_at": (5,)}
    changes |= {"funnel__targets": (0.5,), "sweep__seeds": (4, 5)}
    changes |= {"data__dir": "elsewhere", "teacher__workdir": "elsewhere"}
    assert of_student(**changes) == of_student()
    changes |= {"batch__seed": 1, "train__steps": 30, "distill__weight": 3.0, "student__width": 8}
    assert of_teacher(**changes) == of_teacher()
    for key in ("seed", "teacher__batch__seed", "teacher__train__steps", "teacher__width"):
        assert of_teacher(**{key: 8}) != of_teacher()


def test_the_order_of_members_is_part_of_their_fingerprint():
    members = {"a": config_with(seed=0), "b": config_with(seed=1)}
    swapped = dict(reversed(members.items()))
    assert fingerprint(members, "student") != fingerprint(swapped, "student")


def test_a_config_that_was_written_and_read_is_the_same(tmp_path):
    config = config_with()
    workdirs.write_config(tmp_path, "train", config, {"dataset": "d"})
    read = workdirs.read_config(tmp_path)
    assert fingerprint({"": read}, "student") == fingerprint({"": config}, "student")
