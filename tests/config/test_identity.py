"""The name of a dataset follows its contents."""

from configs import cascade
from kd_ranker.config.identity import dataset_name


def name(teacher="", **changes):
    config = cascade.get_config("small")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return dataset_name(config, teacher)


def test_the_name_follows_what_is_in_the_dataset_and_not_where_it_lies():
    assert name() == name(data__dir="elsewhere") == name(funnel__report_at=(5, 7))
    assert name() == name(student__width=8, train__steps=7, seed=3)
    others = [name(data__seed=1), name(tasks=("watch",)), name(funnel__passed=20)]
    assert len({name(), *others}) == 4


def test_a_scored_copy_is_named_after_its_teacher_and_the_stage_that_was_scored():
    assert name("abc") == f"{name()}-teacher-abc-retrieved"
    assert name("abc", teacher__stage="passed") == f"{name()}-teacher-abc-passed"
