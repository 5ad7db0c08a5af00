"""One training run and its measurement: what teacher, student and sweep have in common."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.batch import FeatureSpec, empty_batch
from kd_ranker.data import loader
from kd_ranker.data.builder import Dataset
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation import cost, results
from kd_ranker.evaluation.evaluate import Ranker, evaluate, serve_probability
from kd_ranker.evaluation.measures import Sums, summarise
from kd_ranker.evaluation.results import Row
from kd_ranker.models.model import Model, Parameters
from kd_ranker.teachers import Teacher
from kd_ranker.training import recipes
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.loop import fit
from kd_ranker.training.mapping import MAPPINGS, Mapping
from kd_ranker.training.step import Frozen, Recipe, TrainState

# What may change without making another run of it: what students are trained, and what is reported.
_NOT_OF_A_STUDENT = ("sweep", "funnel.report_at", "evaluation")
_NOT_OF_A_TEACHER = (
    *_NOT_OF_A_STUDENT,
    *("student", "distill", "batch", "train", "optimizer", "teacher.workdir", "teacher.source"),
)


def device_mapping(config: ConfigDict) -> Mapping:
    """The mapping of `config.parallel` over its devices."""
    devices = jax.devices()[: config.parallel.devices or None]
    return MAPPINGS[config.parallel.mapping](devices)


def training_batches(
    config: ConfigDict, dataset: Dataset, batch: ConfigDict, mapping: Mapping
) -> grain.IterDataset:
    """The training batches of a run, on the devices.

    `batch` is `config.batch` or `config.teacher.batch`.
    """
    return loader.training_batches(
        dataset,
        requests=batch.requests,
        candidates=batch.candidates,
        passed_share=batch.passed_share,
        negative_rate=batch.negative_rate,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        to_device=mapping.shard,
    )


def train_teacher(config: ConfigDict, dataset: Dataset, workdir: Path) -> tuple[Ranker, int]:
    """Trains the teacher of `config` on user labels; returns it and its last step."""
    workdirs.claim(workdir, config, without=_NOT_OF_A_TEACHER)
    recipe, state = recipes.teacher_start(config, dataset.spec)
    probability = serve_probability(recipe.model, recipe.mode)

    def progress(parameters: Parameters) -> Row:
        sums, _ = measure(
            config, dataset, Ranker(probability, parameters), [], config.teacher.train.eval_limit
        )
        return summary(config, dataset, sums, sums)

    section = config.teacher
    state = _fit(config, dataset, section, recipe, state, None, workdir, progress)
    return Ranker(probability, state.parameters), int(state.step)


def train_student(
    config: ConfigDict, dataset: Dataset, teacher: Teacher | None, workdir: Path
) -> tuple[Ranker, int]:
    """Trains the student of `config`; returns it and its last step."""
    workdirs.claim(workdir, config, without=_NOT_OF_A_STUDENT)
    live = teacher if _is_live(config) else None
    recipe, state = recipes.student_start(config, dataset.spec, live.model if live else None)
    probability = serve_probability(recipe.model, recipe.mode)

    def progress(parameters: Parameters) -> Row:
        student = Ranker(probability, parameters)
        limit = config.train.eval_limit
        teacher_sums, (sums,) = measure(
            config, dataset, live_ranker(config, teacher), [student], limit
        )
        serve = config.distill.serve if config.distill.serve in sums else next(iter(sums))
        return summary(config, dataset, sums[serve], teacher_sums)

    live_parameters = live.parameters if live and recipe.teacher else None
    state = _fit(config, dataset, config, recipe, state, live_parameters, workdir, progress)
    return Ranker(probability, state.parameters), int(state.step)


def _is_live(config: ConfigDict) -> bool:
    return config.teacher.source == "live"


def live_ranker(config: ConfigDict, teacher: Teacher | None) -> Ranker | None:
    """What scores the evaluation requests; None where their probabilities are logged."""
    return teacher.ranker if teacher and _is_live(config) else None


def _fit(
    config: ConfigDict,
    dataset: Dataset,
    section: ConfigDict,
    recipe: Recipe,
    state: TrainState,
    live_teacher: Parameters | None,
    workdir: Path,
    progress: Callable[[Parameters], Row],
) -> TrainState:
    """`fit` with what `section` (`config`, or `config.teacher`) says of batch, steps, optimiser."""
    mapping = device_mapping(config)

    def scalars(parameters: Parameters) -> dict[str, float]:
        return {
            f"eval/{name}": value
            for name, value in progress(parameters).items()
            if isinstance(value, float) and np.isfinite(value)
        }

    return fit(
        recipe=recipe,
        state=state,
        batches=training_batches(config, dataset, section.batch, mapping),
        hyperparameters=recipes.hyperparameters(config, section.optimizer),
        frozen=Frozen(item_features=jnp.asarray(dataset.item_features), teacher=live_teacher),
        mapping=mapping,
        train=section.train,
        workdir=workdir,
        evaluate=scalars,
    )


def measure(
    config: ConfigDict,
    dataset: Dataset,
    teacher: Ranker | None,
    students: Sequence[Ranker],
    limit: int = 0,
) -> tuple[Sums, list[dict[str, Sums]]]:
    """`evaluate` on the dataset's test requests; a `limit` reads only so many of them."""
    batches: Iterable = loader.evaluation_batches(
        dataset,
        requests=config.evaluation.requests,
        candidates=config.funnel.retrieved,
        limit=limit or config.evaluation.limit,
    )
    if not limit:
        total = loader.num_evaluation_batches(
            dataset, requests=config.evaluation.requests, limit=config.evaluation.limit
        )
        batches = tqdm(batches, "evaluating", total, leave=False, unit="batch", disable=None)
    return evaluate(
        teacher, students, batches, dataset.item_features, config.value_weights, config.funnel.shown
    )


def summary(config: ConfigDict, dataset: Dataset, sums: Sums, teacher_sums: Sums) -> Row:
    """The measured columns of one row of `results.csv`."""
    tasks, report_at = dataset.spec.tasks, _report_at(config)
    of_teacher = summarise(teacher_sums, tasks, report_at)
    teacher_user_bce = {task: of_teacher[f"user_bce/{task}"] for task in tasks}
    return dict(summarise(sums, tasks, report_at, teacher_user_bce))


def _report_at(config: ConfigDict) -> list[int]:
    """The k of `survival@k` and its like; the funnel's own is always among them."""
    return sorted({*config.funnel.report_at, config.funnel.passed})


def teacher_row(
    config: ConfigDict,
    dataset: Dataset,
    seed: int | None,
    step: int | None,
    sums: Sums,
    flops: float,
) -> Row:
    """The teacher's row of `results.csv`; `seed` and `step` are None for one from elsewhere."""
    row: Row = {
        "dataset": config.data.name,
        "role": "teacher",
        "serve": "user",
        "seed": seed,
        "step": step,
        **summary(config, dataset, sums, sums),
        # A teacher is not measured against itself.
        "alignment_ratio": float("nan"),
    }
    return results.with_cost(row, flops, flops)


def student_rows(
    config: ConfigDict,
    dataset: Dataset,
    step: int,
    sums: dict[str, Sums],
    teacher_sums: Sums,
    teacher_flops: float,
) -> list[Row]:
    """A student's rows of `results.csv`, one a serving choice."""
    mode = MODES[config.distill.mode]
    distilled = mode.teacher_logits is not None
    model, parameters = recipes.student_model(config, dataset.spec)
    flops = _flops_per_candidate(config, dataset.spec, model, parameters)
    shared: Row = {
        "dataset": config.data.name,
        "role": "student",
        "mode": config.distill.mode,
        "distill_loss": config.distill.loss if distilled else None,
        "distill_weight": float(config.distill.weight) if distilled else 0.0,
        "seed": config.seed,
        "step": step,
    }
    return [
        results.with_cost(
            shared | {"serve": serve} | summary(config, dataset, sums[serve], teacher_sums),
            flops,
            teacher_flops,
        )
        for serve in mode.serve
    ]


def _flops_per_candidate(
    config: ConfigDict, spec: FeatureSpec, model: Model, parameters: Parameters
) -> float:
    """FLOPs of the compiled model on one request of `funnel.retrieved`, over their number."""
    retrieved = config.funnel.retrieved
    items = jax.ShapeDtypeStruct((spec.num_items, spec.item_features), np.float32)
    probability = serve_probability(model, MODES["none"])
    return cost.flops(probability, parameters, empty_batch(spec, 1, retrieved), items) / retrieved


def teacher_flops(config: ConfigDict, spec: FeatureSpec, teacher: Teacher | None) -> float:
    """FLOPs a candidate of the teacher; of the one that `config.teacher` describes if None."""
    model, parameters = (
        (teacher.model, teacher.parameters) if teacher else recipes.teacher_model(config, spec)
    )
    return _flops_per_candidate(config, spec, model, parameters)


def write_results(config: ConfigDict, workdir: Path, rows: Sequence[Row]) -> None:
    """Writes `results.csv`, whole or not at all."""
    names = results.columns(config.tasks, _report_at(config))
    workdirs.write_atomically(workdir / results.FILE, results.to_csv(rows, names))
    logging.info("wrote %s", workdir / results.FILE)
