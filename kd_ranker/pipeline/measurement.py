"""Measuring trained rankers: from their parameters to the rows of a run's tables."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.batch import FeatureSpec, abstract_items, empty_batch
from kd_ranker.batches import loader
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation import cost, results, totals
from kd_ranker.evaluation.evaluate import Ranker, evaluate, make_serve
from kd_ranker.evaluation.metrics import Sums
from kd_ranker.evaluation.results import Row
from kd_ranker.models.model import Init, Model, Parameters
from kd_ranker.pipeline.teachers import Teacher
from kd_ranker.requests.storage import Dataset
from kd_ranker.training import recipes
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.state import select_member

_NOT_COUNTED = float("nan")


class Students(NamedTuple):
    """A trained group.

    Attributes:
      names: a name a member.
      ranker: how they rank; its parameters are stacked.
      step: their last step.
      non_finite_step: a member's 0, or the step at which its loss stopped being finite.
    """

    names: tuple[str, ...]
    ranker: Ranker
    step: int
    non_finite_step: tuple[int, ...]


class Measured(NamedTuple):
    """What was measured, as rows of three tables; see `results` for their columns."""

    rows: list[Row]
    curves: list[Row]
    calibration: list[Row]


def measure(
    config: ConfigDict,
    dataset: Dataset,
    teacher: Ranker | None,
    groups: Sequence[Ranker],
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
        teacher, groups, batches, dataset.items, config.value_weights, config.funnel.shown
    )


def summary(
    config: ConfigDict,
    dataset: Dataset,
    sums: Sums,
    teacher: Sums | None,
    signal: str = "probability",
) -> Row:
    """The measured columns of one row of `results.csv`; see `totals.summarise`."""
    return dict(totals.summarise(sums, teacher, dataset.spec.tasks, _report_at(config), signal))


def _report_at(config: ConfigDict) -> list[int]:
    """The k of `survival@k` and its like; the funnel's own is always among them."""
    return sorted({*config.funnel.report_at, config.funnel.passed})


def measure_teacher(
    config: ConfigDict, dataset: Dataset, ranker: Ranker, seed: int, step: int
) -> Measured:
    """Measures a teacher by itself."""
    sums, _ = measure(config, dataset, ranker, [])
    flops = teacher_flops(config, dataset.spec, None)
    return _of_teacher(config, dataset, seed, step, sums, flops)


def measure_students(
    config: ConfigDict,
    dataset: Dataset,
    teacher: Teacher | None,
    members: Mapping[str, ConfigDict],
    students: Sequence[Students],
    limit: int = 0,
) -> Measured:
    """Measures the teacher, then the students by member and serving choice, in one pass.

    Args:
      config: what the members have in common.
      dataset: the dataset.
      teacher: the teacher; None where its probabilities come with the dataset.
      members: the members' configs by name.
      students: the trained groups of these members.
      limit: see `measure`; an evaluation on the way has no need of costs, which take compiling.
    """
    live = teacher.ranker if teacher and config.teacher.source == "live" else None
    signal = "probability" if live else dataset.spec.teacher_signal
    rankers = [group.ranker for group in students]
    teacher_sums, students_sums = measure(config, dataset, live, rankers, limit)
    flops_of_teacher = _NOT_COUNTED if limit else teacher_flops(config, dataset.spec, teacher)
    seed, step = (teacher.seed, teacher.step) if teacher else (None, None)
    measured = _of_teacher(config, dataset, seed, step, teacher_sums, flops_of_teacher, signal)
    for group, group_sums in zip(students, students_sums, strict=True):
        first = members[group.names[0]]
        flops = _NOT_COUNTED if limit else _student_flops(first, dataset.spec)
        for index, name in enumerate(group.names):
            for serve in MODES[first.distill.mode].serve:
                row = _student_row(members[name], name, serve, group.step)
                row = results.with_cost(row, flops, flops_of_teacher)
                if non_finite_step := group.non_finite_step[index]:
                    measured.rows.append(row | {"non_finite_step": non_finite_step})
                    continue
                member_sums = select_member(group_sums[serve], index)
                row |= summary(config, dataset, member_sums, teacher_sums, signal)
                _add(measured, config, dataset, row, member_sums)
    return measured


def _of_teacher(
    config: ConfigDict,
    dataset: Dataset,
    seed: int | None,
    step: int | None,
    sums: Sums,
    flops: float,
    signal: str = "probability",
) -> Measured:
    """The teacher's rows; `seed` and `step` are None for one from elsewhere."""
    row: Row = {
        "dataset": config.data.name,
        "role": "teacher",
        "serve": "user",
        "seed": seed,
        "step": step,
        "member": results.TEACHER,
        **summary(config, dataset, sums, None, signal),
    }
    measured = Measured([], [], [])
    _add(measured, config, dataset, results.with_cost(row, flops, flops), sums)
    # Positions order the candidates, and foretell nothing.
    return measured._replace(calibration=[]) if signal == "rank" else measured


def _student_row(config: ConfigDict, name: str, serve: str, step: int) -> Row:
    """The part of a student's row that was known before it was measured."""
    return {
        "dataset": config.data.name,
        "role": "student",
        **results.made_of(config),
        "serve": serve,
        "step": step,
        "member": name,
    }


def _add(measured: Measured, config: ConfigDict, dataset: Dataset, row: Row, sums: Sums) -> None:
    """Adds a model's row, and those of its curves and its calibration."""
    who = {"member": row["member"], "serve": row["serve"]}
    measured.rows.append(row)
    curves = totals.curves(sums, dataset.spec.tasks)
    ks = _sampled_ks(config, next(iter(curves.values())).size, row["passed_for_99"])
    measured.curves.extend(
        who | {"k": k} | {name: float(curve[k - 1]) for name, curve in curves.items()} for k in ks
    )
    table = totals.calibration_table(sums)
    measured.calibration.extend(
        who
        | {"task": task, "bin": bin_index}
        | {name: float(numbers[index, bin_index]) for name, numbers in table.items()}
        for index, task in enumerate(dataset.spec.tasks)
        for bin_index in np.flatnonzero(table["weight"][index]).tolist()
    )


def _sampled_ks(config: ConfigDict, retrieved: int, passed_for_99: object) -> list[int]:
    """The k at which curves are kept: all small ones, then in steps of a few percent."""
    spaced = np.unique(np.geomspace(1, retrieved, 150).round().astype(int)).tolist()
    named = [min(k, retrieved) for k in _report_at(config)]
    known = isinstance(passed_for_99, float) and np.isfinite(passed_for_99)
    return sorted({*spaced, *named, *([int(passed_for_99)] if known else [])})  # type: ignore[call-overload]


def _student_flops(config: ConfigDict, spec: FeatureSpec) -> float:
    model, init = recipes.student_model(config, spec)
    return _flops_per_candidate(config, spec, model, _shapes(init))


def _flops_per_candidate(
    config: ConfigDict, spec: FeatureSpec, model: Model, parameters: Parameters
) -> float:
    """FLOPs of the compiled model on one request of `funnel.retrieved`, over their number."""
    retrieved = config.funnel.retrieved
    items = abstract_items(spec)
    serve = make_serve(model, MODES["none"])

    def probability(*arguments: Any) -> Any:
        return serve(*arguments).probability

    return cost.flops(probability, parameters, empty_batch(spec, 1, retrieved), items) / retrieved


def teacher_flops(config: ConfigDict, spec: FeatureSpec, teacher: Teacher | None) -> float:
    """FLOPs a candidate of the teacher.

    Of one from elsewhere, None, they are `config.teacher.flops_per_candidate`; if that is 0, those
    of the model that `config.teacher` describes.
    """
    if teacher:
        return _flops_per_candidate(config, spec, teacher.model, teacher.parameters)
    if config.teacher.flops_per_candidate:
        return float(config.teacher.flops_per_candidate)
    model, init = recipes.teacher_model(config, spec)
    return _flops_per_candidate(config, spec, model, _shapes(init))


def _shapes(init: Init) -> Parameters:
    """Parameters without slots, by their shapes alone, which is all that a cost depends on."""
    return jax.eval_shape(lambda: init(jax.random.key(0), 0))


def write_measured(config: ConfigDict, workdir: Path, measured: Measured) -> None:
    """Writes the tables of a run, each whole or not at all, `results.csv` last."""
    names = results.columns(config.tasks, _report_at(config), results.swept_columns(config))
    for file, rows, columns in (
        (results.CURVES_FILE, measured.curves, results.curves_columns(config.tasks)),
        (results.CALIBRATION_FILE, measured.calibration, results.CALIBRATION_COLUMNS),
        (results.FILE, measured.rows, names),
    ):
        workdirs.write_atomically(workdir / file, results.to_csv(rows, columns))
    logging.info("wrote %s", workdir / results.FILE)
