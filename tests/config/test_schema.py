"""The table of keys, and the config values by which datasets, teachers and students are known."""

import pytest

from kd_ranker.config.schema import digest_of
from kd_ranker.configs import cascade
from kd_ranker.pipeline.datasets import dataset_name, scores_folder
from kd_ranker.training import workdir as workdirs


def config_with(changes):
    config = cascade("small")
    config.update_from_flattened_dict(changes)
    return config


def identities(changes):
    """The name of the dataset, and the provenance of a student and of a teacher."""
    config = config_with(changes)
    of_roles = (digest_of({"": config}, role) for role in ("student", "teacher"))
    return (dataset_name(config), *of_roles)


NOTHING = {f"train.{key}_every": 7 for key in ("log", "checkpoint", "eval")} | {
    "train.eval_limit": 3, "evaluation.limit": 3, "sweep.seeds": (4, 5),
    "funnel.report_at": (5,), "funnel.targets": (0.5,),
    "data.dir": "elsewhere", "teacher.workdir": "elsewhere",
}  # fmt: skip
STUDENT_ONLY = {"batch.seed": 1, "train.steps": 30, "distill.weight": 3.0, "student.width": 8}


@pytest.mark.parametrize(
    ("changes", "differ"),
    [
        (NOTHING, (False, False, False)),
        *(({key: value}, (False, True, False)) for key, value in STUDENT_ONLY.items()),
        ({"teacher.stage": "passed"}, (False, True, False)),
        ({"seed": 8}, (False, True, True)),
        *(
            ({f"teacher.{key}": 8}, (False, True, True))
            for key in ("batch.seed", "train.steps", "width")
        ),
        ({"data.seed": 1}, (True, False, False)),
        ({"tasks": ("watch",)}, (True, True, True)),
        ({"funnel.passed": 20}, (True, True, True)),
    ],
    ids=str,
)
def test_a_value_changes_the_identity_of_what_it_influences(changes, differ):
    pairs = zip(identities(changes), identities({}), strict=True)
    assert tuple(one != other for one, other in pairs) == differ


def test_a_later_key_at_its_default_keeps_dataset_names():
    # The name before `data.noise` existed.
    assert dataset_name(config_with({"data.noise": 1.0})) == "cascade-e8262a86"
    assert dataset_name(config_with({"data.noise": 2.0})) != "cascade-e8262a86"


def test_a_scored_copy_is_named_after_its_teacher_and_stage():
    for stage in ("retrieved", "passed"):
        config = config_with({"teacher.stage": stage})
        expected = f"{dataset_name(config)}-teacher-abc-{stage}"
        assert scores_folder(config, "abc").name == expected


def test_a_digest_covers_the_order_and_names_of_runs():
    runs = {"a": config_with({"seed": 0}), "b": config_with({"seed": 1})}
    renamed = {"a": runs["a"], "c": runs["b"]}
    of = [digest_of(each, "student") for each in (runs, dict(reversed(runs.items())), renamed)]
    assert len(set(of)) == 3


def test_a_config_that_was_written_and_read_is_the_same(tmp_path):
    config = config_with({})
    workdirs.write_config(tmp_path, "train", config, {"dataset": "d"})
    read = workdirs.read_config(tmp_path)
    assert digest_of({"": read}, "student") == digest_of({"": config}, "student")
