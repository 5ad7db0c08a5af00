"""A finished folder that is not what was written, or not what is asked for, does not pass."""

import json
import shutil

import pytest

from kd_ranker import manifest
from kd_ranker.requests import storage
from tests.faults import fault_of
from tests.requests.random_requests import built, random_source

REMEDY = "make it again with: some command"
MADE_OF = {"config": "0123", "dataset": "abc"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rejected").mkdir()
    for name in ("a.json", "b.bin", "rejected/rows"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    manifest.write(tmp_path, MADE_OF)
    return tmp_path


def fault_in(folder, *arguments, **options):
    message = fault_of(manifest.check, folder, REMEDY, *arguments, **options)
    assert str(folder) in message
    assert message.endswith(f"; {REMEDY}")
    return message


def test_every_change_of_a_file_is_found_and_named(folder):
    assert manifest.check(folder, REMEDY, MADE_OF, thorough=True) == MADE_OF
    for name in ("a.json", "b.bin", "rejected/rows"):
        path = folder / name
        content = path.read_bytes()
        flipped = bytes([content[0] ^ 1]) + content[1:]
        for other in (flipped, content[:-1], content + b"\0", b""):
            path.write_bytes(other)
            assert f"{name} has changed" in fault_in(folder)
            assert not manifest.has_provenance(folder, MADE_OF)
        path.write_bytes(content)
        assert manifest.has_provenance(folder, MADE_OF)


def test_every_file_must_be_there(folder):
    (folder / "b.bin").unlink()
    assert "b.bin is missing" in fault_in(folder)
    (folder / manifest.FILE).unlink()
    assert "is not finished" in fault_in(folder)


def test_only_a_thorough_check_reads_a_large_file(folder, monkeypatch):
    monkeypatch.setattr(manifest, "_SMALL", 100)
    content = (folder / "b.bin").read_bytes()
    (folder / "b.bin").write_bytes(content[::-1])
    manifest.check(folder, REMEDY)
    assert "b.bin has changed" in fault_in(folder, thorough=True)


def test_another_dependency_is_named(folder):
    fault = fault_in(folder, MADE_OF | {"dataset": "xyz", "teacher": "t"})
    assert "other contents: dataset (abc there, xyz now), teacher (None there, t now);" in fault
    assert not manifest.has_provenance(folder, {"config": "0123"})


@pytest.mark.parametrize("content", ["", "[]", '{"provenance": 1, "files": {}}'])
def test_a_damaged_manifest_is_one_line(folder, content):
    (folder / manifest.FILE).write_text(content)
    assert manifest.FILE in fault_in(folder)


@pytest.mark.parametrize("entry", [5, [1], [1, 2], ["1", "abc"], None, {"size": 1}])
def test_an_odd_entry_of_a_manifest_is_one_line(folder, entry):
    content = {"provenance": MADE_OF, "files": {"a.json": entry}}
    (folder / manifest.FILE).write_text(json.dumps(content))
    assert f"{manifest.FILE} is damaged" in fault_in(folder)


@pytest.mark.parametrize("outside", ["../secret", "rejected/../../secret", "{above}/secret"])
def test_a_manifest_names_only_files_in_its_folder(tmp_path, outside):
    """Else who opens a folder of a stranger would read any file for him."""
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("mine")
    name = outside.format(above=tmp_path)
    content = {"provenance": MADE_OF, "files": {name: [4, "0" * 64]}}
    (folder / manifest.FILE).write_text(json.dumps(content))
    assert f"{name!r} is not in the folder" in fault_in(folder)


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path):
    (tmp_path / "results.csv").mkdir()
    fault = fault_of(manifest.write_whole, tmp_path / "results.csv", "text")
    assert fault.startswith(f"{tmp_path / 'results.csv'} is a folder in the place of a file; ")
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    (tmp_path / manifest.FILE).mkdir()
    assert manifest.FILE in fault_of(manifest.remove, tmp_path)


def test_a_digest_is_of_the_content_of_the_named_files(folder, tmp_path_factory):
    def digest(directory):
        return manifest.digest_of_files(directory, ["b.bin", "a.json"], REMEDY)

    before = digest(folder)
    moved = shutil.copytree(folder, tmp_path_factory.mktemp("other") / "copy")
    for name, changes in (("rejected/rows", False), ("b.bin", True)):
        (moved / name).write_bytes(b"other")
        manifest.write(moved, {})
        assert (digest(moved) != before) == changes
    fault = fault_of(manifest.digest_of_files, moved, ["c.bin"], REMEDY)
    assert fault.endswith(f"does not list c.bin; {REMEDY}")


def test_each_file_of_a_dataset_counts_and_so_does_its_name(tmp_path):
    directory = built(tmp_path, random_source()).directory

    def fault_of_dataset(name):
        message = fault_of(storage.open_dataset, name, str(tmp_path), "some command")
        assert message.endswith(REMEDY)
        return message

    files = json.loads((directory / manifest.FILE).read_text())["files"]
    assert files.keys() == {path.name for path in directory.iterdir()} - {manifest.FILE}
    other = storage.directory_of("other", str(tmp_path))
    other.parent.mkdir()
    other.symlink_to(directory)
    assert "dataset (small there, other now)" in fault_of_dataset("other")
    with (directory / "rows-train.bin").open("r+b") as rows:
        rows.write(b"x")
    assert "rows-train.bin has changed" in fault_of_dataset("small")
