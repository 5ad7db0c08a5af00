"""A log that changes under its dataset, and the runs on the dataset before."""

import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_ranker import api
from kd_ranker.evaluation import results
from kd_ranker.pipeline import datasets, scoring
from kd_ranker.training import workdir as workdirs
from tests import small
from tests.faults import fault_of
from tests.sources import faulty_logs
from tests.sources.faulty_logs import make_rows, write_log

RUNS = ("train_teacher", "train", "sweep")


def make_config(log, folder):
    config = faulty_logs.made_small(faulty_logs.config(log, folder))
    config.distill.mode = "aux"
    config.sweep.update(modes=("none",), seeds=(0,))
    return config


def changed(config, **changes):
    """The config with changes; `sweep__part="0"` changes `sweep.part`."""
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return other


ANOTHER_SEED = {"sweep__seeds": (0, 1), "sweep__extend": True}


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def grow(log, folder):
    (write_log(folder / "more", make_rows(1)) / "part-0.parquet").rename(log / "part-9.parquet")


def mend_labels(log, _=None):
    """Reverses the labels of each file; sizes and numbers of rows stay."""
    for path in log.iterdir():
        table, before = pq.read_table(path), path.stat()
        for name in ("watch", "like"):
            column = table.column_names.index(name)
            reversed_ = table[name].take(pa.array(range(len(table))[::-1]))
            table = table.set_column(column, table.schema.field(name), reversed_)
        pq.write_table(table, path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a log, its dataset, and a run of each kind on that."""
    folder = tmp_path_factory.mktemp("before")
    log = write_log(folder / "log", make_rows(0, requests=60), files=2)
    config = make_config(log, folder / "datasets")
    api.prepare(config)
    for name in RUNS:
        getattr(api, name)(config, folder / name)
    return folder


@pytest.fixture
def world(made, tmp_path_factory):
    """The same at the same path, for one test to change: the path is a part of the config."""
    kept = shutil.copytree(made, tmp_path_factory.mktemp("kept") / "before")
    yield make_config(made / "log", made / "datasets")
    shutil.rmtree(made)
    shutil.copytree(kept, made)


def faults_of(config, folder):
    """The workdir and the message of each command that goes on from a run in a folder."""
    extended = changed(config, **ANOTHER_SEED)
    commands = [(getattr(api, name), config, folder / name) for name in RUNS]
    commands += [
        (api.sweep, of, folder / "sweep") for of in (extended, changed(extended, sweep__part="0"))
    ]
    before = files_of(folder)
    for command, of, workdir in commands:
        yield workdir, fault_of(command, of, workdir)
    assert files_of(folder) == before


@pytest.mark.parametrize("change", [grow, mend_labels])
def test_nothing_trains_on_a_log_that_has_changed(world, made, tmp_path, change):
    change(made / "log", tmp_path)
    directory = datasets.dataset_of(world).directory
    message = fault_of(api.prepare, world)
    assert f"has changed since {directory} was made of it (" in message
    assert message.endswith("; give another data.dir to make a new dataset, or restore its files")
    found = [*faults_of(world, made), *faults_of(world, tmp_path)]
    assert (
        {fault for _, fault in found} == {message} == {fault_of(api.run, world, tmp_path / "run")}
    )
    assert not [*tmp_path.rglob("checkpoints")]


def test_mended_labels_make_another_dataset(world, made, tmp_path):
    old = datasets.dataset_of(world)
    mend_labels(made / "log")
    shutil.rmtree(old.directory)
    api.prepare(world)
    new = datasets.dataset_of(world)
    # The name and all sizes are equal.
    assert (new.directory, new.spec) == (old.directory, old.spec)
    there, here = (of.provenance["dataset"] for of in (old, new))
    live = changed(world, teacher__source="live", teacher__workdir=str(made / "train_teacher"))
    found = [*faults_of(world, made)]
    found.append((made / "train_teacher", fault_of(api.train, live, tmp_path / "live")))
    for name in RUNS:
        workdir = made / name
        found.append((workdir, fault_of(api.export, workdir, tmp_path / "out")))
        found.append((workdir, fault_of(scoring.score_unseen, world, workdir)))
    for workdir, fault in found:
        assert fault == (
            f"{workdir} holds a run on the dataset {there}, and data.dir holds {here}, which has "
            "other content; name the data.dir of the first one, or use another --workdir"
        )
    # Checkpoints and tables know their dataset too.
    for name in RUNS:
        (made / name / workdirs.ENVIRONMENT_FILE).unlink()
        fault = fault_of(getattr(api, name), world, made / name)
        assert f"belongs to another run: dataset ({there} there, {here} now)" in fault


def test_earlier_students_are_of_use_beside_a_new_dataset(world, made, tmp_path):
    old = datasets.dataset_of(world)
    grow(made / "log", tmp_path)
    new = changed(world, data__dir=str(tmp_path / "datasets"))
    api.prepare(new)
    assert datasets.dataset_of(new).provenance != old.provenance
    api.train(new, tmp_path / "train")
    for name in RUNS:
        api.export(made / name, tmp_path / f"{name} exported", formats=("jax",))
        # The log as it is now, new rows included.
        scored, _ = scoring.score_unseen(world, made / name, output=tmp_path / f"{name} scored")
        assert len([*scored.directory.glob("*.parquet")]) == 3
    fault = fault_of(api.sweep, changed(new, **ANOTHER_SEED), made / "sweep")
    assert f"sweep holds a run on the dataset {old.provenance['dataset']}, and data.dir" in fault
    # A rebuild of the same log gives the same dataset.
    (made / "log" / "part-9.parquet").unlink()
    again = changed(world, data__dir=str(tmp_path / "again"), data__processes=1)
    api.prepare(again)
    assert datasets.dataset_of(again).provenance == old.provenance
    assert small.sweep(changed(again, **ANOTHER_SEED), made / "sweep")
    assert set(results.read_csv(made / "sweep" / results.FILE)["seed"].dropna()) == {0, 1}
