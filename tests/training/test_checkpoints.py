import contextlib
import logging
import resource
import shutil
import signal

import grain
import jax
import numpy as np
import pytest

from kd_ranker.errors import UserError
from kd_ranker.training import checkpoints
from tests.faults import fault_of

STEPS = (2, 4, 6)
OURS = {"dataset": "d", "config": "1234"}


def state_of(step):
    values = np.arange(50_000, dtype=np.float32)
    return {"step": np.array(step, np.int32), "table": values.reshape(100, 500) + step, "empty": {}}


def numbers():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def restore(workdir, iterator=None, identity=OURS):
    """What a run in `workdir` would start from."""
    with checkpoints.open_in(workdir) as saved:
        blank = jax.tree.map(np.zeros_like, state_of(0))
        return checkpoints.restore(saved, blank, iterator, identity)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir, iterator = tmp_path_factory.mktemp("run"), numbers()
    with checkpoints.open_in(workdir) as saved:
        for step in range(1, STEPS[-1] + 1):
            next(iterator)
            if step in STEPS:
                checkpoints.save(saved, step, state_of(step), iterator, OURS)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def folder(workdir, step):
    return workdir / checkpoints.FOLDER / str(step)


def truncate(workdir, step):
    files = (path for path in (folder(workdir, step) / "state").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def delete_the_state(workdir, step):
    shutil.rmtree(folder(workdir, step) / "state")


def rename(workdir, step):
    """As if an older checkpoint were the newest one."""
    shutil.rmtree(folder(workdir, step))
    shutil.copytree(folder(workdir, 2), folder(workdir, step))


def damage_the_record(workdir, step):
    (folder(workdir, step) / "record" / "metadata").write_text("{")


def test_the_newest_checkpoint_comes_back_with_the_loaders_position(workdir):
    iterator = numbers()
    state, step = restore(workdir, iterator)
    assert step == 6
    jax.tree.map(np.testing.assert_array_equal, state, state_of(6))
    assert next(iterator) == 6


def test_without_checkpoints_a_run_starts_at_its_start(tmp_path):
    state, step = restore(tmp_path, numbers())
    assert step == 0
    assert state["step"] == 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, ""),
        (delete_the_state, ""),
        (damage_the_record, ""),
        (rename, "it was saved at step 2"),
    ],
)
def test_a_damaged_checkpoint_is_reported_passed_over_and_replaced(workdir, damage, reason, caplog):
    damage(workdir, 6)
    iterator = numbers()
    with caplog.at_level(logging.WARNING):
        state, step = restore(workdir, iterator)
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, state, state_of(4))
    assert next(iterator) == 4
    (warning,) = caplog.records
    assert f"{folder(workdir, 6)} cannot be restored: {reason}" in warning.getMessage()
    assert "\n" not in warning.getMessage()
    with checkpoints.open_in(workdir, to_write=True) as saved:
        checkpoints.save(saved, 6, state_of(6), None, OURS)
    assert restore(workdir)[1] == 6


def test_a_checkpoint_that_another_process_cannot_read_is_passed_over(workdir, monkeypatch, caplog):
    found = iter([1, None])  # the first process that cannot read the newest one, and the one before
    monkeypatch.setattr(checkpoints, "first_without", lambda _: next(found))
    with caplog.at_level(logging.WARNING):
        assert restore(workdir)[1] == 4
    assert "cannot be restored: another process cannot read it" in caplog.text


def test_what_a_killed_run_has_left_half_written_is_removed(workdir):
    left = folder(workdir, "5.orbax-checkpoint-tmp") / "state"
    left.mkdir(parents=True)
    assert restore(workdir)[1] == 6
    assert left.exists()  # a reader must not disturb the writer
    with checkpoints.open_in(workdir, to_write=True) as saved:
        checkpoints.save(saved, 8, state_of(8), None, OURS)
    assert {path.name for path in (workdir / checkpoints.FOLDER).iterdir()} == {"4", "6", "8"}


@pytest.mark.parametrize(
    ("identity", "differing"),
    [
        ({"config": "5678"}, "config (1234 there, 5678 now)"),
        ({"scored": "s"}, "scored (None there, s now)"),
        ({"dataset": "e", "config": "5678"}, "config (1234 there, 5678 now), dataset (d there,"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs_and_stays(
    workdir, identity, differing
):
    iterator = numbers()
    fault = fault_of(restore, workdir, iterator, OURS | identity)
    assert f"{folder(workdir, 6)} belongs to another run: {differing}" in fault
    assert f"another --workdir, or remove {workdir / checkpoints.FOLDER}" in fault
    assert next(iterator) == 0
    assert restore(workdir)[1] == 6


def test_what_is_saved_outlives_the_buffers_that_the_next_step_takes(tmp_path):
    add = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = jax.device_put({"table": state_of(1)["table"]})
    with checkpoints.open_in(tmp_path) as saved:
        checkpoints.save(saved, 1, state, None, OURS)
        for _ in range(5):
            state = add(state)
    with checkpoints.open_in(tmp_path) as saved:
        blank = {"table": np.zeros_like(state_of(1)["table"])}
        restored, _ = checkpoints.restore(saved, blank, None, OURS)
    np.testing.assert_array_equal(restored["table"], state_of(1)["table"])


def test_if_none_can_be_restored_nothing_is_overwritten(workdir):
    for step in STEPS:
        truncate(workdir, step)
    iterator = numbers()
    with pytest.raises(UserError, match=r"none of the checkpoints in .* can be restored \("):
        restore(workdir, iterator)
    assert next(iterator) == 0
    assert {path.name for path in (workdir / checkpoints.FOLDER).iterdir()} == {"2", "4", "6"}


@pytest.mark.parametrize("fault", [MemoryError("no more is free"), PermissionError("denied")])
def test_an_error_of_the_machine_is_raised(workdir, monkeypatch, fault):
    def fail(*_):
        raise fault

    monkeypatch.setattr(checkpoints, "_read", fail)
    with pytest.raises(type(fault)):
        restore(workdir)


@pytest.mark.parametrize("steps", [(8,), (8, 10)], ids=["end", "next"])
def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_one_before_stays(
    workdir, caplog, steps
):
    line = r"^a checkpoint could not be written to .*/checkpoints \(.*File too large.*the previous"

    def save(steps):
        with small_files(), checkpoints.open_in(workdir, to_write=True) as saved:
            for step in steps:
                checkpoints.save(saved, step, state_of(step), None, OURS)

    with pytest.raises(UserError, match=line):
        save(steps)
    assert [record.pathname for record in caplog.records if record.name == "absl"] == []
    assert restore(workdir)[1] == 6


@contextlib.contextmanager
def small_files():
    """No file can grow beyond 10 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
