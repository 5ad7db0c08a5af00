import contextlib
import struct
import threading

import pytest
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event, SessionLog

from kd_ranker.errors import UserError
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.workdir import MetricsWriter
from tests.faults import fault_of

DATASET = {"dataset": "small/0123456789ab"}


def config_with(**changes):
    return ConfigDict({"seed": 0, "sizes": (1, 2), "train": {"steps": 3}} | changes)


def claim(folder, command, config, dataset, without=()):
    """What each run does before it writes anything else."""
    workdirs.check(folder, command, config, dataset, without)
    workdirs.write_config(folder, command, config, dataset)


def test_a_workdir_is_claimed_by_one_config(tmp_path):
    workdir = tmp_path / "a" / "b"
    claim(workdir, "train", config_with(), DATASET)
    claim(workdir, "train", config_with(), DATASET)
    assert workdirs.read_config(workdir).train.steps == 3
    other = config_with(train={"steps": 4}, extra=1)
    fault = fault_of(claim, workdir, "train", other, DATASET)
    assert "another --workdir" in fault
    assert "train.steps (3 there, 4 now)" in fault
    assert "extra (None there, 1 now)" in fault
    assert "seed" not in fault
    # As it was written, tuples and all: flags can only set what is one.
    assert workdirs.read_config(workdir) == config_with()


def test_a_file_is_replaced_whole_or_stays_and_nothing_else_is_left(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    for text in ("one", "two"):
        workdirs.write_atomically(path, text)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        workdirs.write_atomically(path, "three")
    assert [(path.name, path.read_text()) for path in path.parent.iterdir()] == [("file", "two")]


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3, 4):
        writer.write(step, {"loss": step / 2})
    writer.close()
    file = tmp_path / workdirs.METRICS_FILE
    # The last line of a killed run may be cut short.
    file.write_text(file.read_text()[:-5])
    writer = MetricsWriter(tmp_path, 2)
    writer.write(3, {"loss": 9.0})
    writer.close()
    assert workdirs.read_metrics(file) == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0},
    ]  # fmt: skip
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) >= 1


def events_of(path):
    """The events of a file of TFRecords, without their checksums."""
    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_tensorboard_is_told_as_it_goes_and_by_no_thread(tmp_path):
    threads = threading.active_count()
    with contextlib.closing(MetricsWriter(tmp_path, 4)) as writer:
        writer.write(5, {"loss": 0.5, "unknown_ids/item": 3.0})
        (path,) = tmp_path.glob("events.out.tfevents.*")
        first, session, *told = events_of(path)
        assert threading.active_count() == threads
    assert first.file_version == "brain.Event:2"
    # It hides what a killed run wrote from here on.
    assert (session.step, session.session_log.status) == (5, SessionLog.START)
    values = [of.summary.value[0] for of in told]
    assert [of.step for of in told] == [5, 5]
    assert [(of.tag, of.simple_value) for of in values] == [("loss", 0.5), ("unknown_ids/item", 3)]


def test_what_does_not_matter_to_a_run_may_change(tmp_path):
    claim(tmp_path, "train", config_with(trainer=1), DATASET)
    claim(
        tmp_path, "train", config_with(train={"steps": 4}, trainer=1), DATASET, without=("train",)
    )
    # A section is left out whole, and not what merely begins with its name.
    with pytest.raises(UserError, match=r"trainer \(1 there, 2 now\)"):
        claim(tmp_path, "train", config_with(trainer=2), DATASET, without=("train",))


def test_a_workdir_of_another_dataset_is_refused(tmp_path):
    claim(tmp_path, "train", config_with(), DATASET)
    other = {"dataset": "small/ba9876543210"}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert fault_of(claim, tmp_path, "train", config_with(), other) == (
        f"{tmp_path} holds a run on the dataset small/0123456789ab, and data.dir holds "
        "small/ba9876543210, which has other content; name the data.dir of the first one, or "
        "use another --workdir"
    )
    claim(tmp_path, "train", config_with(), DATASET)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (workdirs.CONFIG_FILE, r"config.json is damaged: .*; restore it, or use another"),
        (workdirs.ENVIRONMENT_FILE, r"environment.json is .*; remove it: it only records"),
    ],
)
@pytest.mark.parametrize("damaged", ['{"seed', "\x00", "[]"])
def test_a_damaged_file_is_named_with_a_remedy_and_stays(tmp_path, file, message, damaged):
    claim(tmp_path, "train", config_with(), DATASET)
    (tmp_path / file).write_text(damaged)
    with pytest.raises(UserError, match=message):
        claim(tmp_path, "train", config_with(), DATASET)
    assert (tmp_path / file).read_text() == damaged
