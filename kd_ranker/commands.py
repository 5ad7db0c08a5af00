"""What the entry points do: one function each, from a config and a workdir to files."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker import runs, settings, teachers
from kd_ranker.data import builder
from kd_ranker.data.request import Source
from kd_ranker.data.sources import SOURCES
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation import results
from kd_ranker.evaluation.results import Row
from kd_ranker.report import write
from kd_ranker.training import workdir as workdirs


def prepare_data(config: ConfigDict) -> Path:
    """Builds the dataset of `config.data`; one that is there already is left alone.

    Returns:
      The dataset's folder.
    """
    settings.validate(config)
    name = teachers.dataset_name(config)
    directory = builder.directory_of(name, config.data.dir)
    if not directory.exists():
        source = SOURCES[config.data.name].open_source(config.data, config.tasks, config.funnel)
        builder.build(source, name, config.data.dir)
    return directory


def train_teacher(config: ConfigDict, workdir: Path) -> list[Row]:
    """Trains the final ranker on user labels and measures it.

    Returns:
      The one row of its `results.csv`.
    """
    settings.validate(config)
    dataset = teachers.open_dataset(config)
    teacher, step = runs.train_teacher(config, dataset, workdir)
    sums, _ = runs.measure(config, dataset, teacher, [])
    flops = runs.teacher_flops(config, dataset.spec, None)
    rows = [runs.teacher_row(config, dataset, config.seed, step, sums, flops)]
    runs.write_results(config, workdir, rows)
    return rows


def log_teacher(config: ConfigDict) -> Path:
    """Scores the dataset of `config.data` with the teacher in `config.teacher.workdir`.

    Returns:
      The folder of the copy that holds the probabilities.
    """
    settings.validate(config)
    dataset = teachers.open_dataset(config)
    teacher = teachers.load_teacher(config, dataset)
    splits = dataset.builder.info.splits
    source = Source(
        spec=dataclasses.replace(dataset.spec, teacher_version=teacher.version),
        item_features=dataset.item_features,
        requests=functools.partial(teachers.scored_requests, config, dataset, teacher),
        num_requests={split: splits[split].num_examples for split in builder.SPLITS},
    )
    name = teachers.dataset_name(config, teacher.version)
    return builder.build(source, name, config.data.dir)


def train(config: ConfigDict, workdir: Path) -> list[Row]:
    """Trains one student and measures it.

    Returns:
      The rows of its `results.csv`, one a serving choice.
    """
    settings.validate(config)
    teacher, dataset = teachers.teacher_and_dataset(config)
    student, step = runs.train_student(config, dataset, teacher, workdir)
    teacher_sums, (sums,) = runs.measure(
        config, dataset, runs.live_ranker(config, teacher), [student]
    )
    teacher_flops = runs.teacher_flops(config, dataset.spec, teacher)
    rows = runs.student_rows(config, dataset, step, sums, teacher_sums, teacher_flops)
    runs.write_results(config, workdir, rows)
    return rows


def sweep(config: ConfigDict, workdir: Path) -> list[Row]:
    """Trains the students of `config.sweep` one after another and measures them in one pass.

    Each member has a workdir of its own below `workdir/members`.

    Returns:
      The rows of `results.csv`: the teacher, then every student by serving choice.
    """
    settings.validate(config)
    teacher, dataset = teachers.teacher_and_dataset(config)
    workdirs.claim(workdir, config)
    members = sweep_members(config)
    trained = [
        runs.train_student(member, dataset, teacher, workdir / "members" / name)
        for name, member in tqdm(members.items(), desc="members", unit="member", disable=None)
    ]
    teacher_sums, students_sums = runs.measure(
        config,
        dataset,
        runs.live_ranker(config, teacher),
        [student for student, _ in trained],
    )
    seed, step = (teacher.seed, teacher.step) if teacher else (None, None)
    teacher_flops = runs.teacher_flops(config, dataset.spec, teacher)
    rows = [runs.teacher_row(config, dataset, seed, step, teacher_sums, teacher_flops)]
    for member, (_, step), sums in zip(members.values(), trained, students_sums, strict=True):
        rows += runs.student_rows(member, dataset, step, sums, teacher_sums, teacher_flops)
    rows = results.with_savings(rows, config.funnel.retrieved)
    runs.write_results(config, workdir, rows)
    return rows


def sweep_members(config: ConfigDict) -> dict[str, ConfigDict]:
    """The configs of a sweep by member name: modes × weights × seeds.

    The mode `none` has no distillation loss to weigh, so it occurs once a seed, at weight 0.
    """
    members = {}
    for seed, mode in itertools.product(config.sweep.seeds, config.sweep.modes):
        weights = (0.0,) if MODES[mode].teacher_logits is None else config.sweep.weights
        for weight in weights:
            member = config.copy_and_resolve_references()
            member.seed = seed
            member.distill.mode = mode
            member.distill.weight = weight
            member.distill.serve = next(iter(MODES[mode].serve))
            members[f"{mode}-weight{weight:g}-seed{seed}"] = member
    return members


def report(sweeps: Sequence[Path], output: Path) -> tuple[list[str], Path]:
    """Writes tables, figures and a page of what sweeps have found.

    Args:
      sweeps: their workdirs; those of the same dataset are joined.
      output: the folder to write below.

    Returns:
      A sentence a dataset on what distillation saves, and the page.
    """
    return write.write_report(sweeps, output), output / write.PAGE
