"""A trained ranker as programs: functions of named arrays, and the formats of their files.

A program takes its inputs by name: fields of a request, as in `batch.FIELDS`, results of the
program before it, and tables. Tables are separate files next to the programs, so they can be large,
and new items need no new export.

A student with separate parts (`models.student.InParts`) becomes three programs:

    user    once per request: its queries, from the user, the context and the history
    item    once per item, offline: its embedding
    score   the queries against the embeddings of the candidates

Any other ranker becomes one program, `rank`, of the whole request.
"""

import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import nnx
from jax import export
from jaxtyping import Array, Float, Float32, Int

from kd_ranker.batch import (
    IN_BATCH,
    CandidateBatch,
    FeatureSpec,
    Items,
    abstract_batch,
    abstract_items,
)
from kd_ranker.distillation.modes import ToProbability
from kd_ranker.embedding.lookup import EmbeddingSpec, gather_rows, rows_of_ids
from kd_ranker.embedding.lookup import Tables as TrainedTables
from kd_ranker.errors import UserError
from kd_ranker.evaluation.funnel import value
from kd_ranker.models.layers import linear_products, plus_category_means, weights_of
from kd_ranker.models.model import Model, Parameters, apply_part
from kd_ranker.models.student import InParts

ITEM_EMBEDDING = "item_embedding"
PLATFORMS = ("cpu", "cuda", "tpu")
"""The platforms that a program for `jax.export` runs on."""

READABLE_BY = "jaxlib of the same release, up to 6 months newer, or up to 3 weeks older"
"""The guarantee of `jax.export` for its programs; what counts is when a jaxlib was built."""

_BLOCK = 1 << 16  # items that are embedded at a time

Arrays = Mapping[str, Any]
Tables = dict[str, np.ndarray]
Types = dict[str, jax.ShapeDtypeStruct]
"""Arrays by name as only shapes and types."""

_SIZES = export.SymbolicScope()


def typed(shape: Sequence[int | str], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the type of an array; a named size may differ between calls."""
    sizes = export.symbolic_shape(", ".join(map(str, shape)), scope=_SIZES)
    return jax.ShapeDtypeStruct(sizes, dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """One program of an export: a function of named arrays, and their types.

    Its name is the stem of its files. The function takes exactly the inputs. A call ignores other
    arrays, as do the programs that `check.open_programs` reads.
    """

    name: str
    function: Callable[[Arrays], dict[str, Any]]
    inputs: Types
    outputs: Types

    def __call__(self, arrays: Arrays) -> dict[str, Any]:
        """Return the outputs by name."""
        return self.function({name: arrays[name] for name in self.inputs})


class Servable(NamedTuple):
    """A ranker for serving."""

    model: Model  # its fixed part
    parameters: Parameters  # of one model
    spec: FeatureSpec  # the sizes of the dataset that it was trained on
    items: Items  # the features and categories of the items there
    probability: ToProbability  # from its logits, see `Mode.serve`
    value_weights: Sequence[float]  # one per task

    @property
    def seen(self) -> FeatureSpec:
        """The sizes of the fields that the model reads."""
        reads = self.model.reads_history
        return self.spec if reads else dataclasses.replace(self.spec, history_length=0)


class Exported(NamedTuple):
    """A ranker as programs by name, in the order of execution, and the tables they read."""

    programs: dict[str, Program]
    tables: Tables


def make_programs(trained: Servable) -> Exported:
    """Build the programs of a ranker."""
    in_parts = isinstance(nnx.merge(trained.model.graph, trained.parameters.dense), InParts)
    features, category = np.asarray(trained.items.features), np.asarray(trained.items.category)
    if in_parts:
        features = features[:, : trained.spec.cheap_item_features]
    held = served_tables(trained.model.embedding, trained.parameters.tables)
    known = {"item_features": features, "item_category": category}
    held |= {name: of for name, of in known.items() if of.size}
    if in_parts:
        held[ITEM_EMBEDDING] = _item_embeddings(trained, held)
    # Item embeddings may have more rows, for new items.
    types = {
        name: typed(("rows", *of.shape[1:]) if name == ITEM_EMBEDDING else of.shape, of.dtype)
        for name, of in held.items()
    }
    fields = functools.partial(_fields, trained.seen)
    if in_parts:
        offered = fields("request", "event") | types
        user = _program("user", functools.partial(_user, trained), offered)
        of_item = {
            name: typed(("items", *of.shape[1:]), of.dtype)
            for name, of in inputs_of_items(trained, np.zeros(1, np.int32)).items()
        }
        item = _program("item", functools.partial(_item, trained), of_item | types)
        score = functools.partial(_score, trained, tuple(user.outputs))
        offered = user.outputs | fields("candidate") | types
        programs = [user, item, _program("score", score, offered)]
    else:
        offered = fields("request", "event", "candidate") | types
        programs = [_program("rank", functools.partial(_rank, trained), offered)]
    read = {name for program in programs for name in program.inputs}
    named = {program.name: program for program in programs}
    return Exported(named, {name: table for name, table in held.items() if name in read})


def name_of(table: str) -> str:
    """Return the name of one of `EmbeddingSpec.tables` in an export."""
    return f"{table}_table"


def served_tables(spec: EmbeddingSpec, trained: TrainedTables) -> Tables:
    """Return the rows that serve the ids of each table, float32 [size + 1, D].

    The last row is the reserved one. It is copied into the rows of untrained ids, so that a program
    only has to find the row of an id.
    """
    tables = {}
    for name, table in spec.tables.items():
        rows = np.asarray(trained[name])[: table.size + 1]
        updates, reserved = rows[:, spec.width], rows[table.size, : spec.width]
        own = np.where(updates[:, None] > 0, rows[:, : spec.width], reserved)
        own[table.size] = reserved
        tables[name_of(name)] = own
    return tables


def fields_of(batch: CandidateBatch) -> dict[str, Any]:
    """Return the fields of requests that programs may take, by name."""
    return {field.name: getattr(batch, field.name) for field in IN_BATCH}


class _Recorded(dict[str, Any]):
    """Arrays by name that record in `read` which of them were read."""

    def __init__(self, arrays: Arrays, read: set[str]):
        super().__init__(arrays)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)


def _program(name: str, function: Callable[[Arrays], dict[str, Any]], offered: Types) -> Program:
    """Build a program that takes only the offered arrays that its function reads."""
    # Formats do not support empty arrays.
    offered = {of: found for of, found in offered.items() if 0 not in found.shape}
    read: set[str] = set()
    results = jax.eval_shape(lambda arrays: function(_Recorded(arrays, read)), offered)
    outputs = {of: jax.ShapeDtypeStruct(found.shape, found.dtype) for of, found in results.items()}
    return Program(name, function, {of: offered[of] for of in offered if of in read}, outputs)


def _fields(spec: FeatureSpec, *owners: str) -> Types:
    """Return the fields of these owners in a request, as a ranker receives them."""
    sizes: Any = export.symbolic_shape("requests, candidates", scope=_SIZES)
    batch = abstract_batch(spec, *sizes)
    # How far a candidate came is for those who measure.
    names = [of.name for of in IN_BATCH if of.of in owners and of.name != "stage"]
    return {name: getattr(batch, name) for name in names}


def _on_requests(trained: Servable, part: Callable[..., Any], arrays: Arrays) -> Any:
    """Return the results of `part(module, batch, rows, items)` on the requests in the arrays.

    Missing arrays are empty, or dead code.
    """
    spec, requests = trained.seen, arrays["user_id"].shape[0]
    candidates = arrays["item_id"].shape[1] if "item_id" in arrays else 0
    like, of_items = abstract_batch(spec, requests, candidates), abstract_items(spec)
    fields = {of.name: _or_zeros(arrays, of.name, getattr(like, of.name)) for of in IN_BATCH}
    # Without candidates and a history no id of an item is read.
    known = arrays if candidates or spec.history_length else {}
    features = _or_zeros(known, "item_features", of_items.features)
    category = _or_zeros(known, "item_category", of_items.category)
    batch, items = CandidateBatch(**fields), Items(features, category)
    embedding = trained.model.embedding
    lookups = embedding.lookups.items()
    used = {name: lookup for name, lookup in lookups if lookup.ids(batch, items).size != 0}
    held = {of.table: jnp.asarray(arrays[name_of(of.table)]) for of in used.values()}
    only = embedding._replace(lookups=used)
    rows = gather_rows(only, held, batch, items, whole_rows=False)
    return _part(trained, lambda module, *of: part(module, *of, items), batch, rows)


def _or_zeros(arrays: Arrays, name: str, like: Any) -> Any:
    return arrays[name] if name in arrays else jnp.zeros(like.shape, like.dtype)


def _read(arrays: Arrays, name: str, row: Int[Array, "..."]) -> Any:
    return jnp.asarray(arrays[name]).at[row].get(mode="promise_in_bounds")


def _rows_of(trained: Servable, table: str, ids: Int[Array, "..."], arrays: Arrays) -> Any:
    row = rows_of_ids(trained.model.embedding.tables[table], ids)
    return _read(arrays, name_of(table), row)


def _plus_categories(
    trained: Servable, row: Float[Array, "... D"], of: str, name: str, arrays: Arrays
) -> Float[Array, "... D"]:
    """Add the mean rows of the categories of an item or a candidate, if it has any."""
    lengths = trained.spec.category_lengths(of)
    if not lengths:
        return row
    rows = _rows_of(trained, "category", arrays[name], arrays)
    return plus_category_means(row, rows, arrays[name], lengths)


def _part(trained: Servable, part: Callable[..., Any], *arrays: Any) -> Any:
    return apply_part(trained.model, trained.parameters.dense, part, *arrays)


def _answer(trained: Servable, logits: Float[Array, "R N heads"]) -> dict[str, Any]:
    probability = trained.probability(logits)
    weights = jnp.asarray(trained.value_weights, jnp.float32)
    return {"probability": probability, "value": value(probability, weights)}


def _rank(trained: Servable, arrays: Arrays) -> dict[str, Any]:
    logits = _on_requests(trained, lambda module, *of: module(*of), arrays)
    return _answer(trained, logits)


def _user(trained: Servable, arrays: Arrays) -> dict[str, Any]:
    return _on_requests(trained, lambda module, *of: module.users(*of), arrays)


def _item(trained: Servable, arrays: Arrays) -> dict[str, Any]:
    row = _rows_of(trained, "item", arrays["item_id"], arrays)
    row = _plus_categories(trained, row, "item", "category", arrays)
    features = _or_zeros(arrays, "features", row[..., :0])
    return {ITEM_EMBEDDING: _part(trained, _embedding, row, features)}


def _embedding(
    module: Any, row: Float[Array, "items D"], features: Float[Array, "items F"]
) -> Float[Array, "items D"]:
    """Embed items by the encoder of candidates, with candidate features of 0."""
    own = jnp.zeros((*row.shape[:-1], module.spec.candidate_features), features.dtype)
    return module.item(row, jnp.concatenate([features, own], axis=-1))


def inputs_of_items(trained: Servable, ids: Int[np.ndarray, "items"]) -> dict[str, np.ndarray]:
    """Return the inputs of the program `item` for items of the dataset, without tables."""
    cheap = trained.spec.cheap_item_features
    known = {
        "item_id": ids,
        "features": np.asarray(trained.items.features)[ids, :cheap],
        "category": np.asarray(trained.items.category)[ids],
    }
    return {name: of for name, of in known.items() if 0 not in of.shape[1:]}


def _item_embeddings(trained: Servable, held: Tables) -> Float32[np.ndarray, "items+1 D"]:
    """Return the embeddings of all items, a block at a time, and then of an unknown item."""
    item, number = jax.jit(functools.partial(_item, trained)), trained.spec.num_items
    rows = {name: table for name, table in held.items() if name.endswith("_table")}
    blocks = []
    for first in range(0, number, _BLOCK):
        ids = np.arange(first, min(first + _BLOCK, number), dtype=np.int32)
        found = item(inputs_of_items(trained, ids) | rows)
        blocks.append(np.asarray(found[ITEM_EMBEDDING]))
    reserved = held[name_of("item")][-1:]
    nothing = jnp.zeros((1, trained.spec.cheap_item_features))
    return np.concatenate([*blocks, np.asarray(_part(trained, _embedding, reserved, nothing))])


def _score(trained: Servable, of_user: Sequence[str], arrays: Arrays) -> dict[str, Any]:
    spec = trained.spec

    def logits(module: Any, users: Any, row: Any, features: Any) -> Float[Array, "R N heads"]:
        weights, _ = weights_of(module.item.features)
        own = weights[spec.cheap_item_features :]
        return module.logits(users, linear_products(users["queries"], row, own, features))

    ids, last = arrays["item_id"], arrays[ITEM_EMBEDDING].shape[0] - 1
    # The last row is that of unknown items.
    row = _read(arrays, ITEM_EMBEDDING, jnp.where((ids >= 0) & (ids < last), ids, last))
    row = _plus_categories(trained, row, "candidate", "candidate_category", arrays)
    features = _or_zeros(arrays, "candidate_features", row[..., :0])
    users = {name: arrays[name] for name in of_user}
    return _answer(trained, _part(trained, logits, users, row, features))


def to_jax(program: Program) -> bytes:
    """Return the program for `jax.export.deserialize`: StableHLO, for each of `PLATFORMS`."""
    exported = export.export(jax.jit(program.function), platforms=PLATFORMS)
    return bytes(exported(program.inputs).serialize())


def jax_releases() -> dict[str, Any]:
    """Return the releases that `to_jax` writes with, and which others can read its programs."""
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "calling_convention_version": jax.config.values["jax_export_calling_convention_version"],
        "readable_by": READABLE_BY,
    }


def to_onnx(program: Program) -> bytes:
    """Return the program as an ONNX model, with the names of inputs and outputs.

    UserError if jax2onnx is not installed, or ONNX lacks an operation of the program.
    """
    names, outputs = list(program.inputs), list(program.outputs)

    def positional(*arrays: Any) -> Any:
        results = program.function(dict(zip(names, arrays, strict=True)))
        return tuple(results[name] for name in outputs)

    types, before = list(program.inputs.values()), logging.root.manager.disable
    named = {"input_names": names, "output_names": outputs}
    # Without the converter's logs and warnings on other packages and its intermediate results.
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            import jax2onnx

            model = jax2onnx.to_onnx(positional, types, model_name=program.name, **named)
    except ImportError as error:
        raise UserError(
            "ONNX needs the extra `onnx`: pip install 'kd_ranker[onnx]'; or use only --formats=jax"
        ) from error
    # The converter of an operation may raise any exception.
    except Exception as error:
        raise UserError(
            f"the program {program.name!r} cannot be written as ONNX: {error}; use only "
            "--formats=jax"
        ) from error
    finally:
        logging.disable(before)
    return model.SerializeToString()


FORMATS: dict[str, Callable[[Program], bytes]] = {"jax": to_jax, "onnx": to_onnx}
"""The functions that write a program, by the suffix of the files."""
