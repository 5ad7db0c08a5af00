import json

import jax.numpy as jnp
import numpy as np

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


def test_safetensors_are_a_length_a_header_and_bytes(tmp_path):
    """As their specification says, read byte by byte."""
    held = {
        "a": np.array([[1, 2], [3, 4]], np.float32),
        "b": np.array([-1, 5, 127], np.int8),
        "c": np.array([1.5], jnp.bfloat16),
    }
    path = tmp_path / "tables.safetensors"
    tables.write_safetensors(held, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    assert (8 + length) % 8 == 0
    assert header["a"] == {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    assert header["b"] == {"dtype": "I8", "shape": [3], "data_offsets": [16, 19]}
    assert header["c"] == {"dtype": "BF16", "shape": [1], "data_offsets": [19, 21]}
    assert rest == bytes.fromhex("0000803f 00000040 00004040 00008040 ff057f c03f")
    read = check.read_tables(tmp_path)
    assert read["a"].tolist() == [[1, 2], [3, 4]]
    assert read["b"].tolist() == [-1, 5, 127]
    assert read["c"].tolist() == [0x3FC0]
