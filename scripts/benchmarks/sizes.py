"""The sizes at which train steps are compared, and random batches of them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kd_ranker.batch import CandidateBatch, FeatureSpec, Items, Stage, empty_batch
from kd_ranker.configs import cascade


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a comparison."""

    requests: int = 32
    candidates: int = 256
    users: int = 10_000
    items: int = 100_000
    width: int = 64
    user_features: int = 32
    item_features: int = 8
    interests: int = 3
    hidden: int = 64
    tasks: int = 3

    def spec(self) -> FeatureSpec:
        """The sizes as a dataset's."""
        return FeatureSpec(
            dataset="random",
            tasks=tuple(f"task{task}" for task in range(self.tasks)),
            num_users=self.users,
            num_items=self.items,
            user_features=self.user_features,
            context_features=0,
            candidate_features=0,
            item_features=self.item_features,
            cheap_item_features=self.item_features,
            history_length=1,
            history_features=1,
            teacher_version="logged",
        )

    def config(self) -> ConfigDict:
        """A student of these sizes, in mode shared, Adam everywhere."""
        config = cascade()
        config.distill.mode = "shared"
        config.student.width = self.width
        config.student.interests = self.interests
        config.student.hidden = (self.hidden,)
        config.optimizer.name = config.optimizer.table_name = "adam"
        return config

    def batch(self, seed: int = 0) -> CandidateBatch:
        """Uniform ids, a tenth of the candidates shown, all of them scored by the teacher."""
        generator = np.random.default_rng(seed)
        of_candidates = (self.requests, self.candidates)

        def normal(*shape: int) -> np.ndarray:
            return generator.normal(size=shape).astype(np.float32)

        def ids(high: int, *shape: int) -> np.ndarray:
            return generator.integers(0, high, shape).astype(np.int32)

        shown = generator.random(of_candidates) < 0.1
        label = generator.random((*of_candidates, self.tasks)) < 0.3
        probability = generator.random((*of_candidates, self.tasks), dtype=np.float32)
        fields: dict[str, Any] = dict(
            user_id=ids(self.users, self.requests),
            user_features=normal(self.requests, self.user_features),
            history_features=normal(self.requests, 1, 1),
            item_id=ids(self.items, *of_candidates),
            stage=np.where(shown, Stage.SHOWN, Stage.PASSED).astype(np.int8),
            user_label=label.astype(np.float32),
            label_weight=shown.astype(np.float32),
            teacher_probability=probability,
            teacher_weight=np.ones_like(probability),
        )
        return dataclasses.replace(empty_batch(self.spec(), *of_candidates), **fields)

    def random_items(self) -> Items:
        """Random features of all items, and no categories."""
        shape = (self.items, self.item_features)
        features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        return Items(jnp.asarray(features), jnp.zeros((self.items, 0), jnp.int32))
