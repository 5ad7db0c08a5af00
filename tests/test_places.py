"""How many files a change touches: it is made to a copy of the package, and used there."""

import os
import shutil
import subprocess
import sys

from tests.small import ROOT


def test_beside_the_rooms_lie_three_files_alone():
    files = {path.name for path in (ROOT / "kd_ranker").iterdir() if path.is_file()}
    assert files == {"__init__.py", "batch.py", "errors.py"}


def changed_copy(folder, changes):
    """A copy of the package and the configs with texts replaced: file -> (old, new) pairs."""
    for name in ("kd_ranker", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file, pairs in changes.items():
        text = (folder / file).read_text()
        for old, new in pairs:
            assert text.count(old) == 1, f"{file} does not hold this once: {old!r}"
            text = text.replace(old, new)
        (folder / file).write_text(text)
    return folder


def run_there(folder, program):
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert finished.returncode == 0, finished.stderr


A_LOSS_WITH_A_NUMBER = {
    "kd_ranker/distillation/losses.py": [
        ("    top_k: Number = 10.0\n", "    top_k: Number = 10.0\n    margin: Number = 1.0\n"),
        (
            "LOSSES: dict[str, Loss] = {\n",
            '''\
def margin(logits, probability, weight, numbers=DEFAULT_NUMBERS):
    """max(0, margin − (2p − 1) · z)."""
    known = jnp.where(weight > 0, probability, 0.5)
    return weighted_totals(jnp.maximum(numbers.margin - (2 * known - 1) * logits, 0.0), weight)


LOSSES: dict[str, Loss] = {
    "margin": margin,
''',
        ),
    ],
    "kd_ranker/config/keys.py": [
        (
            '        Key("affine", True,',
            '        Key("margin", 1.0, "loss margin: the least lead", POSITIVE),\n'
            '        Key("affine", True,',
        ),
    ],
}


def test_a_loss_with_a_swept_number_of_its_own_touches_two_files(tmp_path):
    assert len(A_LOSS_WITH_A_NUMBER) == 2
    folder = changed_copy(tmp_path, A_LOSS_WITH_A_NUMBER)
    run_there(
        folder,
        """
import jax
import numpy as np
from kd_ranker.configs import cascade
from kd_ranker.config import checks
from kd_ranker.config.page import keys_page
from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics import ReportAt
from kd_ranker.sweep.members import sweep_members
from kd_ranker.training import recipes
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.state import Frozen
from kd_ranker.training.step import make_step
from tests.random_batches import SPEC, random_batch, random_items

config = cascade("small")
config.parallel.devices = 1
config.distill.loss, config.sweep.modes = "margin", ("shared",)
config.sweep.axes.distill.margin = (0.5, 2.0)
checks.validate(config)
members = sweep_members(config)
assert list(members) == ["shared-weight1.0-margin0.5-seed0", "shared-weight1.0-margin2.0-seed0"]
(group,) = recipes.student_groups(members, SPEC)  # one program
assert group.numbers.loss.margin.tolist() == [0.5, 2.0]
mapping = MAPPINGS["shard_map"](jax.devices()[:1])
step = mapping.map_step(make_step([group.recipe]))
frozen = mapping.replicate(Frozen(random_items(), None))
_, losses = step(mapping.create(lambda deal: (group.init(),)), mapping.shard(random_batch(0)),
                 (group.numbers,), frozen)
one, other = np.asarray(losses[0]["distill_loss"]).ravel()
assert other > one > 0
assert "distill.margin" in results.columns((), ReportAt())
rows = [results.made_of(member)["distill.margin"] for member in members.values()]
assert rows == [0.5, 2.0]
assert "`distill.margin`" in keys_page()
""",
    )


AN_INPUT_FIELD = {
    "kd_ranker/batch.py": [
        (
            '    teacher_signal: str = "probability"\n',
            '    teacher_signal: str = "probability"\n    freshness: int = 0\n',
        ),
        (
            "# Batches are packed in this order.\n",
            "def _freshness(spec):\n    return spec.freshness\n\n\n",
        ),
        (
            '    Field("num_passed",',
            '    Field("freshness", "candidate", np.float32, np.float32, _freshness, nothing=7),\n'
            '    Field("num_passed",',
        ),
        (
            '    candidate_category: Int32[np.ndarray, "N L"] | None = None\n',
            '    candidate_category: Int32[np.ndarray, "N L"] | None = None\n'
            '    freshness: Float32[np.ndarray, "N Z"] | None = None\n',
        ),
        (
            '    teacher_weight: Float[Array, "R judged T"]',
            '    freshness: Float[Array, "R N Z"]\n    teacher_weight: Float[Array, "R judged T"]',
        ),
    ],
    "kd_ranker/sources/cascade.py": [
        (
            "        teacher_version=TEACHER_VERSION,\n",
            "        teacher_version=TEACHER_VERSION,\n        freshness=2,\n",
        ),
        (
            "        item_id=candidates.item_id.astype(np.int32),\n",
            "        item_id=candidates.item_id.astype(np.int32),\n"
            "        freshness=(candidates.item_id[:, None] % (5, 7)).astype(np.float32),\n",
        ),
    ],
}


def test_an_input_field_of_a_candidate_touches_two_files(tmp_path):
    assert len(AN_INPUT_FIELD) == 2
    folder = changed_copy(tmp_path, AN_INPUT_FIELD)
    run_there(
        folder,
        """
import numpy as np
from kd_ranker.configs import cascade
from kd_ranker.batch import empty_batch
from kd_ranker.batches.cutting import unpack
from kd_ranker.batches.evaluation import evaluation_batches
from kd_ranker.batches.training import BatchConfig, training_batches
from kd_ranker.pipeline import commands, teachers
from kd_ranker.requests.records import read_requests

config = cascade("small")
config.data.dir = "datasets"
config.data.train_requests = 16
config.data.validation_requests = config.data.test_requests = 4
commands.prepare_data(config)
dataset = teachers.dataset_of(config)

def assert_fresh(freshness, item_id, there):
    expected = np.stack([item_id % 5, item_id % 7], axis=-1)
    np.testing.assert_array_equal(freshness, np.where(there[..., None], expected, 7))

request = next(read_requests(dataset, "train"))
assert_fresh(request.freshness, request.item_id, request.item_id >= 0)
sizes = BatchConfig(4, 120, 0.5, 1.0, seed=0)
made = [training_batches(dataset, sizes, resident=resident) for resident in (True, False)]
batches = [unpack(*next(iter(of))) for of in made]
batches += [next(evaluation_batches(dataset, "test", requests=2, candidates=120)).batch]
for batch in batches:
    assert_fresh(*map(np.asarray, (batch.freshness, batch.item_id, batch.candidate_mask)))
assert batch.candidate_mask.sum() == 200
assert empty_batch(dataset.spec, 2, 3).freshness.shape == (2, 3, 2)
assert batch.first(5).freshness.shape == (2, 5, 2)
""",
    )
