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

import calendar
import dataclasses
import datetime
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
from kd_ranker.embedding.lookup import EmbeddingSpec, Rows, gather_rows, rows_of_ids
from kd_ranker.embedding.lookup import Tables as TrainedTables
from kd_ranker.errors import UserError, short
from kd_ranker.evaluation.funnel import value
from kd_ranker.models.layers import linear_products, plus_category_means, weights_of
from kd_ranker.models.model import Model, Parameters, apply_part
from kd_ranker.models.student import InParts, Users

ITEM_EMBEDDING = "item_embedding"
PLATFORMS = ("cpu", "cuda", "tpu")
"""The platforms that a program for `jax.export` runs on."""

_READABLE_MONTHS = 6
READABLE_BY = (
    f"jaxlib of the same release, up to {_READABLE_MONTHS} months newer, or up to 3 weeks older"
)
"""The guarantee of `jax.export` for its programs; what counts is when a jaxlib was built.

https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees
"""

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
    has_parts = isinstance(nnx.merge(trained.model.graph, trained.parameters.dense), InParts)
    tables = _all_tables(trained, has_parts)
    table_types = {}
    for name, table in tables.items():
        # Item embeddings may have more rows, for new items.
        shape = ("rows", *table.shape[1:]) if name == ITEM_EMBEDDING else table.shape
        table_types[name] = typed(shape, table.dtype)
    if has_parts:
        programs = _programs_of_parts(trained, table_types)
    else:
        offered = _field_types(trained.seen, "request", "event", "candidate") | table_types
        programs = [_program("rank", functools.partial(_rank, trained), offered)]
    inputs = {name for program in programs for name in program.inputs}
    return Exported(
        programs={program.name: program for program in programs},
        tables={name: table for name, table in tables.items() if name in inputs},
    )


def _all_tables(trained: Servable, has_parts: bool) -> Tables:
    """Return the tables that a program of this ranker may read; none of them is empty."""
    tables = served_tables(trained.model.embedding, trained.parameters.tables)
    features = np.asarray(trained.items.features)
    if has_parts:
        features = features[:, : trained.spec.cheap_item_features]
    category = np.asarray(trained.items.category)
    if features.size:
        tables["item_features"] = features
    if category.size:
        tables["item_category"] = category
    if has_parts:
        tables[ITEM_EMBEDDING] = _item_embeddings(trained, tables)
    return tables


def _programs_of_parts(trained: Servable, table_types: Types) -> list[Program]:
    """Build the programs `user`, `item` and `score` of a student with separate parts."""
    request_types = _field_types(trained.seen, "request", "event")
    user = _program("user", functools.partial(_user, trained), request_types | table_types)

    item_types = {
        name: typed(("items", *array.shape[1:]), array.dtype)
        for name, array in inputs_of_items(trained, np.zeros(1, np.int32)).items()
    }
    item = _program("item", functools.partial(_item, trained), item_types | table_types)

    candidate_types = _field_types(trained.seen, "candidate")
    score = _program(
        "score",
        functools.partial(_score, trained, tuple(user.outputs)),
        user.outputs | candidate_types | table_types,
    )
    return [user, item, score]


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
        values = rows[:, : spec.width]
        num_updates = rows[:, spec.width, None]
        reserved = values[table.size]
        served = np.where(num_updates > 0, values, reserved)
        served[table.size] = reserved
        tables[name_of(name)] = served
    return tables


def fields_of(batch: CandidateBatch) -> dict[str, Any]:
    """Return the fields of requests that programs may take, by name."""
    return {field.name: getattr(batch, field.name) for field in IN_BATCH}


def _program(name: str, function: Callable[[Arrays], dict[str, Any]], offered: Types) -> Program:
    """Build a program that takes only the offered arrays that its function reads."""
    # Formats do not support empty arrays.
    offered = {name: type_ for name, type_ in offered.items() if 0 not in type_.shape}
    names_read: set[str] = set()
    results = jax.eval_shape(lambda arrays: function(_Recorded(arrays, names_read)), offered)
    return Program(
        name=name,
        function=function,
        inputs={name: type_ for name, type_ in offered.items() if name in names_read},
        outputs={
            name: jax.ShapeDtypeStruct(result.shape, result.dtype)
            for name, result in results.items()
        },
    )


class _Recorded(dict[str, Any]):
    """Arrays by name that add to `names_read` the name of each array that is read."""

    def __init__(self, arrays: Arrays, names_read: set[str]):
        super().__init__(arrays)
        self._names_read = names_read

    def __getitem__(self, name: str) -> Any:
        self._names_read.add(name)
        return super().__getitem__(name)


def _field_types(spec: FeatureSpec, *owners: str) -> Types:
    """Return the types of these owners' fields in a request, as a ranker receives them."""
    sizes: Any = export.symbolic_shape("requests, candidates", scope=_SIZES)
    batch = abstract_batch(spec, *sizes)
    # How far a candidate came is for those who measure.
    names = [field.name for field in IN_BATCH if field.of in owners and field.name != "stage"]
    return {name: getattr(batch, name) for name in names}


def _on_requests(trained: Servable, part: Callable[..., Any], arrays: Arrays) -> Any:
    """Return the results of `part(module, batch, rows, items)` on the requests in the arrays.

    Missing arrays are replaced by zeros: they are empty, or their results are not used.
    """
    spec = trained.seen
    num_requests = arrays["user_id"].shape[0]
    num_candidates = arrays["item_id"].shape[1] if "item_id" in arrays else 0
    batch_types = abstract_batch(spec, num_requests, num_candidates)
    batch = CandidateBatch(
        **{
            field.name: _or_zeros(arrays, field.name, getattr(batch_types, field.name))
            for field in IN_BATCH
        }
    )
    # Without candidates and a history no id of an item is read.
    reads_items = num_candidates or spec.history_length
    item_types = abstract_items(spec)
    items = Items(
        features=_or_zeros(arrays if reads_items else {}, "item_features", item_types.features),
        category=_or_zeros(arrays if reads_items else {}, "item_category", item_types.category),
    )
    lookups = {
        name: lookup
        for name, lookup in trained.model.embedding.lookups.items()
        if lookup.ids(batch, items).size != 0
    }
    tables = {
        lookup.table: jnp.asarray(arrays[name_of(lookup.table)]) for lookup in lookups.values()
    }
    embedding = trained.model.embedding._replace(lookups=lookups)
    rows = gather_rows(embedding, tables, batch, items)

    # Items are not cast to the dtype of the model, see `apply_model`.
    def part_with_items(module: Any, batch: CandidateBatch, rows: Rows) -> Any:
        return part(module, batch, rows, items)

    return _part(trained, part_with_items, batch, rows)


def _or_zeros(arrays: Arrays, name: str, like: Any) -> Any:
    return arrays[name] if name in arrays else jnp.zeros(like.shape, like.dtype)


def _read(arrays: Arrays, name: str, row: Int[Array, "..."]) -> Any:
    return jnp.asarray(arrays[name]).at[row].get(mode="promise_in_bounds")


def _rows_of(trained: Servable, table: str, ids: Int[Array, "..."], arrays: Arrays) -> Any:
    row = rows_of_ids(trained.model.embedding.tables[table], ids)
    return _read(arrays, name_of(table), row)


def _plus_categories(
    trained: Servable, row: Float[Array, "... D"], owner: str, name: str, arrays: Arrays
) -> Float[Array, "... D"]:
    """Add the mean rows of an owner's categories, if it has any; `name` is the array of them."""
    lengths = trained.spec.category_lengths(owner)
    if not lengths:
        return row
    rows = _rows_of(trained, "category", arrays[name], arrays)
    return plus_category_means(row, rows, arrays[name], lengths)


def _part(trained: Servable, part: Callable[..., Any], *arrays: Any) -> Any:
    """Return the results of `part(module, *arrays)`, see `apply_part`."""
    return apply_part(trained.model, trained.parameters.dense, part, *arrays)


def _answer(trained: Servable, logits: Float[Array, "R N heads"]) -> dict[str, Any]:
    probability = trained.probability(logits)
    weights = jnp.asarray(trained.value_weights, jnp.float32)
    return {"probability": probability, "value": value(probability, weights)}


def _rank(trained: Servable, arrays: Arrays) -> dict[str, Any]:
    """Run the program `rank`."""

    def logits(module: Any, batch: CandidateBatch, rows: Rows, items: Items) -> Any:
        return module(batch, rows, items)

    return _answer(trained, _on_requests(trained, logits, arrays))


def _user(trained: Servable, arrays: Arrays) -> dict[str, Any]:
    """Run the program `user`."""

    def users(module: InParts, batch: CandidateBatch, rows: Rows, items: Items) -> Users:
        return module.users(batch, rows, items)

    return _on_requests(trained, users, arrays)


def _item(trained: Servable, arrays: Arrays) -> dict[str, Any]:
    """Run the program `item`."""
    row = _rows_of(trained, "item", arrays["item_id"], arrays)
    row = _plus_categories(trained, row, "item", "category", arrays)
    features = _or_zeros(arrays, "features", row[..., :0])
    return {ITEM_EMBEDDING: _part(trained, _embedding, row, features)}


def _embedding(
    module: Any, row: Float[Array, "items D"], features: Float[Array, "items F"]
) -> Float[Array, "items D"]:
    """Embed items by the encoder of candidates, with candidate features of 0."""
    candidate = jnp.zeros((*row.shape[:-1], module.spec.candidate_features), features.dtype)
    return module.item(row, jnp.concatenate([features, candidate], axis=-1))


def inputs_of_items(trained: Servable, ids: Int[np.ndarray, "items"]) -> dict[str, np.ndarray]:
    """Return the inputs of the program `item` for items of the dataset, without tables."""
    features = np.asarray(trained.items.features)[ids, : trained.spec.cheap_item_features]
    category = np.asarray(trained.items.category)[ids]
    inputs = {"item_id": ids}
    if features.shape[1]:
        inputs["features"] = features
    if category.shape[1]:
        inputs["category"] = category
    return inputs


def _item_embeddings(trained: Servable, tables: Tables) -> Float32[np.ndarray, "items+1 D"]:
    """Return the embeddings of all items, a block at a time, and then of an unknown item."""
    item = jax.jit(functools.partial(_item, trained))
    num_items = trained.spec.num_items
    row_tables = {name: table for name, table in tables.items() if name.endswith("_table")}
    blocks = []
    for first in range(0, num_items, _BLOCK):
        ids = np.arange(first, min(first + _BLOCK, num_items), dtype=np.int32)
        outputs = item(inputs_of_items(trained, ids) | row_tables)
        blocks.append(np.asarray(outputs[ITEM_EMBEDDING]))
    reserved = tables[name_of("item")][-1:]
    no_features = jnp.zeros((1, trained.spec.cheap_item_features))
    blocks.append(np.asarray(_part(trained, _embedding, reserved, no_features)))
    return np.concatenate(blocks)


def _score(trained: Servable, user_outputs: Sequence[str], arrays: Arrays) -> dict[str, Any]:
    """Run the program `score` on the outputs of the program `user` and the candidates."""

    def logits(module: Any, users: Any, row: Any, features: Any) -> Float[Array, "R N heads"]:
        weights, _ = weights_of(module.item.features)
        candidate_weights = weights[trained.spec.cheap_item_features :]
        products = linear_products(users["queries"], row, candidate_weights, features)
        return module.logits(users, products)

    # The last row is that of unknown items.
    ids = arrays["item_id"]
    last = arrays[ITEM_EMBEDDING].shape[0] - 1
    row = _read(arrays, ITEM_EMBEDDING, jnp.where((ids >= 0) & (ids < last), ids, last))
    row = _plus_categories(trained, row, "candidate", "candidate_category", arrays)
    features = _or_zeros(arrays, "candidate_features", row[..., :0])
    users = {name: arrays[name] for name in user_outputs}
    return _answer(trained, _part(trained, logits, users, row, features))


def to_jax(program: Program) -> bytes:
    """Return the program for `jax.export.deserialize`: StableHLO, for each of `PLATFORMS`."""
    exported = export.export(jax.jit(program.function), platforms=PLATFORMS)
    return bytes(exported(program.inputs).serialize())


def jax_releases(exported: datetime.date) -> dict[str, Any]:
    """Return the releases that `to_jax` writes with, and who can read its programs until when.

    No package says when its jaxlib was built. It was before the export, so the six months from the
    export on, `readable_until`, are the longest that the guarantee can last.
    """
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "calling_convention_version": jax.config.values["jax_export_calling_convention_version"],
        "readable_by": READABLE_BY,
        "exported": exported.isoformat(),
        "readable_until": months_later(exported, _READABLE_MONTHS).isoformat(),
    }


def months_later(date: datetime.date, months: int) -> datetime.date:
    """Return the same day of a later month, or the last day of a month that lacks it."""
    years, month = divmod(date.month - 1 + months, 12)
    year = date.year + years
    last_day = calendar.monthrange(year, month + 1)[1]
    return datetime.date(year, month + 1, min(date.day, last_day))


def to_onnx(program: Program) -> bytes:
    """Return the program as an ONNX model, with the names of inputs and outputs.

    UserError if jax2onnx is not installed, or ONNX lacks an operation of the program.
    """
    input_names = list(program.inputs)
    output_names = list(program.outputs)

    def positional(*arrays: Any) -> Any:
        results = program.function(dict(zip(input_names, arrays, strict=True)))
        return tuple(results[name] for name in output_names)

    # Without the converter's logs and warnings on other packages and its intermediate results.
    disabled_level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            import jax2onnx

            model = jax2onnx.to_onnx(
                positional,
                list(program.inputs.values()),
                model_name=program.name,
                input_names=input_names,
                output_names=output_names,
            )
    except ImportError as error:
        raise UserError(
            "ONNX needs the extra `onnx`: pip install 'kd_ranker[onnx]'; or use only --formats=jax"
        ) from error
    # The converter of an operation may raise any exception.
    except Exception as error:
        raise UserError(
            f"the program {program.name!r} cannot be written as ONNX: {short(error)}; use only "
            "--formats=jax"
        ) from error
    finally:
        logging.disable(disabled_level)
    return model.SerializeToString()


FORMATS: dict[str, Callable[[Program], bytes]] = {"jax": to_jax, "onnx": to_onnx}
"""The functions that write a program, by the suffix of the files."""
