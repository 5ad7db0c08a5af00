"""Categorical features from requests to results, which alone predict what a user likes."""

import json

import numpy as np
import pytest

import kd_ranker as kd
from kd_ranker import api
from kd_ranker.config import defaults
from kd_ranker.requests.request import SPLITS
from tests import small

GROUPS, ITEMS, CANDIDATES = 3, 60, 12
NUM_REQUESTS = {"train": 128, "validation": 16, "test": 32}
SPEC = kd.FeatureSpec(
    dataset="stacks",
    tasks=("watch",),
    num_users=1,
    num_items=ITEMS,
    user_features=1,
    context_features=1,
    candidate_features=1,
    item_features=1,
    cheap_item_features=1,
    history_length=2,
    history_features=1,
    teacher_version="",
    categories=(
        kd.Category("colors", of="candidate", size=4, length=2),
        kd.Category("stack", of="request", size=GROUPS),
        kd.Category("kind", of="item", size=GROUPS),
    ),
)
_, FIRST_GROUP, FIRST_KIND = SPEC.category_starts


def draw_request(split, index):
    """A user of a stack likes the items of the same kind; those of training occur nowhere else.

    Colours, a bag per candidate, are noise.
    """
    generator = np.random.default_rng((SPLITS.index(split), index))
    items = generator.permutation(ITEMS // 2)[:CANDIDATES] + (split != "train") * ITEMS // 2
    stack = generator.integers(GROUPS)
    return dict(
        user_id=0,
        history_id=items[:1],
        item_id=items,
        user_label=(items % GROUPS == stack)[:, None],
        request_category=[FIRST_GROUP + stack],
        candidate_category=generator.integers(-1, 4, (CANDIDATES, 2)),
    )


@pytest.fixture
def config(tmp_path):
    config = defaults.get_config("given")
    config.funnel.update({"retrieved": CANDIDATES, "passed": 6, "shown": 2, "report_at": (6,)})
    config.student.update({"width": 8, "hidden": (8,)})
    config.teacher.workdir = str(tmp_path / "teacher")
    config.teacher.update({"width": 8, "attention_hidden": 4, "experts": 2, "expert_hidden": 8})
    config.teacher.cross_layers = 1
    config.parallel.devices = 1
    for section in (config, config.teacher):
        section.batch.update({"requests": 16, "candidates": CANDIDATES})
        section.optimizer.update({"learning_rate": 0.02, "table_learning_rate": 0.1})
        section.train.update({"steps": 80, "eval_every": 0})
    requests = {
        split: [draw_request(split, index) for index in range(number)]
        for split, number in NUM_REQUESTS.items()
    }
    kinds = np.arange(ITEMS)[:, None] % GROUPS + FIRST_KIND
    return kd.Dataset.from_requests(requests, SPEC, None, kinds, config, tmp_path).config


@pytest.mark.slow
def test_categories_predict_the_labels_of_new_items(config, tmp_path):
    api.prepare(config)
    (of_teacher,) = small.rows_on_test(api.train_teacher(config, tmp_path / "teacher"), "teacher")
    (of_student,) = small.rows_on_test(api.train(config, tmp_path / "student"))
    for row in (of_teacher, of_student):
        assert row["unseen_items"] == 1
        assert row["user_auc/watch"] > 0.95
    last = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["unknown_ids/category"] == 0
