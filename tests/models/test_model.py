import dataclasses

import pytest

from kd_ranker.models.model import build_model
from kd_ranker.models.student import MultiInterest
from kd_ranker.models.teacher import FinalRanker
from tests.random_batches import CATEGORY_SPEC, SPEC, STUDENT, TEACHER


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        ((), set()),
        (("request",), {"request_category"}),
        (("candidate",), {"candidate_category"}),
        (("item",), {"item_category", "history_category"}),
    ],
)
def test_only_lookups_that_find_something_are_there_and_their_tables(owners, expected):
    categories = tuple(of for of in CATEGORY_SPEC.categories if of.of in owners)
    spec = dataclasses.replace(SPEC, categories=categories)
    embedding = build_model(FinalRanker, spec, 3, TEACHER)[0].embedding
    assert embedding.lookups.keys() == {"user", "item", "history"} | expected
    sizes = {name: table.size for name, table in embedding.tables.items()}
    own = {"user": SPEC.num_users, "item": SPEC.num_items}
    assert sizes == own | ({"category": spec.num_categories} if owners else {})


def test_a_model_that_looks_up_the_history_must_be_trained_with_it():
    class Forgetful(FinalRanker):
        reads_history = False

    with pytest.raises(ValueError, match="looks up the history"):
        build_model(Forgetful, SPEC, 3, TEACHER)
    assert build_model(FinalRanker, SPEC, 3, TEACHER)[0].reads_history
    assert not build_model(MultiInterest, SPEC, 3, STUDENT)[0].reads_history
