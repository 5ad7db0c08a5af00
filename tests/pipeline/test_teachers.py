"""What a student may learn from which teacher; `test_commands` has the rest."""

import dataclasses
from types import SimpleNamespace

import pytest

from configs import cascade
from kd_ranker.errors import UserError
from kd_ranker.pipeline import scoring, teachers
from tests.random_batches import SPEC


def check(*modes, source="logged", signal="rank", loss="bce", learns_from="logged"):
    config = cascade.get_config("small")
    config.teacher.source, config.teacher.signal = source, learns_from
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


def test_each_of_several_terms_is_held_against_its_own_signal():
    config = cascade.get_config("small")
    config.distill.mode = "aux"
    dataset = SimpleNamespace(spec=SPEC)
    config.distill.terms = ("bce", "softmax:stage")
    teachers.check_losses(config, dataset, [config])
    config.distill.terms = ("softmax", "bce:stage")
    with pytest.raises(UserError, match=r"distill\.terms=bce needs .* stages are an order"):
        teachers.check_losses(config, dataset, [config])


@pytest.mark.parametrize("source", ["live", "logged"])
@pytest.mark.parametrize("loss", sorted(teachers.NEEDS_PROBABILITIES))
def test_a_loss_that_needs_probabilities_is_refused_where_stages_are_the_signal(source, loss):
    with pytest.raises(UserError) as caught:
        check("none", "aux", source=source, signal="probability", loss=loss, learns_from="stage")
    message = str(caught.value)
    assert "\n" not in message
    assert f"distill.loss={loss} needs the teacher's probabilities" in message
    assert "and stages are an order; choose one of: distill.loss=approx_ndcg" in message
    check("none", source=source, loss=loss, learns_from="stage")
    check("aux", source=source, loss="softmax", learns_from="stage")


def test_a_loss_is_not_refused_without_need():
    check("none")
    check("aux", source="live")
    check("aux", signal="probability")


def test_a_loss_of_the_order_takes_positions_and_is_what_the_message_offers(monkeypatch):
    monkeypatch.setitem(teachers.LOSSES, "order", None)
    check("aux", loss="order")
    with pytest.raises(UserError, match=r"choose one of: .*distill\.loss=order"):
        check("aux")


@pytest.mark.parametrize("requests", [1, 1023, 1024, 1025, 1024 * 256, 1024 * 256 + 1, 10**8])
def test_shards_cover_a_split_in_whole_batches_and_are_not_many(requests):
    config = cascade.get_config("small")
    splits = {"train": SimpleNamespace(num_examples=requests)}
    dataset = SimpleNamespace(builder=SimpleNamespace(info=SimpleNamespace(splits=splits)))
    teacher = SimpleNamespace(version="v1")
    one, several = (
        [
            shard.args[-3:]
            for shard in scoring.scoring_shards(config, dataset, teacher, processes, "train")
        ]
        for processes in (1, 8)
    )
    assert one == several
    names, starts, stops = zip(*one, strict=True)
    assert set(names) == {"train"}
    assert (0, *stops) == (*starts, requests)
    assert all(start % config.evaluation.requests == 0 for start in starts)
    assert len(one) == (-(-requests // 1024) if requests <= 1024 * 256 else len(one)) <= 256
