"""What a student may learn from which teacher; `test_commands` has the rest."""

import dataclasses
from types import SimpleNamespace

import pytest

from configs import cascade
from kd_ranker import teachers
from kd_ranker.errors import UserError
from tests.batches import SPEC


def check(*modes, source="logged", signal="rank", loss="bce"):
    config = cascade.get_config("small")
    config.teacher.source = source
    members = []
    for mode in modes:
        member = config.copy_and_resolve_references()
        member.distill.mode, member.distill.loss = mode, loss
        members.append(member)
    spec = dataclasses.replace(SPEC, teacher_signal=signal)
    teachers.check_losses(config, SimpleNamespace(spec=spec), members)


@pytest.mark.parametrize("mode", ["aux", "shared"])
def test_a_loss_that_needs_probabilities_is_refused_where_positions_were_logged(mode):
    with pytest.raises(UserError) as caught:
        check("none", mode)
    message = str(caught.value)
    assert "\n" not in message
    assert "distill.loss=bce" in message
    assert "distill.mode=none" in message


def test_a_loss_is_not_refused_without_need():
    check("none")
    check("aux", source="live")
    check("aux", signal="probability")


def test_a_loss_of_the_order_takes_positions_and_is_what_the_message_offers(monkeypatch):
    monkeypatch.setitem(teachers.LOSSES, "order", None)
    check("aux", loss="order")
    with pytest.raises(UserError, match=r"choose one of: .*distill\.loss=order"):
        check("aux")
