import dataclasses
import functools
import itertools
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from kd_ranker import manifest
from kd_ranker.batch import Category
from kd_ranker.errors import UserError
from kd_ranker.requests import lock, storage
from kd_ranker.requests.request import block_of
from kd_ranker.requests.source import RequestSource
from kd_ranker.sources.logs.database import Database
from tests import small
from tests.faults import fault_of
from tests.requests.random_requests import built, random_source


def changed(change=lambda request: request, source=None, **spec):
    """`random_source` with changed requests, and other sizes."""
    source = source or random_source()

    def requests(split):
        return map(change, source.requests(split))

    spec = dataclasses.replace(source.spec, **spec)
    return dataclasses.replace(source, spec=spec, requests=requests)


def with_fields(**fields):
    """`random_source` with a category of requests, and these fields in each."""
    fields = {"request_category": np.array([-1], np.int32)} | fields
    categories = (Category("country", "request", size=4),)
    return changed(lambda request: dataclasses.replace(request, **fields), categories=categories)


def without(split):
    source = random_source()
    return dataclasses.replace(source, num_requests=source.num_requests | {split: 0})


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (without("validation"), "test has no requests for its split 'validation'; give"),
        (changed(context_features=0), "test: context_features has no columns; give at least one"),
        (with_fields(user_id=99), "request 0: user_id must lie in [0, 30), found 99 to 99"),
        (
            changed(
                lambda request: dataclasses.replace(
                    request, item_id=request.item_id + 50 * (request.request_id == 7)
                )
            ),
            "request 7: item_id must lie in [0, 50)",
        ),
        (
            with_fields(
                history_id=np.array([99], np.int32), history_features=np.zeros((1, 3), np.float32)
            ),
            "history_id must lie in [0, 50)",
        ),
        (with_fields(request_category=np.array([4], np.int32)), "_category must lie in [-1, 4)"),
    ],
)
def test_a_source_at_fault_is_one_line_and_leaves_nothing(tmp_path, source, fault):
    assert fault in fault_of(storage.build, lambda: source, "bad", str(tmp_path))
    assert not [*tmp_path.iterdir()]


class Full(RequestSource):
    """A source whose additional files do not fit on the disk."""

    def write_side_files(self, directory):
        raise OSError("no space left")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (Full(**vars(random_source())), OSError, "no space left"),
        (
            dataclasses.replace(
                random_source(), num_requests={"train": 13, "validation": 3, "test": 5}
            ),
            RuntimeError,
            "13 requests in split 'train', 12 written",
        ),
    ],
)
def test_a_build_that_fails_leaves_nothing(tmp_path, source, error, message):
    with pytest.raises(error, match=message):
        storage.build(lambda: source, "small", str(tmp_path))
    assert not [*tmp_path.iterdir()]


def test_a_missing_dataset_names_the_command_that_makes_it(tmp_path):
    fault = fault_of(storage.open_dataset, "absent", str(tmp_path), "some command")
    assert fault.endswith("make it with: some command")


@pytest.mark.parametrize("name", ["items.npy", "item_category.npy", "counts-train.npy"])
def test_a_pickle_in_place_of_an_array_is_one_line(tmp_path, name):
    directory = storage.build(random_source, "small", str(tmp_path))
    np.save(directory / name, np.array([{}], object))
    manifest.write(directory, {"dataset": "small"})
    fault = fault_of(storage.open_dataset, "small", str(tmp_path), "some command")
    assert fault.startswith(f"{directory / name} is damaged: it is no array of numbers; remove")


def test_building_again_leaves_the_dataset_alone(tmp_path):
    directory = storage.build(random_source, "small", str(tmp_path))
    before = {path: os.stat(path).st_mtime_ns for path in directory.iterdir()}
    storage.build(lambda: random_source(train=3), "small", str(tmp_path))
    assert before == {path: os.stat(path).st_mtime_ns for path in directory.iterdir()}


def test_the_identity_of_a_dataset_follows_its_content(tmp_path):
    def other_label(request):
        label = request.user_label ^ (request.request_id == 0)
        return dataclasses.replace(request, user_label=label)

    sources = [
        random_source(),
        random_source(),
        random_source(train=13),
        changed(other_label),
        dataclasses.replace(random_source(), item_features=random_source().item_features + 1),
    ]
    first, *others = (
        built(tmp_path / str(number), source).provenance["dataset"]
        for number, source in enumerate(sources)
    )
    assert re.fullmatch(r"small/[0-9a-f]{12}", first)
    assert len({first, *others}) == 4
    assert others[0] == first


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlocksInThreads(RequestSource):
    """A source in blocks of `size` requests, which lists those that are read."""

    size: int
    threads: int
    read: list

    def _block(self, split, start):
        self.read.append((split, start))
        requests = itertools.islice(self.requests(split), start, start + self.size)
        return block_of(list(requests), self.spec)

    def blocks(self, split):
        starts = range(0, self.num_requests[split], self.size)
        return [functools.partial(self._block, split, start) for start in starts]

    def pack_blocks(self, pack, blocks):
        return Database(None, Path(), self.threads).map(pack, blocks)


def in_blocks(size, threads):
    """`random_source` in blocks of `size` requests, and a list of those that are read."""
    fields = vars(random_source())
    source = BlocksInThreads(**fields, size=size, threads=threads, read=[])
    return source, source.read


def bytes_of(directory):
    """The bytes of each file."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("size", "threads"), [(1, 3), (4, 2), (100, 1)])
def test_blocks_make_the_files_of_one_pass(tmp_path, size, threads):
    whole = bytes_of(storage.build(random_source, "small", str(tmp_path / "whole")))
    source, read = in_blocks(size, threads)
    assert bytes_of(storage.build(lambda: source, "small", str(tmp_path))) == whole
    assert len(read) == sum(-(-number // size) for number in source.num_requests.values())


def test_two_builds_at_once_are_refused(tmp_path):
    source, read = in_blocks(4, 1)
    with lock.hold(storage.directory_of("small", str(tmp_path)).parent):
        with pytest.raises(UserError, match=r"small is held by process .*; wait for its end"):
            storage.build(lambda: source, "small", str(tmp_path))
        assert not read
        # Another dataset is none of its business.
        built(tmp_path, random_source(), "other")
    storage.build(lambda: source, "small", str(tmp_path))
    assert len(read) == 6


def test_a_dataset_finished_just_before_the_lock_is_kept(tmp_path, monkeypatch):
    def hold_after_another_build(folder):
        monkeypatch.setattr(storage, "hold", lock.hold)
        storage.build(random_source, "small", str(tmp_path))
        return lock.hold(folder)

    monkeypatch.setattr(storage, "hold", hold_after_another_build)
    source, read = in_blocks(4, 1)
    directory = storage.build(lambda: source, "small", str(tmp_path))
    assert directory.is_dir()
    assert not read


# Builds a dataset in a separate process, and dies in a second build before it writes the index.
_BUILDING = """
import os, signal, sys
from kd_ranker.requests import storage
from tests.requests.random_requests import random_source

storage.build(random_source, "whole", sys.argv[1])
assert "tensorflow" not in sys.modules
storage.write_index = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
storage.build(random_source, "small", sys.argv[1])
"""


def test_a_build_after_a_killed_one_makes_the_same_bytes(tmp_path):
    assert small.run("-c", _BUILDING, str(tmp_path)).returncode == -signal.SIGKILL
    whole, killed = (storage.directory_of(name, str(tmp_path)) for name in ("whole", "small"))
    left = sorted(path.name for path in killed.parent.iterdir())
    assert left == [".lock", ".lock-holder", f".unfinished-{storage.FORMAT_VERSION}"]
    assert (killed.parent / left[2] / "rows-train.bin").exists()
    built(tmp_path, random_source())
    assert [path.name for path in killed.parent.iterdir()] == [killed.name]
    there, here = map(bytes_of, (whole, killed))
    # The manifest has the name of the dataset.
    there["manifest.json"] = there["manifest.json"].replace(b'"whole"', b'"small"')
    assert here == there
    # Sizes, items, manifest and what describes the index; rows, counts and index of each split.
    assert len(there) == 6 + 3 * 3
