"""A model as the step uses it: a graph definition, embeddings and separate parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from kd_ranker.batch import (
    WHOLE,
    CandidateBatch,
    FeatureSpec,
    Items,
    RowSharding,
    abstract_batch,
    abstract_items,
)
from kd_ranker.embedding.lookup import (
    EmbeddingSpec,
    Lookup,
    Rows,
    Tables,
    TableSpec,
    gather_to_serve,
    init_table,
)


class Arithmetic(NamedTuple):
    """The arithmetic of a model; parameters, tables and logits are always float32."""

    dtype: Any  # of its internal arrays
    # Of matrix products, for `jax.default_matmul_precision`. The default is float32 on CPUs, and
    # less on TPUs and on newer GPUs.
    precision: str


COMPUTE_DTYPES = {
    "float32": Arithmetic(jnp.float32, "highest"),
    "fast_float32": Arithmetic(jnp.float32, "default"),
    "bfloat16": Arithmetic(jnp.bfloat16, "default"),
}
"""The arithmetic by `compute_dtype`."""


class ModuleClass(Protocol):
    """An entry of `STUDENTS` or `TEACHERS`: a class of modules that score a batch.

    Its modules take a batch, the embeddings that the class's `lookups` name, and the items. They
    return logits [R, N, heads]. A lookup without ids in a dataset that lacks its feature is left
    out.

    A class may have an attribute `reads_history`: a boolean, or a static method from its config to
    one. The default is True. A model that does not read histories is trained on batches without
    them, H = 0, and without its lookups of them.
    """

    lookups: dict[str, Lookup]

    def __call__(
        self, spec: FeatureSpec, heads: int, config: ConfigDict, *, rngs: nnx.Rngs
    ) -> nnx.Module:
        """Build a module."""
        ...


class Model(NamedTuple):
    """The static part of a model: no arrays, so compiled functions may close over it."""

    graph: nnx.GraphDef
    embedding: EmbeddingSpec
    arithmetic: Arithmetic
    reads_history: bool = True


@flax.struct.dataclass
class Parameters:
    """The learned part of a model: dense parameters (a pytree) and embedding tables."""

    dense: Any
    tables: Tables


Init = Callable[..., Parameters]  # see `build_model`


def build_model(
    module: ModuleClass, spec: FeatureSpec, heads: int, config: ConfigDict
) -> tuple[Model, Init]:
    """Build a model from `config.student` or `config.teacher`, with `heads` logits per candidate.

    Returns:
      The model, and a pure function (key, slots, row_sharding=WHOLE) -> initial parameters. `slots`
      is the number of values per row of the tables' optimizer.
    """
    reads: bool | Callable[[ConfigDict], bool] = getattr(module, "reads_history", True)
    reads_history = reads(config) if callable(reads) else reads
    seen = spec if reads_history else dataclasses.replace(spec, history_length=0)
    lookups = {name: lookup for name, lookup in module.lookups.items() if _finds_ids(lookup, seen)}
    all_tables = {
        "user": _table_spec(config.user_rows, spec.num_users),
        "item": _table_spec(config.item_rows, spec.num_items),
        "category": _table_spec(config.category_rows, spec.num_categories),
    }
    read_tables = {lookup.table for lookup in lookups.values()}
    tables = {name: table for name, table in all_tables.items() if name in read_tables}
    # Constants, so that models can be compared: equal ones share compiled programs.
    embedding = EmbeddingSpec(config.width, FrozenDict(tables), FrozenDict(lookups))

    def build(key: Any) -> nnx.Module:
        return module(spec, heads, config, rngs=nnx.Rngs(params=key))

    # Traced once, though states are made, and their shapes asked for, many times.
    @functools.partial(jax.jit, inline=True)
    def initial_dense(key: PRNGKeyArray) -> nnx.State:
        _, dense = nnx.split(build(key), nnx.Param)
        return dense

    def init(key: PRNGKeyArray, slots: int, row_sharding: RowSharding = WHOLE) -> Parameters:
        dense_key, table_key = jax.random.split(key)
        keys = jax.random.split(table_key, len(tables))
        initial = {
            name: init_table(table, config.width, slots, config.table_scale, key, row_sharding)
            for (name, table), key in zip(tables.items(), keys, strict=True)
        }
        return Parameters(initial_dense(dense_key), initial)

    graph, _ = nnx.split(nnx.eval_shape(lambda: build(0)), nnx.Param)
    return Model(graph, embedding, COMPUTE_DTYPES[config.compute_dtype], reads_history), init


def _table_spec(rows: int, ids: int) -> TableSpec:
    """Return a table of hashed ids, or with a row per id if `rows` is 0."""
    return TableSpec(rows or ids, hashed=bool(rows))


def _finds_ids(lookup: Lookup, spec: FeatureSpec) -> bool:
    """Return True if a dataset has any ids for a lookup."""
    ids = jax.eval_shape(lookup.ids, abstract_batch(spec, 1, 1), abstract_items(spec))
    return ids.size > 0


def apply_model(
    model: Model, dense: Any, embedded: Rows, batch: CandidateBatch, items: Items
) -> Float[Array, "R N heads"]:
    """Return the logits of a batch from gathered rows; differentiable in `dense` and `embedded`."""
    # Item features are cast after the lookup, so that a step does not cast all of them.
    return apply_part(model, dense, lambda module, *arrays: module(*arrays, items), batch, embedded)


def apply_part(model: Model, dense: Any, part: Callable[..., Any], *arrays: Any) -> Any:
    """Return the results of `part(module, *arrays)` in the model's arithmetic, as float32.

    `dense` are the parameters of the module; they and the pytrees are cast to the model's dtype.
    """
    dtype, precision = model.arithmetic
    module = nnx.merge(model.graph, _cast(dense, dtype))
    with jax.default_matmul_precision(precision):
        return _cast(part(module, *_cast(arrays, dtype)), jnp.float32)


def _cast(tree: Any, dtype: Any) -> Any:
    """Cast the floating-point leaves."""

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def score(
    model: Model, parameters: Parameters, batch: CandidateBatch, items: Items
) -> Float[Array, "R N heads"]:
    """Return the logits of a batch, as a trained model serves them.

    An id that was never trained is scored with the reserved row, as is an id without a row.
    """
    embedded = gather_to_serve(model.embedding, parameters.tables, batch, items)
    return apply_model(model, parameters.dense, embedded, batch, items)
