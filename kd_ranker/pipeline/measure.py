"""Measuring trained rankers: from their parameters to the rows of a run's tables."""

import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.batch import FeatureSpec, abstract_items, empty_batch
from kd_ranker.batches.evaluation import evaluation_batches, num_evaluation_batches
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation import cost, kept, results, totals
from kd_ranker.evaluation.evaluate import Ranker, evaluate, make_serve
from kd_ranker.evaluation.kept import Kept
from kd_ranker.evaluation.measured import write_tables
from kd_ranker.evaluation.metrics import METRICS, TARGET, ReportAt, result_columns
from kd_ranker.evaluation.references import (
    NO_PROBABILITIES,
    Statistics,
    known_references,
    only_order,
    reference_ranker,
)
from kd_ranker.evaluation.results import Row
from kd_ranker.evaluation.totals import Each, Summed
from kd_ranker.models.model import Model, Parameters, build_model
from kd_ranker.models.student import STUDENTS
from kd_ranker.models.teacher import TEACHERS
from kd_ranker.pipeline.teachers import Teacher
from kd_ranker.requests.records import Dataset
from kd_ranker.training.checkpoints import Identity
from kd_ranker.training.placing import first_devices, own_devices
from kd_ranker.training.state import select_member

_NOT_COUNTED = float("nan")


class Students(NamedTuple):
    """A trained group.

    Attributes:
      names: a name a member.
      ranker: how they rank; its parameters are stacked.
      steps: a member's last step.
      non_finite_step: a member's 0, or the step at which its loss stopped being finite.
    """

    names: tuple[str, ...]
    ranker: Ranker
    steps: tuple[int, ...]
    non_finite_step: tuple[int, ...]

    def only(self, names: Collection[str]) -> "Students":
        """The members among `names`, in their order here; there may be none."""
        places = [place for place, name in enumerate(self.names) if name in names]
        parameters = jax.tree.map(lambda leaf: leaf[np.array(places, int)], self.ranker.parameters)
        return Students(
            names=tuple(self.names[place] for place in places),
            ranker=self.ranker._replace(parameters=parameters),
            steps=tuple(self.steps[place] for place in places),
            non_finite_step=tuple(self.non_finite_step[place] for place in places),
        )


class Reference(NamedTuple):
    """The teacher as a measurement sees it.

    Attributes:
      ranker: how it ranks; None where the dataset's logs say what it thinks.
      signal: what is known of it, one of `batch.TEACHER_SIGNALS`.
      seed: the seed that it was trained with; None for one from elsewhere.
      step: its last step; None for one from elsewhere.
      flops: its FLOPs a candidate, which take compiling.
    """

    ranker: Ranker | None
    signal: str
    seed: int | None
    step: int | None
    flops: Callable[[], float]


class Measured(NamedTuple):
    """The findings of a measurement.

    Attributes:
      rows: of `results.csv`.
      curves: rows of `curves.csv`.
      calibration: rows of `calibration.csv`.
      each: what each request adds, by member and serve name; filled for the test split.
    """

    rows: list[Row]
    curves: list[Row]
    calibration: list[Row]
    each: dict[kept.Who, Each]


def reference(config: ConfigDict, dataset: Dataset, teacher: Teacher | None) -> Reference:
    """The teacher of students.

    Args:
      config: what the students have in common.
      dataset: the dataset that they learn from.
      teacher: the teacher; None where its probabilities come with the dataset.
    """
    live = teacher is not None and config.teacher.source == "live"
    return Reference(
        ranker=teacher.ranker if teacher and live else None,
        signal="probability" if live else dataset.spec.teacher_signal,
        seed=teacher.seed if teacher else None,
        step=teacher.step if teacher else None,
        flops=lambda: teacher_flops(config, dataset.spec, teacher),
    )


def own_reference(config: ConfigDict, dataset: Dataset, ranker: Ranker, step: int) -> Reference:
    """The teacher that `config` describes, with `ranker` at `step` of its training."""
    return Reference(
        ranker=ranker,
        signal="probability",
        seed=config.seed,
        step=step,
        flops=lambda: teacher_flops(config, dataset.spec, None),
    )


def measure(
    config: ConfigDict,
    dataset: Dataset,
    split: str,
    teacher: Reference,
    members: Mapping[str, ConfigDict],
    students: Sequence[Students],
    *,
    serves: Mapping[str, Collection[str]] | None = None,
    statistics: Statistics | None = None,
    limit: int = 0,
    costs: bool = True,
) -> Measured:
    """Measures the teacher, then the students by member and serving choice, in one pass.

    Args:
      config: what the members have in common.
      dataset: the dataset whose requests are read.
      split: which of them, "validation" or "test".
      teacher: the teacher.
      members: the members' configs by name.
      students: the trained groups of these members; none measures the teacher alone.
      serves: the serving choices of each member; None takes all.
      statistics: what the references know, which are measured as well; None leaves them out.
      limit: how many requests are read at most; 0 takes `config.evaluation.limit`.
      costs: whether to count FLOPs. An evaluation on the way goes without, and without a bar.
    """
    groups = [
        (group.ranker, _serve_names(group, members, serves) if serves else None)
        for group in students
    ]
    referred: tuple[str, ...] = ()
    if statistics is not None:
        splits = [dataset.columns[name] for name in ("validation", "test")]
        referred = known_references([of for of in splits if len(of)], statistics)
        groups.append((reference_ranker([statistics]), referred))
    of_teacher, of_groups = _summed(config, dataset, split, teacher.ranker, groups, limit, costs)
    flops_of_teacher = teacher.flops() if costs else _NOT_COUNTED
    measured = Measured([], [], [], {})
    row = _named_row(config, split, "teacher", results.TEACHER)
    row |= {"seed": teacher.seed, "step": teacher.step}
    row = results.with_cost(row, flops_of_teacher, flops_of_teacher)
    _add(measured, config, dataset, row, of_teacher, None, teacher.signal)
    for group, of_group in zip(students, of_groups, strict=False):
        first = members[group.names[0]]
        flops = _student_flops(first, dataset.spec) if costs else {}
        for index, name in enumerate(group.names):
            for serve in serves[name] if serves else MODES[first.distill.mode].serve:
                row = _named_row(config, split, "student", name, serve)
                row |= results.made_of(members[name]) | {"step": group.steps[index]}
                row = results.with_cost(row, flops.get(serve, _NOT_COUNTED), flops_of_teacher)
                if non_finite_step := group.non_finite_step[index]:
                    measured.rows.append(row | {"non_finite_step": non_finite_step})
                    continue
                summed = select_member(of_group[serve], index)
                _add(measured, config, dataset, row, summed, of_teacher, teacher.signal)
    for name in referred:
        row = _named_row(config, split, "reference", name) | {"seed": teacher.seed}
        summed = select_member(of_groups[-1][name], 0)
        _add(measured, config, dataset, row, summed, of_teacher, teacher.signal)
    return measured


def _serve_names(
    group: Students, members: Mapping[str, ConfigDict], serves: Mapping[str, Collection[str]]
) -> tuple[str, ...]:
    """The serve names that any member of a group wants, in the order of its mode."""
    wanted = {serve for name in group.names for serve in serves[name]}
    mode = MODES[members[group.names[0]].distill.mode]
    return tuple(serve for serve in mode.serve if serve in wanted)


def _summed(
    config: ConfigDict,
    dataset: Dataset,
    split: str,
    teacher: Ranker | None,
    groups: Sequence[tuple[Ranker, tuple[str, ...] | None]],
    limit: int,
    bar: bool,
) -> tuple[Summed, list[dict[str, Summed]]]:
    """`evaluate` on the requests of a split; of groups and the serve names to measure."""
    requests, limit = config.evaluation.requests, limit or config.evaluation.limit
    batches: Iterable = evaluation_batches(
        dataset, split, requests=requests, candidates=config.funnel.retrieved, limit=limit
    )
    if bar:
        total = num_evaluation_batches(dataset, split, requests=requests, limit=limit)
        batches = tqdm(batches, split, total, leave=False, unit="batch", disable=None)
    sharded = config.parallel.tables == "sharded"
    return evaluate(
        teacher,
        [ranker for ranker, _ in groups],
        batches,
        dataset.items,
        config.value_weights,
        config.funnel.shown,
        serves=[names for _, names in groups],
        ks=kept_ks(config),
        keep=split == "test",
        devices=(first_devices if sharded else own_devices)(config.parallel.devices),
        sharded=sharded,
    )


def kept_ks(config: ConfigDict) -> list[int]:
    """The values of k at which the curves of each test request are kept."""
    return kept.kept_ks(config.funnel.retrieved, report_at(config).ks)


def report_at(config: ConfigDict) -> ReportAt:
    """The points of the curves in `results.csv`.

    The funnel's own k is always among them, and the target of the criterion.
    """
    return ReportAt(
        ks=sorted({*config.funnel.report_at, config.funnel.passed}),
        targets=sorted({*config.funnel.targets, TARGET}),
    )


def _named_row(config: ConfigDict, split: str, role: str, member: str, serve: str = "user") -> Row:
    """The part of a row that says whose it is, and on what."""
    return {
        "dataset": config.data.name,
        "split": split,
        "role": role,
        "member": member,
        "serve": serve,
    }


def _add(
    measured: Measured,
    config: ConfigDict,
    dataset: Dataset,
    row: Row,
    summed: Summed,
    of_teacher: Summed | None,
    signal: str,
) -> None:
    """Adds a ranker's row, those of its curves and its calibration, and what each request adds.

    `signal` is that of `summarise`.
    """
    tasks, sums = dataset.spec.tasks, summed.sums
    teacher_sums = of_teacher.sums if of_teacher else None
    numbers = totals.summarise(sums, teacher_sums, tasks, report_at(config), signal)
    order_alone = row["member"] in NO_PROBABILITIES
    if order_alone:
        numbers = only_order(numbers)
    measured.rows.append(row | numbers)
    if not summed.each.alone:
        return
    measured.each[str(row["member"]), str(row["serve"])] = summed.each
    who = {"member": row["member"], "serve": row["serve"]}
    curves = totals.curves(sums, tasks)
    passed_for = result_columns(METRICS["passed_for"], tasks, report_at(config))
    needed = [numbers[column] for column in passed_for]
    ks = _sampled_ks(config, next(iter(curves.values())).size, needed)
    measured.curves.extend(
        who | {"k": k} | {name: float(curve[k - 1]) for name, curve in curves.items()} for k in ks
    )
    # Positions order the candidates, as some references do, and foretell nothing.
    if order_alone or (row["role"] == "teacher" and signal == "rank"):
        return
    table = totals.calibration_table(sums)
    measured.calibration.extend(
        who
        | {"task": task, "bin": bin_index}
        | {name: float(of_bins[index, bin_index]) for name, of_bins in table.items()}
        for index, task in enumerate(tasks)
        for bin_index in np.flatnonzero(table["weight"][index]).tolist()
    )


def _sampled_ks(config: ConfigDict, retrieved: int, needed: Sequence[float]) -> list[int]:
    """The k at which curves are kept: all small ones, then in steps of a few percent.

    With them are those of the config, and `needed`, those that reach a target.
    """
    spaced = np.unique(np.geomspace(1, retrieved, 150).round().astype(int)).tolist()
    named = [min(k, retrieved) for k in report_at(config).ks]
    return sorted({*spaced, *named, *(int(k) for k in needed if np.isfinite(k))})


def _student_flops(config: ConfigDict, spec: FeatureSpec) -> dict[str, float]:
    """FLOPs a candidate by serving choice, each of a student with the heads that it reads alone."""
    mode = MODES[config.distill.mode]
    heads = mode.heads_per_task * len(spec.tasks)
    read = {name: cost.heads_read(served, heads) for name, served in mode.serve.items()}
    return {
        name: _flops_of_described(
            "student", config.student.to_json(), spec, number, config.funnel.retrieved
        )
        for name, number in read.items()
    }


# A sweep asks for the same ones on each split and in each cohort, and the answer takes compiling.
@functools.lru_cache(maxsize=256)
def _flops_of_described(
    role: str, section: str, spec: FeatureSpec, heads: int, retrieved: int
) -> float:
    """`_flops_per_candidate` of the model that a section of a config, as JSON, describes."""
    config = ConfigDict(json.loads(section))
    module = {"student": STUDENTS, "teacher": TEACHERS}[role][config.name]
    model, init = build_model(module, spec, heads, config)
    # Parameters without slots, by their shapes alone, which is all that a cost depends on.
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), 0))
    return _flops_per_candidate(model, shapes, spec, retrieved)


def _flops_per_candidate(
    model: Model, parameters: Parameters, spec: FeatureSpec, retrieved: int
) -> float:
    """FLOPs of the compiled model on one request of so many candidates, over their number."""
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
    retrieved = config.funnel.retrieved
    if teacher:
        return _flops_per_candidate(teacher.model, teacher.parameters, spec, retrieved)
    if config.teacher.flops_per_candidate:
        return float(config.teacher.flops_per_candidate)
    section = config.teacher.to_json()
    return _flops_of_described("teacher", section, spec, len(spec.tasks), retrieved)


def write_measured(config: ConfigDict, workdir: Path, whose: Identity, *splits: Measured) -> None:
    """Writes the tables of a run, `results.csv` last; see `measured.write_tables`.

    Args:
      config: what the members have in common.
      workdir: the folder to write to.
      whose: the identity of the rankers.
      *splits: what was measured on each split; curves and calibration are those of the last.
    """
    names = results.columns(config.tasks, report_at(config))
    measured = splits[-1]._replace(rows=[row for split in splits for row in split.rows])
    files: dict[str, str | bytes] = {}
    if measured.each:
        files |= kept.files(Kept(np.array(kept_ks(config)), measured.each), config.tasks)
        curves = results.curves_columns(config.tasks)
        files[results.CURVES_FILE] = results.to_csv(measured.curves, curves)
        files[results.CALIBRATION_FILE] = results.to_csv(
            measured.calibration, results.CALIBRATION_COLUMNS
        )
    files[results.FILE] = results.to_csv(measured.rows, names)
    write_tables(workdir, files, whose)
    logging.info("wrote %s", workdir / results.FILE)
