import jax.numpy as jnp
import numpy as np

from kd_ranker.models.layers import features_of_items
from kd_ranker.models.model import build_model
from kd_ranker.models.student import MultiInterest
from kd_ranker.models.teacher import FinalRanker
from tests.random_batches import CATEGORY_SPEC, STUDENT, TEACHER


def test_a_model_that_reads_no_history_does_not_look_it_up():
    class Forgetful(FinalRanker):
        reads_history = False

    pooling = STUDENT.copy_and_resolve_references()
    pooling.history = "mean"
    for module, config, reads in (
        (FinalRanker, TEACHER, True),
        (Forgetful, TEACHER, False),
        (MultiInterest, STUDENT, False),
        (MultiInterest, pooling, True),
    ):
        model, _ = build_model(module, CATEGORY_SPEC, 3, config)
        assert model.reads_history == reads
        assert ("history" in model.embedding.lookups) == reads
        assert ("history_category" in model.embedding.lookups) == reads


def test_an_item_that_is_not_known_has_no_categories():
    category = np.array([[4, 7], [5, -1]], np.int32)
    found = features_of_items(category, jnp.array([1, 0, -1, 2, 2**31 - 1]), missing=-1)
    np.testing.assert_array_equal(found, [[5, -1], [4, 7], [-1, -1], [-1, -1], [-1, -1]])
