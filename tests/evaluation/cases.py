"""Batches under a student and a teacher, drawn at random or made by hand."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_ranker.batch import CandidateBatch, EvaluationBatch, Stage
from kd_ranker.evaluation import totals
from kd_ranker.evaluation.metrics import ReportAt, SumFunction, Sums, sum_functions
from kd_ranker.evaluation.ranked import Scored, TeacherScores, ranked
from kd_ranker.evaluation.totals import Each, Summed

TASKS = ("watch", "like")
VALUE_WEIGHTS = np.array([1.0, 2.0])
SHOWN = 3
TARGETS = (0.5, 0.99)


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def summed(
    functions: tuple[SumFunction, ...],
    ks: tuple[int, ...],
    student: Any,
    teacher: TeacherScores,
    evaluation_batch: EvaluationBatch,
    value_weights: Any,
    shown: int,
    is_teacher: Any = False,
) -> Summed:
    scored = Scored.of(student, {}, evaluation_batch.batch)
    candidates = student.shape[1]
    arguments = scored, teacher, evaluation_batch, value_weights, shown, candidates, candidates
    return totals.summed(ranked(*arguments, is_teacher), functions, ks)


@dataclasses.dataclass
class Case:
    """What `ranked` takes, as numpy arrays."""

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

    def sums(self, shown: int = SHOWN) -> Sums:
        return totals.add(None, summed(sum_functions(), (), *self.arguments(shown)).sums)

    def sums_of_each(self, ks: tuple[int, ...]) -> Each:
        return summed(sum_functions(), ks, *self.arguments(SHOWN)).each

    def arguments(self, shown: int) -> tuple[Any, ...]:
        return (
            jnp.asarray(self.student),
            TeacherScores(jnp.asarray(self.teacher), jnp.asarray(self.teacher_weight)),
            self.evaluation_batch(),
            jnp.asarray(self.value_weights, jnp.float32),
            shown,
        )

    def teacher_sums(self) -> Sums:
        own = dataclasses.replace(self, student=self.teacher)
        sums = summed(sum_functions(), (), *own.arguments(SHOWN), is_teacher=True).sums
        return totals.add(None, sums)

    def row(self, ks: Sequence[int], signal: str = "probability") -> dict[str, float]:
        report_at = ReportAt(ks, TARGETS)
        return totals.summarise(self.sums(), self.teacher_sums(), TASKS, report_at, signal)

    def teacher_row(self, ks: Sequence[int], signal: str = "probability") -> dict[str, float]:
        return totals.summarise(self.teacher_sums(), None, TASKS, ReportAt(ks, TARGETS), signal)

    def evaluation_batch(self) -> EvaluationBatch:
        requests, candidates = self.stage.shape
        batch = CandidateBatch(
            user_id=jnp.zeros(requests, int),
            user_features=jnp.zeros((requests, 1)),
            context=jnp.zeros((requests, 1)),
            history_id=jnp.zeros((requests, 1), int),
            history_features=jnp.zeros((requests, 1, 1)),
            history_mask=jnp.zeros((requests, 1), bool),
            item_id=jnp.zeros((requests, candidates), int),
            candidate_features=jnp.zeros((requests, candidates, 1)),
            request_category=jnp.zeros((requests, 0), int),
            candidate_category=jnp.zeros((requests, candidates, 0), int),
            stage=jnp.asarray(self.stage),
            user_label=jnp.asarray(self.label),
            label_weight=jnp.asarray(self.label_weight),
            # The teacher comes beside the batch; what is in it must not be read.
            teacher_probability=jnp.full(self.teacher.shape, jnp.nan),
            teacher_weight=jnp.full(self.teacher.shape, jnp.nan),
        )
        truth = jnp.asarray(self.true)
        unknown = jnp.full(truth.shape[:2], jnp.nan)
        return EvaluationBatch(
            batch, truth, unknown, jnp.asarray(self.propensity), jnp.asarray(self.request_mask)
        )

    def of_requests(self, which: slice) -> "Case":
        return Case(
            **{
                name: array if name == "value_weights" else array[which]
                for name, array in vars(self).items()
            }
        )


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
