import contextlib
import struct

import pytest
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event, SessionLog

from kd_ranker.errors import UserError
from kd_ranker.tracking.tensorboard import TensorBoard
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.workdir import MetricsWriter
from tests.faults import fault_of


def claim(folder, command="train", dataset="small/0123456789ab", without=(), **changes):
    """What each run does before it writes anything else; returns its config."""
    config = ConfigDict({"seed": 0, "sizes": (1, 2), "train": {"steps": 3}} | changes)
    workdirs.check(folder, command, config, {"dataset": dataset}, without)
    workdirs.write_config(folder, command, config, {"dataset": dataset})
    return config


def test_a_workdir_belongs_to_one_command_config_and_dataset(tmp_path):
    workdir = tmp_path / "a" / "b"
    config = claim(workdir)
    assert claim(workdir) == config
    before = {path: path.read_bytes() for path in workdir.iterdir()}
    for changes, message in [
        ({"command": "sweep"}, f"{workdir} belongs to a run of train; use another --workdir"),
        (
            {"train": {"steps": 4}, "extra": 1},
            f"{workdir} holds a run of another config; use another --workdir or set back: "
            "extra (None there, 1 now), train.steps (3 there, 4 now)",
        ),
        (
            {"dataset": "small/ba9876543210"},
            f"{workdir} holds a run on the dataset small/0123456789ab, and data.dir holds "
            "small/ba9876543210, which has other content; name the data.dir of the first one, or "
            "use another --workdir",
        ),
    ]:
        assert fault_of(claim, workdir, **changes) == message
    assert {path: path.read_bytes() for path in workdir.iterdir()} == before
    # As it was written, tuples and all: flags can only set what is one.
    assert workdirs.read_config(workdir) == config


def test_what_does_not_matter_to_a_run_may_change(tmp_path):
    claim(tmp_path, trainer=1)
    claim(tmp_path, trainer=1, train={"steps": 4}, without=("train",))
    # A section is left out whole, and not what merely begins with its name.
    with pytest.raises(UserError, match=r"trainer \(1 there, 2 now\)"):
        claim(tmp_path, trainer=2, without=("train",))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (workdirs.CONFIG_FILE, r"config.json is damaged: .*; restore it, or use another"),
        (workdirs.ENVIRONMENT_FILE, r"environment.json is .*; remove it: it only records"),
    ],
)
@pytest.mark.parametrize("damaged", ['{"seed', "\x00", "[]"])
def test_a_damaged_file_is_named_with_a_remedy_and_stays(tmp_path, file, message, damaged):
    claim(tmp_path)
    (tmp_path / file).write_text(damaged)
    with pytest.raises(UserError, match=message):
        claim(tmp_path)
    assert (tmp_path / file).read_text() == damaged


@pytest.mark.parametrize("file", [workdirs.CONFIG_FILE, workdirs.ENVIRONMENT_FILE])
def test_a_folder_in_the_place_of_a_file_is_named_with_a_remedy(tmp_path, file):
    claim(tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    assert fault_of(claim, tmp_path).startswith(f"{tmp_path / file} is damaged: ")


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    for text in ("one", "two"):
        workdirs.write_atomically(path, text)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        workdirs.write_atomically(path, "three")
    assert [(path.name, path.read_text()) for path in path.parent.iterdir()] == [("file", "two")]


def write_metrics(workdir, start, scalars):
    with contextlib.closing(MetricsWriter(workdir, start, TensorBoard())) as writer:
        for step, of_step in scalars.items():
            writer.write(step, of_step)


def test_a_resumed_run_drops_metrics_after_its_checkpoint(tmp_path):
    write_metrics(tmp_path, 0, {step: {"loss": step / 2} for step in (1, 2, 3, 4)})
    file = tmp_path / workdirs.METRICS_FILE
    # The last line of a killed run may be cut short.
    file.write_text(file.read_text()[:-5])
    write_metrics(tmp_path, 2, {3: {"loss": 9.0}})
    assert workdirs.read_metrics(file) == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0},
    ]  # fmt: skip


def test_speed_has_a_file_of_its_own(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path, 0, TensorBoard())) as writer:
        writer.write(5, {"loss": 0.5})
        writer.write_speed(5, {"speed/steps": 2.0})
        writer.write_speed(6, {})
    assert workdirs.read_metrics(tmp_path / workdirs.METRICS_FILE) == [{"step": 5, "loss": 0.5}]
    (line,) = workdirs.read_metrics(tmp_path / workdirs.SPEED_FILE)
    assert line == {"step": 5, "speed/steps": 2.0}


def test_tensorboard_hides_the_scalars_of_a_killed_run(tmp_path):
    write_metrics(tmp_path, 4, {5: {"loss": 0.5, "unknown_ids/item": 3.0}})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    # A file of TFRecords: a length and its checksum, an event and its checksum.
    content = path.read_bytes()
    events = []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    first, session, *scalars = events
    assert first.file_version == "brain.Event:2"
    assert session.step == 5
    assert session.session_log.status == SessionLog.START
    values = [
        (event.step, value.tag, value.simple_value)
        for event in scalars
        for value in event.summary.value
    ]
    assert values == [(5, "loss", 0.5), (5, "unknown_ids/item", 3)]
