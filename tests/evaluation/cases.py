"""Batches under a student and a teacher, drawn at random or made by hand."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_ranker.batch import EvaluationBatch, Stage, empty_batch
from kd_ranker.evaluation import evaluate, metrics
from kd_ranker.evaluation.evaluate import Each, Summed
from kd_ranker.evaluation.metrics import ReportAt, Sums, sum_functions
from kd_ranker.evaluation.ranked import Ranked, Scored, Sizes
from tests import random_batches

TASKS = ("watch", "like")
SPEC = dataclasses.replace(random_batches.SPEC, tasks=TASKS)
VALUE_WEIGHTS = np.array([1.0, 2.0])
SHOWN = 3
TARGETS = (0.5, 0.99)


@functools.partial(jax.jit, static_argnames=("functions", "ks", "shown"))
def summed(student: Any, batch: Any, weights: Any, functions: Any, ks: Any,
           shown: int, is_teacher: Any = False) -> Summed:  # fmt: skip
    sizes = Sizes(shown, *[student.shape[1]] * 2)
    scored = Scored.of(student, {}, batch.batch)
    ranked = Ranked(scored, batch, weights, sizes, is_teacher)
    return evaluate.summed(ranked, functions, ks)


@dataclasses.dataclass
class Case:
    """The input of `Ranked`, as numpy arrays."""

    student: np.ndarray
    teacher: np.ndarray
    teacher_weight: np.ndarray
    stage: np.ndarray
    label: np.ndarray
    label_weight: np.ndarray
    true: np.ndarray
    request_mask: np.ndarray
    propensity: np.ndarray
    value_weights: np.ndarray = dataclasses.field(default_factory=VALUE_WEIGHTS.copy)

    def summed(
        self, ks: tuple[int, ...] = (), shown: int = SHOWN, is_teacher: bool = False
    ) -> Summed:
        weights = jnp.asarray(self.value_weights, jnp.float32)
        student = jnp.asarray(self.teacher if is_teacher else self.student)
        batch = self.evaluation_batch()
        return summed(student, batch, weights, sum_functions(), ks, shown, is_teacher)

    def sums(self, shown: int = SHOWN) -> Sums:
        return evaluate.add(None, self.summed(shown=shown).sums)

    def sums_of_each(self, ks: tuple[int, ...]) -> Each:
        return self.summed(ks).each

    def teacher_sums(self) -> Sums:
        return evaluate.add(None, self.summed(is_teacher=True).sums)

    def row(self, ks: Sequence[int], signal: str = "probability") -> dict[str, float]:
        at = ReportAt(ks, TARGETS)
        return metrics.summarise(self.sums(), self.teacher_sums(), TASKS, at, signal)

    def teacher_row(self, ks: Sequence[int], signal: str = "probability") -> dict[str, float]:
        return metrics.summarise(self.teacher_sums(), None, TASKS, ReportAt(ks, TARGETS), signal)

    def evaluation_batch(self) -> EvaluationBatch:
        batch = empty_batch(SPEC, *self.stage.shape).replace(
            stage=self.stage,
            user_label=self.label,
            label_weight=self.label_weight,
            teacher_probability=self.teacher,
            teacher_weight=self.teacher_weight,
        )
        unknown = np.full(self.true.shape[:2], np.nan, np.float32)
        return EvaluationBatch(batch, self.true, unknown, self.propensity, self.request_mask)


def random_case(seed: int = 0, requests: int = 6, candidates: int = 40) -> Case:
    generator = np.random.default_rng(seed)
    entries = (requests, candidates, len(TASKS))
    stage = generator.choice([s.value for s in Stage if s], size=entries[:2]).astype(np.int8)
    label_weight = generator.choice([1.0, 2.0], size=entries[:2]) * (stage == Stage.SHOWN)
    return Case(
        student=generator.uniform(size=entries).astype(np.float32),
        teacher=generator.uniform(size=entries).astype(np.float32),
        teacher_weight=np.ones(entries, np.float32),
        stage=stage,
        label=generator.integers(0, 2, size=entries).astype(np.float32),
        label_weight=label_weight.astype(np.float32),
        true=generator.uniform(size=entries).astype(np.float32),
        request_mask=np.ones(requests, bool),
        propensity=np.where(
            stage == Stage.SHOWN, generator.uniform(0.2, 1, entries[:2]), np.nan
        ).astype(np.float32),
    )
