import dataclasses
import functools
import itertools
import os
import re
import signal

import numpy as np
import pytest
from ml_collections import ConfigDict

from kd_ranker.batch import Category
from kd_ranker.errors import UserError
from kd_ranker.requests import storage
from kd_ranker.requests.pool import open_pool
from kd_ranker.requests.request import SPLITS
from tests import small
from tests.requests.random_requests import random_source

FUNNEL = ConfigDict({"retrieved": 20, "passed": 9, "shown": 4, "report_at": (5,)})


def test_a_missing_dataset_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="make it with: some command"):
        storage.open_dataset("absent", str(tmp_path), made_by="some command")


@pytest.mark.parametrize("split", SPLITS)
def test_a_source_that_lacks_a_split_is_refused_before_anything_is_written(tmp_path, split):
    source = random_source()
    for number in ({}, {split: 0}):
        others = {name: n for name, n in source.num_requests.items() if name != split}
        lacking = dataclasses.replace(source, num_requests=others | number)
        with pytest.raises(UserError, match=f"test yields no requests for its split '{split}'"):
            storage.build(lacking, "bad", str(tmp_path))
    assert not storage.directory_of("bad", str(tmp_path)).exists()


@pytest.mark.parametrize("field", ["user_id", "item_id", "history_id"])
def test_an_id_out_of_range_stops_the_build_and_leaves_nothing(tmp_path, field):
    source = random_source()

    def requests(split):
        for request in source.requests(split):
            value = getattr(request, field)
            bad = 99 if field == "user_id" else np.append(value, np.int32(99))[-len(value) :]
            if field == "history_id":
                bad = np.array([99], np.int32)
                request = dataclasses.replace(
                    request, history_features=np.zeros((1, 3), np.float32)
                )
            yield dataclasses.replace(request, **{field: bad})

    with pytest.raises(UserError, match=rf"{field} must lie in \[0, "):
        storage.build(dataclasses.replace(source, requests=requests), "bad", str(tmp_path))
    assert not storage.directory_of("bad", str(tmp_path)).exists()


@pytest.mark.parametrize("field", ["context", "candidate_features", "item_features"])
def test_features_without_a_column_are_refused_before_anything_is_written(tmp_path, field):
    width = "context_features" if field == "context" else field
    source = random_source()
    source = dataclasses.replace(source, spec=dataclasses.replace(source.spec, **{width: 0}))
    with pytest.raises(UserError, match=f"test: {field} has no columns; give at least one column"):
        storage.build(source, "bad", str(tmp_path))
    assert not storage.directory_of("bad", str(tmp_path)).exists()


@pytest.mark.parametrize("ids", [[-2], [4]])
def test_a_category_is_one_of_those_that_there_are_or_none(tmp_path, ids):
    source = random_source()
    spec = dataclasses.replace(source.spec, categories=(Category("country", "request", size=4),))

    def build(name, ids):
        def requests(split):
            for request in source.requests(split):
                yield dataclasses.replace(request, request_category=np.array(ids, np.int32))

        storage.build(
            dataclasses.replace(source, spec=spec, requests=requests), name, str(tmp_path)
        )

    build("small", [-1])
    with pytest.raises(UserError, match=r"request_category must lie in \[-1, 4\)"):
        build("bad", ids)


def test_building_again_leaves_the_dataset_alone(tmp_path):
    directory = storage.build(random_source(), "small", str(tmp_path))
    before = {path: os.stat(path).st_mtime_ns for path in directory.iterdir()}
    storage.build(random_source(train=3), "small", str(tmp_path))
    assert before == {path: os.stat(path).st_mtime_ns for path in directory.iterdir()}


def with_one_label_changed(source):
    def requests(split):
        for request in source.requests(split):
            if split == "train" and request.request_id == 0:
                label = request.user_label.copy()
                label[0, 0] = 1 - label[0, 0]
                request = dataclasses.replace(request, user_label=label)
            yield request

    return dataclasses.replace(source, requests=requests)


def test_the_identity_of_a_dataset_follows_its_content(tmp_path):
    def identity(folder, source):
        storage.build(source, "small", str(tmp_path / folder))
        return storage.open_dataset("small", str(tmp_path / folder), "some command").identity

    whole = identity("whole", random_source())
    assert re.fullmatch(r"small/[0-9a-f]{12}", whole["dataset"])
    assert identity("again", random_source()) == whole
    items = random_source().item_features + 1
    others = [
        random_source(train=13),
        with_one_label_changed(random_source()),
        dataclasses.replace(random_source(), item_features=items),
    ]
    found = [identity(str(number), source)["dataset"] for number, source in enumerate(others)]
    assert len({whole["dataset"], *found}) == 4


def source_of_shards(size=4):
    """`random_source` in shards of `size` requests, with a list of those that are read."""
    source, read = random_source(), []

    def shard(split, start, stop):
        read.append((split, start))
        yield from itertools.islice(source.requests(split), start, stop)

    def shards(split):
        number = source.num_requests[split]
        return [
            functools.partial(shard, split, start, min(start + size, number))
            for start in range(0, number, size)
        ]

    return dataclasses.replace(source, shards=shards), read


@pytest.mark.parametrize("size", [1, 4, 100])
def test_shards_make_the_files_of_one_pass(tmp_path, size):
    whole = bytes_of(storage.build(random_source(), "small", str(tmp_path / "whole")))
    directory = storage.build(source_of_shards(size)[0], "small", str(tmp_path))
    assert bytes_of(directory) == whole


def test_two_builds_at_once_are_refused_and_one_after_the_other_are_not(tmp_path):
    source, read = source_of_shards()
    with storage.building("small", str(tmp_path)):
        with pytest.raises(UserError, match=r"small is held by process .*; wait for its end"):
            storage.build(source, "small", str(tmp_path))
        assert not read
        # Another dataset is none of its business.
        storage.build(random_source(), "other", str(tmp_path))
    storage.build(source, "small", str(tmp_path))
    assert len(read) == 6


def bytes_of(directory):
    """The bytes of each file."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Builds a dataset in a process of its own, or in shards that so many others write; dies when it has
# written the first file, if it is told so.
_BUILDING = """
import os, signal, sys
from kd_ranker.requests import storage
from tests.requests.test_storage import build_in_shards
from tests import small
from tests.requests.random_requests import random_source

if __name__ == "__main__":
    folder, threads, dies = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "dies"
    write = storage.write_shard
    def dying(*arguments):
        write(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
    if dies:
        storage.write_shard = dying
    if threads:
        build_in_shards(folder, threads)
    else:
        storage.build(random_source(), "small", folder)
    assert "tensorflow" not in sys.modules
"""


def part_of(split, start, stop):
    yield from itertools.islice(random_source().requests(split), start, stop)


def build_in_shards(folder, threads):
    """Builds `random_source` in shards that threads write."""
    shards = {
        "train": [functools.partial(part_of, "train", start, start + 4) for start in (0, 4, 8)],
        "validation": [functools.partial(part_of, "validation", 0, 3)],
        "test": [functools.partial(part_of, "test", 0, 5)],
    }
    with open_pool(threads) as run:
        source = dataclasses.replace(random_source(), shards=shards.__getitem__, run=run)
        return storage.build(source, "small", str(folder))


def build_elsewhere(folder, threads=0, dies=False):
    return small.run("-c", _BUILDING, str(folder), str(threads), "dies" if dies else "").returncode


@pytest.mark.parametrize("threads", [0, 2])
def test_a_dataset_is_the_same_bytes_at_every_build(tmp_path, threads):
    assert build_elsewhere(tmp_path / "there", threads) == 0
    there = bytes_of(storage.directory_of("small", str(tmp_path / "there")))
    if threads:
        here = build_in_shards(tmp_path / "here", 1)
    else:
        here = storage.build(random_source(), "small", str(tmp_path / "here"))
    assert bytes_of(here) == there
    # Sizes, items, manifest and what describes the index; rows, counts and index of each split.
    assert len(there) == 6 + 3 * 3


def test_the_next_build_removes_what_a_killed_one_has_left(tmp_path):
    assert build_elsewhere(tmp_path, dies=True) == -signal.SIGKILL
    parent = storage.directory_of("small", str(tmp_path)).parent
    left = sorted(path.name for path in parent.iterdir())
    assert left == [".lock", ".lock-holder", f".unfinished-{storage.FORMAT_VERSION}"]
    assert [*(parent / left[2]).glob("train-00000.rows")]
    directory = storage.build(random_source(), "small", str(tmp_path))
    assert [path.name for path in parent.iterdir()] == [directory.name]
    storage.open_dataset("small", str(tmp_path), "some command")


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def full(directory):
        raise OSError("no space left")

    source = dataclasses.replace(random_source(), write_beside=full)
    with pytest.raises(OSError, match="no space left"):
        storage.build(source, "small", str(tmp_path))
    assert not [*tmp_path.iterdir()]


def test_a_source_that_yields_other_numbers_than_it_says_is_refused(tmp_path):
    source = dataclasses.replace(
        random_source(), num_requests={"train": 13, "validation": 3, "test": 5}
    )
    with pytest.raises(RuntimeError, match="13 requests in split 'train', 12 written"):
        storage.build(source, "small", str(tmp_path))
    assert not [*tmp_path.iterdir()]
