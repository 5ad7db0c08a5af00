import json

import pytest
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.workdir import MetricsWriter


def config_with(**changes):
    return ConfigDict({"seed": 0, "sizes": (1, 2), "train": {"steps": 3}} | changes)


def test_a_workdir_is_claimed_by_one_config(tmp_path):
    workdir = tmp_path / "a" / "b"
    workdirs.claim(workdir, "train", config_with())
    workdirs.claim(workdir, "train", config_with())
    assert workdirs.read_config(workdir).train.steps == 3
    with pytest.raises(UserError) as caught:
        workdirs.claim(workdir, "train", config_with(train={"steps": 4}, extra=1))
    assert "another --workdir" in str(caught.value)
    assert "train.steps (3 there, 4 now)" in str(caught.value)
    assert "extra (None there, 1 now)" in str(caught.value)
    assert "seed" not in str(caught.value)
    # As it was written, tuples and all: flags can only set what is one.
    assert workdirs.read_config(workdir) == config_with()


def test_a_file_is_replaced_whole_and_leaves_nothing_else(tmp_path):
    for text in ("one", "two"):
        workdirs.write_atomically(tmp_path / "folder" / "file", text)
    assert [(path.name, path.read_text()) for path in (tmp_path / "folder").iterdir()] == [
        ("file", "two")
    ]


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
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 9.0},
    ]  # fmt: skip
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) >= 1


def test_what_does_not_matter_to_a_run_may_change(tmp_path):
    workdirs.claim(tmp_path, "train", config_with(trainer=1))
    workdirs.claim(
        tmp_path, "train", config_with(train={"steps": 4}, trainer=1), without=("train",)
    )
    # A section is left out whole, and not what merely begins with its name.
    with pytest.raises(UserError, match=r"trainer \(1 there, 2 now\)"):
        workdirs.claim(tmp_path, "train", config_with(trainer=2), without=("train",))


def test_a_workdir_of_another_command_is_refused(tmp_path):
    workdirs.claim(tmp_path, "sweep", config_with())
    with pytest.raises(UserError, match="belongs to a run of sweep; use another --workdir"):
        workdirs.claim(tmp_path, "train", config_with())


@pytest.mark.parametrize("left", [workdirs.ENVIRONMENT_FILE, workdirs.METRICS_FILE])
def test_a_run_whose_config_was_removed_is_not_taken_for_one_of_another_config(tmp_path, left):
    workdirs.claim(tmp_path, "train", config_with())
    (tmp_path / workdirs.ENVIRONMENT_FILE).unlink()
    (tmp_path / left).touch()
    (tmp_path / workdirs.CONFIG_FILE).unlink()
    with pytest.raises(UserError, match=r"config.json, which says of what, is gone; put that back"):
        workdirs.claim(tmp_path, "train", config_with(seed=1))
    assert not (tmp_path / workdirs.CONFIG_FILE).exists()
