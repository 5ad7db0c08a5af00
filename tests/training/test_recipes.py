import pytest

from configs import cascade
from kd_ranker.batch import Stage
from kd_ranker.training import recipes
from kd_ranker.training.state import LiveTeacher
from tests.random_batches import SPEC


@pytest.mark.parametrize(
    ("modes", "teacher", "expected"),
    [
        (["none"], None, (Stage.SHOWN, False, False)),
        (["shared"], None, (Stage.SHOWN, True, False)),
        (["none", "aux"], None, (Stage.SHOWN, True, False)),
        (["none", "aux"], Stage.PASSED, (Stage.PASSED, False, True)),
        (["shared"], Stage.RETRIEVED, (Stage.RETRIEVED, False, True)),
    ],
)
def test_a_batch_needs_what_some_member_has_a_use_for(modes, teacher, expected):
    members = {}
    for mode in modes:
        members[mode] = cascade.get_config("small")
        members[mode].distill.mode = mode
    groups = recipes.student_groups(members, SPEC)
    model, _ = recipes.teacher_model(next(iter(members.values())), SPEC)
    live = LiveTeacher(model, teacher) if teacher else None
    assert recipes.needs(groups, live) == expected


def test_a_teacher_in_training_needs_labels_and_histories_alone():
    group = recipes.teacher_group(cascade.get_config("small"), SPEC)
    assert recipes.needs([group], None) == (Stage.SHOWN, False, True)
