"""Datasets on disk: build and open the dataset of a config, and describe it on the terminal."""

import functools
import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from kd_ranker.config.schema import later_defaults, without_influence
from kd_ranker.errors import UserError, command
from kd_ranker.manifest import write_whole
from kd_ranker.requests import storage
from kd_ranker.requests.records import Dataset
from kd_ranker.sources import in_memory
from kd_ranker.sources.logs import findings
from kd_ranker.sources.logs.data_report import JSON_FILE, read_data_report
from kd_ranker.sources.registry import SOURCES
from kd_ranker.training.specs import TEACHER_STAGES
from kd_ranker.training.workdir import write_atomically

# Folder below `data.dir` for the scores of rankers.
SCORES_FOLDER = "scored"
SAME_FLAGS = "with the same --config flags"
PREPARE_DATA = f"{command('prepare')}, {SAME_FLAGS}"
LOG_TEACHER = f"{command('log_teacher')}, {SAME_FLAGS}"


def dataset_name(config: ConfigDict) -> str:
    """The name of a config's dataset.

    It is `data.name` and eight hex digits that differ where the contents would differ; of requests
    of a program, the name in `data.path`.
    """
    if config.data.name == in_memory.NAME and config.data.path:
        return Path(config.data.path).parent.name
    free = {*without_influence("dataset"), *later_defaults(config)}
    sections = {}
    for section in ("data", "funnel"):
        sections[section] = {
            key: value for key, value in config[section].items() if f"{section}.{key}" not in free
        }
    contents = [
        sections["data"],
        list(config.tasks),
        sections["funnel"],
        SOURCES[config.data.name].version,
    ]
    text = json.dumps(contents, sort_keys=True, default=str)
    return f"{config.data.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def path_of(log: Any, directory: str) -> str:
    """Return the path of a log; a table is written to a Parquet file named by its content."""
    if isinstance(log, (str, PathLike)):
        return str(log)
    if not in_memory.is_table(log):
        raise UserError(
            f"a {type(log).__name__} is not a table, and not a path; give a path, or a table of "
            "pandas, polars or Arrow"
        )
    buffer = pa.BufferOutputStream()
    try:
        pq.write_table(in_memory.arrow_of(log), buffer)
    except pa.ArrowException as error:
        raise UserError(
            f"the table cannot be written to a Parquet file: {error}; give each column one type"
        ) from error
    content = buffer.getvalue().to_pybytes()
    path = Path(directory) / "tables" / f"{hashlib.sha256(content).hexdigest()[:12]}.parquet"
    if not path.exists():
        write_whole(path, content)
    return str(path)


def build_dataset(config: ConfigDict, thorough: bool) -> Path:
    """Build the dataset of a valid config, or check one that exists, see `api.prepare`."""
    name = dataset_name(config)
    directory = storage.directory_of(name, config.data.dir)
    entry = SOURCES[config.data.name]
    before = config.data.get("extends", "")
    if not directory.exists():
        if before and not storage.directory_of(name, before).exists():
            raise UserError(
                f"data.extends={before} holds no dataset of this config, with data.path as "
                "written; name the data.dir of the dataset to extend, or leave data.extends "
                "out to read the whole log"
            )
        extended = [storage.open_dataset(name, before, PREPARE_DATA)] if before else []
        opened = (config.data, config.tasks, config.funnel, *extended)
        open_source = functools.partial(entry.open_source, *opened)
        storage.build(open_source, name, config.data.dir, *extended)
    else:
        storage.open_dataset(name, config.data.dir, PREPARE_DATA, thorough)
        entry.check_unchanged(config.data, directory)
        if report := read_data_report(directory):
            findings.check_allowed(report, config.data.allow, str(directory))
    return directory


def dataset_of(config: ConfigDict, unchanged: bool = False) -> Dataset:
    """Open the config's dataset; UserError if it is missing, does not suit, or is of other files.

    Only with `unchanged` are its raw files checked.
    """
    name = dataset_name(config)
    dataset = storage.open_dataset(name, config.data.dir, made_by=PREPARE_DATA)
    if config.data.name == in_memory.NAME:
        in_memory.check_fits(dataset, config.data, config.tasks, config.funnel.retrieved)
    if unchanged:
        SOURCES[config.data.name].check_unchanged(config.data, dataset.directory)
    return dataset


def scores_folder(config: ConfigDict, teacher_version: str) -> Path:
    """The folder of a teacher's scores for the config's dataset, by `TrainedRanker.version`."""
    name = f"{dataset_name(config)}-teacher-{teacher_version}-{config.teacher.stage}"
    return Path(config.data.dir) / SCORES_FOLDER / name


def dataset_under(config: ConfigDict, dataset: Dataset, teacher_version: str) -> Dataset:
    """Return the dataset with the probabilities of a teacher; UserError if it has not scored it."""
    folder = scores_folder(config, teacher_version)
    stage = TEACHER_STAGES[config.teacher.stage]
    return storage.with_column(dataset, folder, LOG_TEACHER, teacher_version, stage)


def keep_data_report(dataset: Dataset, workdir: Path) -> None:
    """Copy the data report of an own log's dataset to a workdir, where `report` reads it."""
    path = dataset.directory / JSON_FILE
    if path.exists():
        write_atomically(workdir / JSON_FILE, path.read_bytes())


def data_lines(config: ConfigDict, dataset: Dataset) -> list[str]:
    """The lines on a dataset: an own log's candidates and remarks, and the epochs of training."""
    lines = []
    requests = len(dataset.columns["train"])
    if report := read_data_report(dataset.directory):
        candidates = report["candidates"]
        reasons = {name: entry["candidates"] for name, entry in candidates["by_reason"].items()}
        lines.append(candidates_line(candidates["used"], "used", reasons))
        lines += [f"remark: {remark}" for remark in report["remarks"]]
        if "teacher" in config.data and not config.data.teacher:
            lines.append(
                "teacher: data.teacher names no column, so a final ranker is trained from the "
                "labels; name the column if the log has the scores of yours"
            )
    has_teacher = config.teacher.source == "live" or config.teacher.workdir
    trained = {"": config, "teacher.": config.teacher} if has_teacher else {"": config}
    for prefix, section in trained.items():
        epochs = section.train.steps * section.batch.requests / requests
        lines.append(
            f"epochs: {epochs:.3g} in {prefix}train.steps={section.train.steps}, of {requests:,} "
            f"training requests, {section.batch.requests} a step"
        )
    return lines


def candidates_line(used: int, verb: str, rejected: Mapping[str, int]) -> str:
    """The line on a log's candidates: those used, and those rejected by reason."""
    count = sum(rejected.values())
    reasons = ", ".join(f"{name} {number:,}" for name, number in rejected.items())
    return (
        f"candidates: {used + count:,} in the log = {used:,} {verb} + {count:,} rejected"
        f"{f' ({reasons})' if reasons else ''}"
    )
