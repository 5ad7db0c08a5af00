import pytest

from configs import cascade
from kd_ranker.batch import Stage
from kd_ranker.training import recipes
from kd_ranker.training.step import LiveTeacher
from tests.batches import SPEC


@pytest.mark.parametrize(
    ("modes", "teacher", "expected"),
    [
        (["none"], None, (Stage.SHOWN, False)),
        (["shared"], None, (Stage.SHOWN, True)),
        (["none", "aux"], None, (Stage.SHOWN, True)),
        (["none", "aux"], Stage.PASSED, (Stage.PASSED, False)),
        (["shared"], Stage.RETRIEVED, (Stage.RETRIEVED, False)),
    ],
)
def test_what_counts_is_what_some_member_can_learn_from(modes, teacher, expected):
    members = {}
    for mode in modes:
        members[mode] = cascade.get_config("small")
        members[mode].distill.mode = mode
    groups = recipes.student_groups(members, SPEC)
    model, _ = recipes.teacher_model(next(iter(members.values())), SPEC)
    live = LiveTeacher(model, teacher) if teacher else None
    assert recipes.counting(groups, live) == expected
