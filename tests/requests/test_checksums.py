"""What becomes of a file of a dataset after it was written does not pass for what was written."""

import dataclasses
import os
import shutil

import pytest

from kd_ranker.errors import UserError
from kd_ranker.requests import checksums, storage
from kd_ranker.requests.records import read_requests
from tests.requests.random_requests import random_source

MADE_BY = "some command"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    def write_beside(folder):
        (folder / "rejected").mkdir()
        (folder / "rejected" / "rows.parquet").write_bytes(b"rows")

    source = dataclasses.replace(random_source(), write_beside=write_beside)
    return storage.build(source, "small", str(tmp_path_factory.mktemp("data")))


@pytest.fixture
def folder(built, tmp_path):
    """A copy of the dataset, with the times of the files."""
    return shutil.copytree(built, storage.directory_of("small", str(tmp_path)))


def opened(folder):
    return storage.open_dataset("small", str(folder.parents[2]), MADE_BY)


def fault_of(folder, command=opened):
    with pytest.raises(UserError) as caught:
        command(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"the dataset at {folder} is damaged (")
    assert message.endswith(f"remove that folder and make it anew with: {MADE_BY}")
    return message


def flip(path, keep_time=False, place=None):
    """Changes a bit in the middle of a file."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_dataset_is_opened_and_read(folder):
    assert len([*read_requests(opened(folder), "train")]) == 12
    storage.check_whole(folder, MADE_BY, thorough=True)


def test_each_file_is_missed_and_each_bit_of_it_counts(folder):
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    assert len(files) == 15
    for path in files:
        content = path.read_bytes()
        flip(path, keep_time=path.suffix in (".json", ".npy"))
        assert path.name == checksums.FILE or path.name in fault_of(folder)
        fault_of(folder)
        for other in (content[:-1], content + b"\0", b""):
            path.write_bytes(other)
            fault_of(folder)
        path.unlink()
        assert path.name in fault_of(folder)
        path.write_bytes(content)
    opened(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"needed": 3}', '{"needed": {"items.npy": [1]}}'])
def test_checksums_that_say_something_else_are_damage(folder, content):
    (folder / checksums.FILE).write_text(content)
    fault_of(folder)


def test_what_lies_beside_the_requests_may_be_removed_but_not_changed(folder):
    beside = folder / "rejected" / "rows.parquet"
    flip(beside)
    opened(folder)
    assert "rejected/rows.parquet" in fault_of(folder, lambda of: storage.check_whole(of, MADE_BY))
    shutil.rmtree(beside.parent)
    storage.check_whole(folder, MADE_BY, thorough=True)


@pytest.mark.parametrize("name", ["rows-train.bin", "requests-test.array_record-00000-of-00001"])
def test_a_large_file_is_read_once_when_it_has_changed(folder, name, monkeypatch):
    monkeypatch.setattr(checksums, "_SMALL", -1)  # for all files to be large
    read, crc = [], checksums._crc
    monkeypatch.setattr(checksums, "_crc", lambda path: read.append(path.name) or crc(path))
    opened(folder)
    assert not read
    os.utime(folder / name)  # as a copy does
    opened(folder)
    opened(folder)
    assert read == [name]
    flip(folder / name)
    assert name in fault_of(folder)
    assert name in fault_of(folder)


def test_a_thorough_check_finds_what_left_no_trace(folder):
    flip(folder / "rows-train.bin", keep_time=True)
    opened(folder)
    fault = fault_of(folder, lambda of: storage.check_whole(of, MADE_BY, thorough=True))
    assert "rows-train.bin" in fault


def test_a_record_that_is_damaged_inside_is_one_line_that_names_its_file(folder):
    (path,) = folder.glob("requests-train.array_record*")
    for place in (70, 200, 500, 1000):  # headers and contents; a file ends with much that is empty
        flip(path, keep_time=True, place=place)
        fault = fault_of(folder, lambda of: [*read_requests(opened(of), "train")])
        assert path.name in fault
        flip(path, keep_time=True, place=place)
