"""A model as the step sees it: a graph definition, its lookups, and parameters apart from both."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from kd_ranker.batch import CandidateBatch, FeatureSpec
from kd_ranker.embedding.lookup import Lookup, Rows, Tables, gather, init_tables


class ModuleClass(Protocol):
    """What `STUDENTS` and `TEACHERS` hold: a class of modules that score a batch.

    Its modules are called with a batch, the rows that the class's `lookups` name, and the item
    feature matrix, and return logits [R, N, heads].
    """

    lookups: dict[str, Lookup]

    def __call__(
        self, spec: FeatureSpec, heads: int, config: ConfigDict, *, rngs: nnx.Rngs
    ) -> nnx.Module:
        """Builds a module."""
        ...


class Model(NamedTuple):
    """What is fixed about a model: no arrays, so it may be closed over by compiled functions."""

    graph: nnx.GraphDef
    lookups: Mapping[str, Lookup]


@flax.struct.dataclass
class Parameters:
    """What is learned: the dense parameters (a pytree) and the embedding tables."""

    dense: Any
    tables: Tables


def build_model(
    module: ModuleClass,
    spec: FeatureSpec,
    heads: int,
    config: ConfigDict,
    key: PRNGKeyArray,
) -> tuple[Model, Parameters]:
    """Builds a model and draws its initial parameters.

    Args:
      module: a class of `STUDENTS` or `TEACHERS`.
      spec: the sizes of the dataset's features.
      heads: how many logits a candidate gets.
      config: `config.student` or `config.teacher`.
      key: all randomness of the initialisation comes from it.

    Returns:
      The model and its parameters.
    """
    dense_key, table_key = jax.random.split(key)
    graph, dense = nnx.split(
        module(spec, heads, config, rngs=nnx.Rngs(params=dense_key)), nnx.Param
    )
    tables = init_tables(
        {"user": spec.num_users, "item": spec.num_items},
        config.width,
        config.table_scale,
        table_key,
    )
    return Model(graph, module.lookups), Parameters(dense, tables)


def apply_model(
    model: Model,
    dense: Any,
    rows: Rows,
    batch: CandidateBatch,
    item_features: Float[Array, "items F"],
) -> Float[Array, "R N heads"]:
    """The logits of a batch whose rows are gathered; differentiable in `dense` and `rows`."""
    return nnx.merge(model.graph, dense)(batch, rows, item_features)


def score(
    model: Model,
    parameters: Parameters,
    batch: CandidateBatch,
    item_features: Float[Array, "items F"],
) -> Float[Array, "R N heads"]:
    """The logits of a batch."""
    rows = gather(parameters.tables, model.lookups, batch)
    return apply_model(model, parameters.dense, rows, batch, item_features)
