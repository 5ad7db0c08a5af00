"""Shards of a split; `test_commands` has the rest."""

from types import SimpleNamespace

import pytest

from kd_ranker.configs import cascade
from kd_ranker.pipeline import scoring


@pytest.mark.parametrize("requests", [1, 1023, 1024, 1025, 1024 * 256, 1024 * 256 + 1, 10**8])
def test_shards_cover_a_split_in_whole_batches_and_are_not_many(requests):
    config = cascade("small")
    splits = {"train": SimpleNamespace(num_examples=requests)}
    dataset = SimpleNamespace(builder=SimpleNamespace(info=SimpleNamespace(splits=splits)))
    teacher = SimpleNamespace(version="v1")
    scorer = scoring.Scorer(config, dataset, teacher)
    one, several = (
        [shard.args[-3:] for shard in scoring.scoring_shards(scorer, is_elsewhere, "train")]
        for is_elsewhere in (False, True)
    )
    assert one == several
    names, starts, stops = zip(*one, strict=True)
    assert set(names) == {"train"}
    assert (0, *stops) == (*starts, requests)
    assert all(start % config.evaluation.requests == 0 for start in starts)
    assert len(one) == (-(-requests // 1024) if requests <= 1024 * 256 else len(one)) <= 256
