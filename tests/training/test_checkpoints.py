import contextlib
import errno
import json
import logging
import shutil
import threading

import grain
import jax
import numpy as np
import pytest

from kd_ranker.errors import UserError
from kd_ranker.training import checkpoints

STEPS = (2, 4, 6)
OURS = {"members": "a, b", "config": "1234"}


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


@pytest.fixture
def workdir(tmp_path):
    iterator = numbers()
    with checkpoints.open_in(tmp_path) as saved:
        for step in range(1, STEPS[-1] + 1):
            next(iterator)
            if step in STEPS:
                checkpoints.save(saved, step, state_of(step), iterator, OURS)
    return tmp_path


def folder(workdir, step):
    return workdir / checkpoints.FOLDER / str(step)


def largest_file(workdir, step):
    files = (path for path in (folder(workdir, step) / "state").rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def truncate(workdir, step):
    file = largest_file(workdir, step)
    file.write_bytes(file.read_bytes()[:100])


def flip(workdir, step):
    file = largest_file(workdir, step)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def delete_a_file(workdir, step):
    largest_file(workdir, step).unlink()


def delete_the_state(workdir, step):
    shutil.rmtree(folder(workdir, step) / "state")


def empty(workdir, step):
    shutil.rmtree(folder(workdir, step))
    folder(workdir, step).mkdir()


def change_the_checksum(workdir, step):
    """Files as they were written, but not of the state that was saved."""
    file = folder(workdir, step) / "checksum" / "metadata"
    recorded = json.loads(file.read_text())
    file.write_text(json.dumps(recorded | {"crc32": recorded["crc32"] ^ 1}))
    (folder(workdir, step) / "files.json").unlink()


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
        (truncate, "is not as it was written"),
        (flip, "is not as it was written"),
        (delete_a_file, "is missing"),
        (delete_the_state, "is missing"),
        (empty, "its folder is empty"),
        (change_the_checksum, "do not match its checksum"),
    ],
)
def test_a_damaged_checkpoint_is_reported_set_aside_and_passed_over(
    workdir, damage, reason, caplog, capfd
):
    damage(workdir, 6)
    iterator = numbers()
    with caplog.at_level(logging.WARNING):
        state, step = restore(workdir, iterator)
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, state, state_of(4))
    assert next(iterator) == 4
    (warning,) = [record for record in caplog.records if "is damaged" in record.getMessage()]
    assert str(folder(workdir, 6)) in warning.getMessage()
    assert reason in warning.getMessage()
    assert "goes on from step 4" in warning.getMessage()
    assert "\n" not in warning.getMessage()
    assert "Traceback" not in capfd.readouterr().err
    assert [path.name for path in (workdir / checkpoints.DAMAGED_FOLDER).iterdir()] == ["6"]
    assert not folder(workdir, 6).exists()


def test_the_step_of_a_damaged_checkpoint_can_be_saved_and_be_damaged_again(workdir):
    for _ in range(2):
        flip(workdir, 6)
        with checkpoints.open_in(workdir) as saved:
            _, step = checkpoints.restore(saved, state_of(0), None, OURS)
            assert step == 4
            checkpoints.save(saved, 6, state_of(6), None, OURS)
        assert restore(workdir)[1] == 6
    assert {path.name for path in (workdir / checkpoints.DAMAGED_FOLDER).iterdir()} == {
        "6", "6_again",
    }  # fmt: skip


@pytest.mark.parametrize("fault", [MemoryError("no more is free"), PermissionError("denied")])
def test_a_fault_of_the_machine_is_none_of_its_checkpoints(workdir, monkeypatch, fault):
    def fail(_):
        raise fault

    with monkeypatch.context() as failing:
        failing.setattr(checkpoints, "checksum", fail)
        with pytest.raises(type(fault)):
            restore(workdir)
    assert not (workdir / checkpoints.DAMAGED_FOLDER).exists()
    assert restore(workdir)[1] == 6


def test_checkpoints_that_another_release_wrote_are_no_damaged_ones(workdir, monkeypatch):
    """Each of them would be moved away in its turn, and the run begin anew."""
    with checkpoints.open_in(workdir) as saved:
        load = saved.manager.restore

        def of_another_release(step, args):
            if "state" in args:
                raise KeyError("a format that is not known")
            return load(step, args=args)

        monkeypatch.setattr(saved.manager, "restore", of_another_release)
        with pytest.raises(UserError, match=r"6 is as it was written, and cannot be .*'a format"):
            checkpoints.restore(saved, state_of(0), None, OURS)
        # Without its checksums, nobody knows.
        (folder(workdir, 6) / "files.json").unlink()
        with pytest.raises(UserError, match="4 is as it was written"):
            checkpoints.restore(saved, state_of(0), None, OURS)
    assert [path.name for path in (workdir / checkpoints.DAMAGED_FOLDER).iterdir()] == ["6"]


def test_of_several_processes_the_first_says_which_checkpoint_all_go_on_from(workdir, monkeypatch):
    """Another one may see an older list of the folder, as a mounted one is cached."""
    with checkpoints.open_in(workdir) as saved:
        of_first = saved.manager.all_steps

        def on_first(function):
            with monkeypatch.context() as first:
                first.setattr(saved.manager, "all_steps", of_first)
                return function()

        monkeypatch.setattr(checkpoints, "on_first", on_first)
        monkeypatch.setattr(saved.manager, "all_steps", lambda: [2, 4])
        assert checkpoints.restore(saved, state_of(0), None, OURS)[1] == 6


@pytest.mark.parametrize("here", [True, False])
def test_a_checkpoint_that_one_of_several_processes_cannot_read_is_left_and_told(
    workdir, monkeypatch, here
):
    def fail(_):
        raise OSError("no such device")

    # Process 1 cannot, whichever this one is.
    monkeypatch.setattr(checkpoints, "first_without", lambda holds: 0 if holds == here else 1)
    if here:
        monkeypatch.setattr(checkpoints, "checksum", fail)
    with pytest.raises(
        UserError, match=r"process \d cannot read .*/6, and another one can"
    ) as told:
        restore(workdir)
    assert ("no such device" in str(told.value)) == here
    assert not (workdir / checkpoints.DAMAGED_FOLDER).exists()


def test_what_a_killed_run_has_left_half_written_is_removed(workdir):
    left = folder(workdir, "5.orbax-checkpoint-tmp") / "state"
    left.mkdir(parents=True)
    assert restore(workdir)[1] == 6
    assert left.exists()  # who only reads may do so beside the one that writes
    with checkpoints.open_in(workdir) as saved:
        checkpoints.remove_unfinished(saved)
    assert {path.name for path in (workdir / checkpoints.FOLDER).iterdir()} == {"2", "4", "6"}


def test_when_all_are_damaged_the_run_starts_over_and_nothing_is_lost(workdir, caplog):
    # These fail late: after the loader's position was restored.
    for step in STEPS:
        change_the_checksum(workdir, step)
    iterator = numbers()
    state, step = restore(workdir, iterator)
    assert step == 0
    assert state["step"] == 0
    assert next(iterator) == 0
    assert sum("is damaged" in record.getMessage() for record in caplog.records) == len(STEPS)
    assert {path.name for path in (workdir / checkpoints.DAMAGED_FOLDER).iterdir()} == {
        str(step) for step in STEPS
    }


def test_a_checkpoint_of_another_model_is_an_error_and_stays_where_it_is(workdir):
    other = {
        "step": np.array(0, np.int32),
        "table": np.zeros((3, 3), np.float32),
        "more": np.zeros(2),
    }
    with (
        checkpoints.open_in(workdir) as saved,
        pytest.raises(UserError, match="holds a model of other sizes"),
    ):
        checkpoints.restore(saved, other, None, OURS)
    assert restore(workdir)[1] == 6
    assert not (workdir / checkpoints.DAMAGED_FOLDER).exists()


@pytest.mark.parametrize(
    ("identity", "differing"),
    [
        ({"members": "a, c"}, "members (b there, c now)"),
        ({"members": "a, b, c"}, "members (no other there, c now)"),
        ({"members": "b, a"}, "members (a, b there, b, a now)"),
        ({"config": "5678"}, "config (1234 there, 5678 now)"),
        ({"members": "c", "config": "5678"}, "members (a, b there, c now), config (1234"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs_and_stays(
    workdir, identity, differing
):
    iterator = numbers()
    with pytest.raises(UserError) as caught:
        restore(workdir, iterator, OURS | identity)
    assert f"{folder(workdir, 6)} belongs to another run: {differing}" in str(caught.value)
    assert f"another --workdir, or remove {workdir / checkpoints.FOLDER}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert next(iterator) == 0
    assert restore(workdir)[1] == 6
    assert not (workdir / checkpoints.DAMAGED_FOLDER).exists()


def test_a_checkpoint_that_does_not_say_whose_it_is_is_refused(workdir):
    file = folder(workdir, 6) / "checksum" / "metadata"
    recorded = json.loads(file.read_text())
    del recorded["identity"]
    file.write_text(json.dumps(recorded))
    (folder(workdir, 6) / "files.json").unlink()
    with pytest.raises(UserError, match="6 does not say whose it is, so it is of an older"):
        restore(workdir)
    assert folder(workdir, 6).is_dir()


def test_a_damaged_checkpoint_of_another_run_is_set_aside_before_that_run_is_asked(workdir):
    flip(workdir, 6)
    with pytest.raises(UserError, match="4 belongs to another run"):
        restore(workdir, identity={"members": "c"})
    assert [path.name for path in (workdir / checkpoints.DAMAGED_FOLDER).iterdir()] == ["6"]


def test_a_run_killed_before_its_checkpoint_was_sealed_can_use_it(workdir):
    (folder(workdir, 6) / "files.json").unlink()
    assert restore(workdir)[1] == 6


def test_the_rest_of_a_checkpoint_that_was_being_removed_is_never_taken_for_a_whole_one(workdir):
    (folder(workdir, 2) / "files.json").unlink()
    delete_a_file(workdir, 2)
    assert restore(workdir)[1] == 6
    for step in (4, 6):
        truncate(workdir, step)
    assert restore(workdir)[1] == 0
    assert len([*(workdir / checkpoints.DAMAGED_FOLDER).iterdir()]) == 3


def test_a_checkpoint_without_a_position_is_of_an_older_release_whatever_its_state(
    tmp_path, monkeypatch
):
    record = {"sizes": checkpoints._sizes(state_of(2)), "identity": dict(OURS)}
    with checkpoints.open_in(tmp_path) as saved:
        checkpoints._write(saved.manager, 2, state_of(2), record)
    assert restore(tmp_path)[1] == 2

    def fail(_):
        raise ValueError("a state that nobody knows any more")

    monkeypatch.setattr(checkpoints, "checksum", fail)
    with pytest.raises(UserError, match="2 is of an older release, from which no run can go on"):
        restore(tmp_path, iterator=numbers())


def test_only_the_last_few_are_kept(workdir):
    with checkpoints.open_in(workdir) as saved:
        checkpoints.save(saved, 8, state_of(8), None, OURS)
    assert {path.name for path in (workdir / checkpoints.FOLDER).iterdir()} == {"4", "6", "8"}


def test_what_is_saved_is_the_state_at_that_moment(tmp_path):
    state = state_of(1)
    with checkpoints.open_in(tmp_path) as saved:
        checkpoints.save(saved, 1, state, None, OURS)
        state["table"][:] = -1.0
    np.testing.assert_array_equal(restore(tmp_path)[0]["table"], state_of(1)["table"])


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


def test_a_disk_without_room_for_the_next_checkpoint_is_told_with_what_it_needs(
    tmp_path, monkeypatch
):
    state = {"table": jax.ShapeDtypeStruct((1000, 1000), np.float32)}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 0, 4_000_000))
    with pytest.raises(UserError, match=r"has 4.0 MB free, and the next .* needs 4.7 MB; free so"):
        checkpoints.check_room(tmp_path, state)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 0, 5_000_000))
    checkpoints.check_room(tmp_path, state)


def test_a_run_goes_on_while_its_checkpoint_is_written_and_waits_with_the_next(
    tmp_path, monkeypatch
):
    let_it, events = threading.Event(), []
    whole = checkpoints.Checkpoints.wait

    def wait(saved):
        let_it.set()
        whole(saved)
        events.append("whole")

    with checkpoints.open_in(tmp_path) as saved:
        write = saved.manager.save
        monkeypatch.setattr(
            saved.manager, "save", lambda *of, **by: let_it.wait() and write(*of, **by)
        )
        checkpoints.save(saved, 1, state_of(1), None, OURS)
        assert not folder(tmp_path, 1).exists()
        monkeypatch.setattr(checkpoints.Checkpoints, "wait", wait)
        checkpoints.save(saved, 2, state_of(2), None, OURS)
        assert events == ["whole"]
        assert (folder(tmp_path, 1) / "files.json").exists()
    assert restore(tmp_path)[1] == 2


def test_what_kept_a_checkpoint_from_being_written_is_raised_and_the_one_before_stays(
    workdir, monkeypatch
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save(step):
        checkpoints.save(saved, step, state_of(step), None, OURS)

    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(checkpoints.open_in(workdir))
        monkeypatch.setattr(saved.manager, "save", full)
        save(8)
        with pytest.raises(OSError, match="No space left"):
            save(10)
        save(12)
        with pytest.raises(OSError, match="No space left"):
            stack.close()
    assert restore(workdir)[1] == 6
