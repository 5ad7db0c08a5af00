import dataclasses
import os

import numpy as np
import pytest
from ml_collections import ConfigDict

from kd_ranker.data import builder
from kd_ranker.errors import UserError
from tests.data.requests import random_source

FUNNEL = ConfigDict({"retrieved": 20, "passed": 9, "shown": 4, "report_at": (5,)})


def test_a_missing_dataset_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="make it with: some command"):
        builder.open_dataset("absent", str(tmp_path), made_by="some command")


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
        builder.build(dataclasses.replace(source, requests=requests), "bad", str(tmp_path))
    assert not builder.directory_of("bad", str(tmp_path)).exists()


def test_building_again_leaves_the_dataset_alone(tmp_path):
    directory = builder.build(random_source(), "small", str(tmp_path))
    before = {path: os.stat(path).st_mtime_ns for path in directory.iterdir()}
    builder.build(random_source(train=3), "small", str(tmp_path))
    assert before == {path: os.stat(path).st_mtime_ns for path in directory.iterdir()}


def test_the_name_follows_what_is_in_the_dataset_and_not_where_it_lies():
    data = ConfigDict({"name": "cascade", "dir": "here", "seed": 0})
    name = builder.dataset_name(data, ("watch",), FUNNEL)
    elsewhere = data.copy_and_resolve_references()
    elsewhere.dir = "there"
    assert builder.dataset_name(elsewhere, ("watch",), FUNNEL) == name
    reported = FUNNEL.copy_and_resolve_references()
    reported.report_at = (5, 7)
    assert builder.dataset_name(data, ("watch",), reported) == name
    other = data.copy_and_resolve_references()
    other.seed = 1
    assert builder.dataset_name(other, ("watch",), FUNNEL) != name
    assert builder.dataset_name(data, ("watch", "like"), FUNNEL) != name
    assert builder.dataset_name(data, ("watch",), FUNNEL, "abc") == f"{name}-teacher-abc"
