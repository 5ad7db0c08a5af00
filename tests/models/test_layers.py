import jax.numpy as jnp
import numpy as np

from kd_ranker.models.layers import (
    categories_of_items,
    category_means,
    category_shares,
    plus_category_means,
)


def test_category_means_by_hand():
    # A single value; a bag with a gap; a bag without any value.
    category, lengths = jnp.array([0, 3, -1, 3, -1]), (1, 3, 1)
    rows = jnp.array([[2.0, 1.0], [4.0, 0.0], [8.0, 6.0], [1.0, 1.0], [5.0, 5.0]])
    np.testing.assert_array_equal(
        category_shares(category, lengths, jnp.float32), [1, 0.5, 0, 0.5, 0]
    )
    means = category_means(rows, category, lengths)
    np.testing.assert_array_equal(means, [2.0, 1.0, 2.5, 0.5, 0.0, 0.0])
    total = plus_category_means(jnp.array([10.0, 20.0]), rows, category, lengths)
    np.testing.assert_array_equal(total, [14.5, 21.5])


def test_an_item_that_is_not_known_has_no_categories():
    category = np.array([[4, 7], [5, -1]], np.int32)
    found = categories_of_items(category, jnp.array([1, 0, -1, 2, 2**31 - 1]))
    np.testing.assert_array_equal(found, [[5, -1], [4, 7], [-1, -1], [-1, -1], [-1, -1]])
