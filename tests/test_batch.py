import json

import pytest

from kd_ranker.batch import Category, FeatureSpec
from kd_ranker.errors import UserError
from tests.random_batches import CATEGORY_SPEC


def test_a_spec_comes_back_from_its_json_and_so_does_an_older_one():
    assert FeatureSpec.from_json(CATEGORY_SPEC.to_json()) == CATEGORY_SPEC
    older = json.loads(CATEGORY_SPEC.to_json()) | {"has_true_probability": True}
    assert FeatureSpec.from_json(json.dumps(older)) == CATEGORY_SPEC


def test_a_category_belongs_to_what_there_is():
    with pytest.raises(UserError, match=r"category 'colour': of='user' does not exist"):
        Category("colour", of="user", size=3)
