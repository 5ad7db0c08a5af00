import dataclasses
import functools
import itertools
import os
import re
import signal

import numpy as np
import pytest

from kd_ranker.batch import Category
from kd_ranker.errors import UserError
from kd_ranker.requests import lock, storage
from kd_ranker.requests.request import SPLITS, block_of
from tests import small
from tests.requests.random_requests import random_source


def changed(source, change, **spec):
    """A source of changed requests."""

    def requests(split):
        return map(change, source.requests(split))

    spec = dataclasses.replace(source.spec, **spec)
    return dataclasses.replace(source, spec=spec, requests=requests)


def fault_of(source, folder):
    """The error of a build, which leaves nothing."""
    with pytest.raises(UserError) as caught:
        storage.build(lambda: source, "bad", str(folder))
    assert not storage.directory_of("bad", str(folder)).exists()
    return str(caught.value)


def test_a_missing_dataset_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="make it with: some command"):
        storage.open_dataset("absent", str(tmp_path), made_by="some command")


@pytest.mark.parametrize("split", SPLITS)
def test_a_source_that_lacks_a_split_is_refused_before_anything_is_written(tmp_path, split):
    source = random_source()
    for number in ({}, {split: 0}):
        others = {name: n for name, n in source.num_requests.items() if name != split}
        lacking = dataclasses.replace(source, num_requests=others | number)
        fault = fault_of(lacking, tmp_path)
        assert f"test yields no requests for its split '{split}'" in fault


BAD_FIELDS = {
    "user_id": 99,
    "item_id": np.full(20, 99, np.int32),
    "history_id": np.array([99], np.int32),
    "request_category": np.array([4], np.int32),
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_an_id_out_of_range_stops_the_build_and_leaves_nothing(tmp_path, field):
    def change(request):
        fields = {"request_category": np.array([-1], np.int32)} | {field: BAD_FIELDS[field]}
        if field == "history_id":
            fields["history_features"] = np.zeros((1, 3), np.float32)
        return dataclasses.replace(request, **fields)

    categories = (Category("country", "request", size=4),)
    fault = fault_of(changed(random_source(), change, categories=categories), tmp_path)
    least = -1 if field == "request_category" else 0
    assert f"{field} must lie in [{least}, " in fault


@pytest.mark.parametrize("field", ["context", "candidate_features", "item_features"])
def test_features_without_a_column_are_refused_before_anything_is_written(tmp_path, field):
    width = "context_features" if field == "context" else field
    fault = fault_of(changed(random_source(), lambda request: request, **{width: 0}), tmp_path)
    assert f"test: {field} has no columns; give at least one column" in fault


def test_building_again_leaves_the_dataset_alone(tmp_path):
    directory = storage.build(random_source, "small", str(tmp_path))
    before = {path: os.stat(path).st_mtime_ns for path in directory.iterdir()}
    storage.build(lambda: random_source(train=3), "small", str(tmp_path))
    assert before == {path: os.stat(path).st_mtime_ns for path in directory.iterdir()}


def test_the_identity_of_a_dataset_follows_its_content(tmp_path):
    def identity(folder, source):
        storage.build(lambda: source, "small", str(tmp_path / folder))
        return storage.open_dataset("small", str(tmp_path / folder), "some command").identity

    def other_label(request):
        label = request.user_label ^ (request.request_id == 0)
        return dataclasses.replace(request, user_label=label)

    whole = identity("whole", random_source())
    assert re.fullmatch(r"small/[0-9a-f]{12}", whole["dataset"])
    assert identity("again", random_source()) == whole
    others = [
        random_source(train=13),
        changed(random_source(), other_label),
        dataclasses.replace(random_source(), item_features=random_source().item_features + 1),
    ]
    found = [identity(str(number), source)["dataset"] for number, source in enumerate(others)]
    assert len({whole["dataset"], *found}) == 4


def in_shards(size, threads):
    """`random_source` in shards of `size` requests, and a list of those that are read."""
    source, read = random_source(), []

    def shard(split, start):
        read.append((split, start))
        requests = itertools.islice(source.requests(split), start, start + size)
        return block_of(list(requests), source.spec)

    def shards(split):
        starts = range(0, source.num_requests[split], size)
        return [functools.partial(shard, split, start) for start in starts]

    return dataclasses.replace(source, shards=shards, threads=threads), read


def bytes_of(directory):
    """The bytes of each file."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("size", "threads"), [(1, 1), (1, 3), (4, 2), (100, 1)])
def test_shards_make_the_files_of_one_pass(tmp_path, size, threads):
    whole = bytes_of(storage.build(random_source, "small", str(tmp_path / "whole")))
    source, read = in_shards(size, threads)
    assert bytes_of(storage.build(lambda: source, "small", str(tmp_path))) == whole
    assert len(read) == sum(-(-number // size) for number in source.num_requests.values())


def test_two_builds_at_once_are_refused_and_one_after_the_other_are_not(tmp_path):
    source, read = in_shards(4, 1)
    with lock.hold(storage.directory_of("small", str(tmp_path)).parent):
        with pytest.raises(UserError, match=r"small is held by process .*; wait for its end"):
            storage.build(lambda: source, "small", str(tmp_path))
        assert not read
        # Another dataset is none of its business.
        storage.build(random_source, "other", str(tmp_path))
    storage.build(lambda: source, "small", str(tmp_path))
    assert len(read) == 6


# Builds a dataset in a process of its own, which dies before the index is written if `dies`.
_BUILDING = """
import os, signal, sys
from kd_ranker.requests import storage
from tests.requests.random_requests import random_source

if sys.argv[2] == "dies":
    storage.write_index = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
storage.build(random_source, "small", sys.argv[1])
assert "tensorflow" not in sys.modules
"""


def test_a_dataset_is_the_same_bytes_at_every_build(tmp_path):
    assert small.run("-c", _BUILDING, str(tmp_path / "there"), "").returncode == 0
    there = bytes_of(storage.directory_of("small", str(tmp_path / "there")))
    assert bytes_of(storage.build(random_source, "small", str(tmp_path / "here"))) == there
    # Sizes, items, manifest and what describes the index; rows, counts and index of each split.
    assert len(there) == 6 + 3 * 3


def test_the_next_build_removes_what_a_killed_one_has_left(tmp_path):
    assert small.run("-c", _BUILDING, str(tmp_path), "dies").returncode == -signal.SIGKILL
    parent = storage.directory_of("small", str(tmp_path)).parent
    left = sorted(path.name for path in parent.iterdir())
    assert left == [".lock", ".lock-holder", f".unfinished-{storage.FORMAT_VERSION}"]
    assert (parent / left[2] / "rows-train.bin").exists()
    directory = storage.build(random_source, "small", str(tmp_path))
    assert [path.name for path in parent.iterdir()] == [directory.name]
    storage.open_dataset("small", str(tmp_path), "some command")


def full(directory):
    raise OSError("no space left")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"write_beside": full}, OSError, "no space left"),
        ({"num_requests": {"train": 13, "validation": 3, "test": 5}}, RuntimeError,
         "13 requests in split 'train', 12 written"),
    ],
)  # fmt: skip
def test_a_build_that_fails_leaves_nothing(tmp_path, change, error, message):
    source = dataclasses.replace(random_source(), **change)
    with pytest.raises(error, match=message):
        storage.build(lambda: source, "small", str(tmp_path))
    assert not [*tmp_path.iterdir()]
