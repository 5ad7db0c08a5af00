import contextlib
import logging
import resource
import shutil
import signal

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kd_ranker.errors import UserError
from kd_ranker.training import checkpoints
from tests.faults import fault_of

STEPS = (2, 4, 6)
OURS = {"dataset": "d", "config": "1234"}


def state_of(step):
    values = np.arange(50_000, dtype=np.float32)
    return {"step": np.array(step, np.int32), "table": values.reshape(100, 500) + step, "empty": {}}


def save(workdir, *steps):
    """What a run in `workdir` would save, with the numbers of its loader."""
    iterator, taken = numbers(), 0
    with checkpoints.open_in(workdir, to_write=True) as saved:
        for step in steps:
            for _ in range(step - taken):
                next(iterator)
            checkpoints.save(saved, step, state_of(step), iterator, OURS)
            taken = step


def numbers():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def restore(workdir, iterator=None, provenance=OURS):
    """What a run in `workdir` would start from."""
    with checkpoints.open_in(workdir) as saved:
        blank = jax.tree.map(np.zeros_like, state_of(0))
        return checkpoints.restore(saved, blank, iterator, provenance)


def assert_starts_at(workdir, step):
    iterator = numbers()
    state, found = restore(workdir, iterator)
    assert found == step
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
    assert next(iterator) == step


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    save(workdir, *STEPS)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def folder(workdir, step):
    return workdir / checkpoints.FOLDER / str(step)


def truncate(folder):
    files = (path for path in (folder / "state").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def delete_the_state(folder):
    shutil.rmtree(folder / "state")


def damage_the_record(folder):
    (folder / "record" / "metadata").write_text("{")


def exchange(folder):
    """An older checkpoint under this name."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("2"), folder)


def test_a_run_starts_at_its_newest_checkpoint_or_at_its_start(workdir, tmp_path):
    assert_starts_at(workdir, 6)
    state, step = restore(tmp_path / "new", numbers())
    assert step == state["step"] == 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, ""),
        (delete_the_state, ""),
        (damage_the_record, ""),
        (exchange, "it was saved at step 2"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_replaced(workdir, damage, reason, caplog):
    damage(folder(workdir, 6))
    with caplog.at_level(logging.WARNING):
        assert_starts_at(workdir, 4)
    (warning,) = caplog.records
    assert f"{folder(workdir, 6)} cannot be restored: {reason}" in warning.getMessage()
    assert "\n" not in warning.getMessage()
    save(workdir, 6)
    assert_starts_at(workdir, 6)


def test_a_checkpoint_unreadable_to_one_process_is_skipped(workdir, monkeypatch, caplog):
    found = iter([1, None])  # the first process that cannot read the newest one, and the one before
    monkeypatch.setattr(checkpoints, "first_without", lambda _: next(found))
    with caplog.at_level(logging.WARNING):
        assert_starts_at(workdir, 4)
    assert "cannot be restored: another process failed" in caplog.text


def test_the_next_run_removes_half_written_checkpoints(workdir):
    left = folder(workdir, "5.orbax-checkpoint-tmp") / "state"
    left.mkdir(parents=True)
    assert_starts_at(workdir, 6)
    assert left.exists()  # a reader must not disturb the writer
    save(workdir, 8)
    assert {path.name for path in (workdir / checkpoints.FOLDER).iterdir()} == {"4", "6", "8"}


def test_another_runs_checkpoint_is_refused_and_stays(workdir):
    other = OURS | {"config": "5678", "scored": "s"}
    assert fault_of(restore, workdir, None, other) == (
        f"{folder(workdir, 6)} belongs to another run: config (1234 there, 5678 now), scored (None "
        f"there, s now); use another --workdir, or remove {workdir / checkpoints.FOLDER} to train "
        "from the start"
    )
    assert_starts_at(workdir, 6)


def test_a_checkpoint_outlives_donated_buffers(tmp_path):
    add = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = jax.device_put(state_of(1))
    with checkpoints.open_in(tmp_path) as saved:
        checkpoints.save(saved, 1, state, numbers(), OURS)
        for _ in range(5):
            state = add(state)
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path)[0], state_of(1))


def test_if_none_can_be_restored_nothing_is_overwritten(workdir):
    for step in STEPS:
        truncate(folder(workdir, step))
    with pytest.raises(UserError, match=r"none of the checkpoints in .* can be restored \("):
        restore(workdir)
    assert {path.name for path in (workdir / checkpoints.FOLDER).iterdir()} == {"2", "4", "6"}


@pytest.mark.parametrize("fault", [MemoryError, PermissionError])
def test_an_error_of_the_machine_is_raised(workdir, monkeypatch, fault):
    def restore_of(*_, **__):
        raise fault

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore_of)
    with pytest.raises(fault):
        restore(workdir)


@pytest.mark.parametrize("steps", [(8,), (8, 10)], ids=["end", "next"])
def test_a_failed_save_is_one_line_and_keeps_the_one_before(workdir, caplog, steps):
    line = r"^a checkpoint could not be written to .*/checkpoints \(.*File too large.*the previous"
    with pytest.raises(UserError, match=line), small_files():
        save(workdir, *steps)
    assert [record.pathname for record in caplog.records if record.name == "absl"] == []
    assert_starts_at(workdir, 6)


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
