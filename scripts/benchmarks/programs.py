"""The project's own train step, ready to be timed: as `experiments.train` builds it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from kd_ranker.batch import CandidateBatch, FeatureSpec, Items
from kd_ranker.batches import training
from kd_ranker.batches.cutting import PackedBatches, Span, unpack
from kd_ranker.pipeline.trained import TrainedRanker
from kd_ranker.requests.records import Dataset
from kd_ranker.training import specs
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.program import initial_states, make_program, take_steps
from kd_ranker.training.state import Constants, LiveTeacher
from kd_ranker.training.step import make_step, one_step


class Program:
    """A run of students, with a resident batch and the state that its steps work on."""

    def __init__(
        self,
        runs: Mapping[str, ConfigDict],
        spec: FeatureSpec,
        items: Items,
        batch: CandidateBatch,
        teacher: TrainedRanker | None = None,
        deterministic: bool = False,
    ):
        """Compiles a single step of the runs, for batches like `batch`."""
        config = next(iter(runs.values()))
        stage = specs.TEACHER_STAGES[config.teacher.stage]
        devices = MAPPINGS["shard_map"](jax.devices()[:1], deterministic=deterministic)
        self.batch = devices.shard(batch)
        stacks = specs.student_stacks(runs, spec)
        live = LiveTeacher(teacher.model, stage) if teacher else None
        of_teacher = teacher.ranker.parameters if teacher else None
        constants = Constants(jax.tree.map(jnp.asarray, items), of_teacher)
        no_batches: Any = None  # each step is given its batch
        self.program = make_program(stacks, live, no_batches, constants, devices)
        self.states = initial_states(self.program)
        step = one_step(make_step([stack.train_spec for stack in stacks], live))
        self.take_one = devices.map_step(step, jax.eval_shape(lambda: self.states))
        arguments = (self.states, self.batch, self.program.hyperparameters, self.program.constants)
        jitted: Any = self.take_one
        compiled = jitted.lower(*arguments).compile()
        self.flops = float(compiled.cost_analysis()["flops"])
        self.temporary = int(compiled.memory_analysis().temp_size_in_bytes)

    def start(self, batch: Any) -> Any:
        """Starts a step on a batch that is on the device; the losses may not be ready yet."""
        # Through the jitted function, as the training loop does.
        self.states, losses = self.take_one(
            self.states, batch, self.program.hyperparameters, self.program.constants
        )
        return losses

    def start_steps(self, batches: PackedBatches, span: Span) -> Any:
        """Starts some steps on packed batches, in one call, as the training loop does."""
        self.states, losses = take_steps(self.program, self.states, batches, span)
        return losses

    def step(self) -> None:
        """Takes a step on the resident batch."""
        jax.block_until_ready(self.start(self.batch))

    def row_bytes(self, table: str) -> int:
        """Bytes of a row of a table, its slots included, of all runs."""
        return sum(
            state.parameters.tables[table][:, 0].nbytes  # [runs, W]
            for state in self.states
        )


def first_batch(config: ConfigDict, dataset: Dataset) -> CandidateBatch:
    """The first training batch of `config` on the host, for steps with a live teacher or logs."""
    needs = training.Needs(specs.TEACHER_STAGES[config.teacher.stage])
    batches = training_batches(config, dataset, needs, resident=True)
    return jax.device_get(jax.jit(unpack)(*next(iter(batches))))


def training_batches(
    config: ConfigDict, dataset: Dataset, needs: training.Needs | None = None, **how: Any
) -> training.BatchIterator:
    """The training batches of `config`, if not said otherwise with what its student needs."""
    needs = needs or specs.needs(specs.student_stacks({"": config}, dataset.spec), None)
    return training.training_batches(dataset, training.BatchConfig(**config.batch), needs, **how)
