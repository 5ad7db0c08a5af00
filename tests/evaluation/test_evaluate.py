import dataclasses

import jax
import numpy as np
import pytest

from kd_ranker.batch import EvaluationBatch
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation.evaluate import Ranker, evaluate, serve_probability
from kd_ranker.models.model import build_model, score
from kd_ranker.models.student import MultiInterest
from kd_ranker.models.teacher import FinalRanker
from tests.batches import SPEC, STUDENT, TEACHER, random_batch, random_items

TASKS, SHOWN, WEIGHTS = len(SPEC.tasks), 2, (1.0, 2.0, 4.0)
ITEMS = random_items()


def student(mode, seed=0):
    heads = MODES[mode].heads_per_task * TASKS
    model, parameters = build_model(MultiInterest, SPEC, heads, STUDENT, jax.random.key(seed))
    return Ranker(serve_probability(model, MODES[mode]), parameters)


TEACHER_MODEL, TEACHER_PARAMETERS = build_model(
    FinalRanker, SPEC, TASKS, TEACHER, jax.random.key(9)
)
LIVE = Ranker(serve_probability(TEACHER_MODEL, MODES["none"]), TEACHER_PARAMETERS)


def evaluation_batch(batch, present=None):
    requests, candidates = batch.item_id.shape
    truth = np.random.default_rng(1).random((requests, candidates, TASKS), dtype=np.float32)
    mask = np.arange(requests) < (requests if present is None else present)
    return EvaluationBatch(batch=batch, true_probability=truth, request_mask=mask)


def take(tree, start, stop):
    return jax.tree.map(lambda array: array[start:stop], tree)


BATCHES = [evaluation_batch(random_batch(seed)) for seed in (1, 2)]


def assert_same(one, other, rtol=1e-5):
    for field in dataclasses.fields(one):
        np.testing.assert_allclose(
            getattr(one, field.name),
            getattr(other, field.name),
            rtol=rtol, atol=1e-5, err_msg=field.name,
        )  # fmt: skip


def run(teacher, students, batches=BATCHES):
    return evaluate(teacher, students, batches, ITEMS, WEIGHTS, SHOWN)


@pytest.mark.parametrize("teacher", [None, LIVE], ids=["logged", "live"])
def test_many_students_in_one_pass_are_measured_as_each_alone(teacher):
    students = [student("none", 0), student("aux", 1), student("shared", 2)]
    teacher_sums, together = run(teacher, students)
    assert [tuple(sums) for sums in together] == [
        ("user",), ("user", "teacher", "blend"), ("user",),
    ]  # fmt: skip
    for one, sums in zip(students, together, strict=True):
        alone_teacher, (alone,) = run(teacher, [one])
        assert_same(alone_teacher, teacher_sums)
        for name in sums:
            assert_same(alone[name], sums[name])
    aux = together[1]
    assert not np.allclose(aux["user"].user_bce, aux["teacher"].user_bce)


def test_a_live_teacher_measures_as_the_same_probabilities_logged_for_all():
    def logged(evaluated):
        batch = evaluated.batch
        probability = jax.nn.sigmoid(score(TEACHER_MODEL, TEACHER_PARAMETERS, batch, ITEMS))
        weight = np.broadcast_to((batch.stage > 0)[..., None], probability.shape)
        return evaluated.replace(
            batch=batch.replace(
                teacher_probability=np.asarray(probability),
                teacher_weight=weight.astype(np.float32),
            )
        )

    one = student("shared")
    live_teacher, (live,) = run(LIVE, [one])
    logged_teacher, (from_log,) = run(None, [one], [logged(batch) for batch in BATCHES])
    assert_same(live_teacher, logged_teacher)
    assert_same(live["user"], from_log["user"])


def test_the_teacher_keeps_all_of_its_own_value():
    teacher, _ = run(LIVE, [])
    # Its top k holds its top shown items from k = shown on.
    np.testing.assert_allclose(teacher.survival[SHOWN - 1 :], teacher.funnel_requests, rtol=1e-6)
    np.testing.assert_allclose(
        teacher.value_captured[SHOWN - 1 :], teacher.value_captured[-1], rtol=1e-6
    )


@pytest.mark.parametrize("teacher", [None, LIVE], ids=["logged", "live"])
def test_requests_that_fill_up_the_last_batch_count_for_nothing(teacher):
    whole = BATCHES[0]
    rest = evaluation_batch(random_batch(3)).replace(
        request_mask=np.arange(whole.request_mask.size) < 3
    )
    students = [student("aux")]
    masked_teacher, (masked,) = run(teacher, students, [whole, rest])
    cut_teacher, (cut,) = run(teacher, students, [whole, take(rest, 0, 3)])
    assert_same(masked_teacher, cut_teacher)
    for name in masked:
        assert_same(masked[name], cut[name])
    unmasked, _ = run(teacher, students, [whole, evaluation_batch(random_batch(3))])
    assert unmasked.label_weight[0] > masked_teacher.label_weight[0]


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no evaluation requests"):
        run(LIVE, [], [])
