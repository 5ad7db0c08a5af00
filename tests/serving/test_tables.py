import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from kd_ranker.embedding.lookup import EmbeddingSpec, TableSpec
from kd_ranker.serving import check, tables


def test_an_untrained_row_and_the_last_one_are_the_reserved_row():
    spec = EmbeddingSpec(2, {"user": TableSpec(3, hashed=False)}, {})
    # Two numbers of an embedding, the number of updates, a slot of the optimiser.
    trained = np.zeros((8, 4), np.float32)
    trained[:4] = [[1, 2, 5, 9], [3, 4, 0, 9], [5, 6, 1, 9], [7, 8, 0, 9]]
    served = tables.served(spec, {"user": jnp.asarray(trained)})
    assert served["user_table"].tolist() == [[1, 2], [7, 8], [5, 6], [7, 8]]


def test_whole_numbers_keep_the_largest_entry_of_each_row():
    embedding = np.array([[1.27, -0.635, 0.0], [0.0, 0.0, 0.0]], np.float32)
    packed = tables.ITEM_TYPES["int8"].pack(embedding)
    assert packed["item_embedding"].tolist() == [[127, -64, 0], [0, 0, 0]]
    np.testing.assert_allclose(packed["item_scale"], [0.01, 0.0], rtol=1e-6)


def test_a_server_reads_tables_of_bfloat16_as_their_bits(tmp_path):
    held = {"a": np.array([[1, 2]], np.float32), "b": np.array([1.5], jnp.bfloat16)}
    save_file(held, tmp_path / "tables.safetensors")
    read = check.read_tables(tmp_path)
    assert read["a"].tolist() == [[1, 2]]
    assert read["b"].tolist() == [0x3FC0]
