"""Random batches and small sizes that tests share."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from kd_ranker.batch import CandidateBatch, Category, FeatureSpec, Items, empty_batch
from kd_ranker.models.model import Model, ModuleClass, Parameters, build_model, score

SPEC = FeatureSpec(
    dataset="test",
    tasks=("watch", "like", "share"),
    num_users=30,
    num_items=50,
    user_features=5,
    context_features=3,
    candidate_features=2,
    item_features=4,
    cheap_item_features=3,
    history_length=6,
    history_features=3,
    teacher_version="",
)

# The features of each owner are in pieces, so that one taken for another shows.
CATEGORY_SPEC = dataclasses.replace(
    SPEC,
    categories=(
        Category("creator", "item", size=12),
        Category("country", "request", size=4),
        Category("reasons", "candidate", size=5, length=3),
        Category("tags", "item", size=9, length=4),
        Category("interests", "request", size=6, length=2),
    ),
)
SPECS = {"plain": SPEC, "categories": CATEGORY_SPEC}

_TABLES = {
    "table_scale": 0.3,
    "user_rows": 0,
    "item_rows": 0,
    "category_rows": 0,
    "compute_dtype": "float32",
}
STUDENT = ConfigDict({"width": 8, "interests": 3, "hidden": (16,), "history": "none", **_TABLES})
TEACHER = ConfigDict(
    {
        "width": 8,
        "attention_hidden": 5,
        "cross_layers": 2,
        "experts": 3,
        "expert_hidden": 7,
        **_TABLES,
    }
)


@functools.cache
def model_and_init(
    module: ModuleClass, heads: int, config: FrozenConfigDict, spec: FeatureSpec, slots: int = 0
) -> tuple[Model, Callable[[jax.Array], Parameters]]:
    """A model, and a program from a key to parameters; compiling that takes as long as a step."""
    model, init = build_model(module, spec, heads, config)
    return model, jax.jit(lambda key: init(key, slots))


def make_model(
    module: ModuleClass, heads: int, config: ConfigDict, seed: int = 0, spec: FeatureSpec = SPEC
) -> tuple[Model, Parameters]:
    """A model as if training had met every id, so that each is served by its own row."""
    model, init = model_and_init(module, heads, FrozenConfigDict(config), spec)
    parameters, width = init(jax.random.key(seed)), model.embedding.width
    return model, parameters.replace(
        tables={name: table.at[:, width].set(1.0) for name, table in parameters.tables.items()}
    )


def logits_of(model: Model, *arguments: Any) -> np.ndarray:
    """The model's `score` of parameters, a batch and items, in one program."""
    return np.asarray(jax.jit(functools.partial(score, model))(*arguments))


def random_items(seed: int = 0, spec: FeatureSpec = SPEC) -> Items:
    """The items of a dataset, on the host."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(spec.num_items, spec.item_features)).astype(np.float32)
    category = random_categories(generator, spec, "item", spec.num_items)
    return Items(features, category)


def random_categories(
    generator: np.random.Generator, spec: FeatureSpec, of: str, *shape: int
) -> np.ndarray:
    """Category ids [*shape, width]; bags are ragged, and some features have no value at all."""
    features = [np.zeros((*shape, 0), np.int32)]
    for start, category in zip(spec.category_starts, spec.categories, strict=True):
        if category.of == of:
            ids = generator.integers(0, category.size, (*shape, category.length)) + start
            gap = (generator.random(ids.shape) < 0.4) | (generator.random((*shape, 1)) < 0.3)
            features.append(np.where(gap, -1, ids).astype(np.int32))
    return np.concatenate(features, axis=-1)


def random_batch(
    seed: int, requests: int = 8, candidates: int = 5, spec: FeatureSpec = SPEC
) -> CandidateBatch:
    """A batch with every stage, holes in the history, and weights of zero and others."""
    generator = np.random.default_rng(seed)
    tasks, history = len(spec.tasks), spec.history_length

    def normal(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    def ids(size: int, *shape: int) -> np.ndarray:
        return generator.integers(0, size, shape).astype(np.int32)

    def chance(*shape: int) -> np.ndarray:
        return generator.random(shape) < 0.6

    stage = ids(4, requests, candidates).astype(np.int8)
    return empty_batch(spec, requests, candidates).replace(
        user_id=ids(spec.num_users, requests),
        user_features=normal(requests, spec.user_features),
        context=normal(requests, spec.context_features),
        history_id=ids(spec.num_items, requests, history),
        history_features=normal(requests, history, spec.history_features),
        history_mask=chance(requests, history),
        item_id=ids(spec.num_items, requests, candidates),
        candidate_features=normal(requests, candidates, spec.candidate_features),
        request_category=random_categories(generator, spec, "request", requests),
        candidate_category=random_categories(generator, spec, "candidate", requests, candidates),
        stage=stage,
        user_label=chance(requests, candidates, tasks).astype(np.float32),
        label_weight=(generator.uniform(0.5, 3, stage.shape) * (stage == 3)).astype(np.float32),
        teacher_probability=generator.random((requests, candidates, tasks), dtype=np.float32),
        teacher_weight=(chance(requests, candidates, tasks) & (stage >= 2)[..., None]).astype(
            np.float32
        ),
    )
