import jax
import numpy as np
import pytest

from kd_ranker.batch import EvaluationBatch
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation import evaluate as evaluation
from kd_ranker.evaluation.evaluate import Plan, Ranker, evaluate, make_serve
from kd_ranker.models.student import MultiInterest
from kd_ranker.models.teacher import FinalRanker
from tests.random_batches import CATEGORY_SPEC as SPEC
from tests.random_batches import STUDENT, TEACHER, make_model, random_batch, random_items

TASKS, SHOWN, WEIGHTS = len(SPEC.tasks), 2, (1.0, 2.0, 4.0)
ITEMS = random_items(spec=SPEC)


def make_student(mode, seed):
    heads = MODES[mode].heads_per_task * TASKS
    model, parameters = make_model(MultiInterest, heads, STUDENT, seed, SPEC)
    return Ranker(make_serve(model, MODES[mode]), parameters)


AUX = [make_student("aux", seed) for seed in (3, 4, 5)]
STUDENTS = {mode: make_student(mode, len(mode)) for mode in ("none", "aux", "shared")}
TEACHER_MODEL, TEACHER_PARAMETERS = make_model(FinalRanker, TASKS, TEACHER, seed=9, spec=SPEC)
LIVE = Ranker(make_serve(TEACHER_MODEL, MODES["none"]), TEACHER_PARAMETERS)
each_teacher = pytest.mark.parametrize("teacher", [None, LIVE], ids=["logged", "live"])


def evaluation_batch(seed, present=None):
    batch = random_batch(seed, spec=SPEC)
    requests, candidates = batch.item_id.shape
    truth = np.random.default_rng(1).random((requests, candidates, TASKS), dtype=np.float32)
    mask = np.arange(requests) < (requests if present is None else present)
    return EvaluationBatch(batch, truth, truth[..., 0], truth[..., 1], mask)


BATCHES = [evaluation_batch(seed) for seed in (1, 2)]


def evaluated(teacher, students, batches=BATCHES, **choices):
    return evaluate(teacher, students, batches, ITEMS, Plan(WEIGHTS, SHOWN, **choices))


def assert_same(found, expected):
    jax.tree.map(
        lambda leaf, other: np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )


@each_teacher
def test_students_in_one_pass_are_measured_as_each_in_its_own(teacher):
    students = [*AUX, *STUDENTS.values()]

    teacher_in_one_pass, in_one_pass = evaluated(teacher, students)

    all_heads = {"user", "teacher", "blend"}
    heads_by_run = [set(heads) for heads in in_one_pass]
    assert heads_by_run == [*[all_heads] * 3, {"user"}, all_heads, {"user"}]
    for student, found in zip(students, in_one_pass, strict=True):
        teacher_alone, (alone,) = evaluated(teacher, [student])
        assert_same(teacher_in_one_pass, teacher_alone)
        assert_same(found, alone)
    bces = [measured.sums["user_bce"] for heads in in_one_pass[:3] for measured in heads.values()]
    assert len(np.unique(np.array(bces), axis=0)) == 9


def test_all_rankers_share_one_measuring_program():
    """Different modes, more rankers than one call takes, both teachers."""
    evaluated(None, [STUDENTS["none"]])
    programs = evaluation._sums_of_rankers._cache_size()
    evaluated(None, [*AUX, *STUDENTS.values()])
    evaluated(LIVE, [STUDENTS["shared"]])
    assert evaluation._sums_of_rankers._cache_size() == programs


def test_students_of_a_mode_share_one_serving_program():
    evaluated(None, [*STUDENTS.values()])
    programs = evaluation._score._cache_size()
    evaluated(None, [STUDENTS["none"], *AUX])
    assert evaluation._score._cache_size() == programs


def test_programs_that_sort_measure_as_with_orders_from_the_host(monkeypatch):
    """Where there is no CPU, the program has to sort."""
    with_orders = evaluated(LIVE, AUX)
    measure = evaluation._sums_of_rankers
    monkeypatch.setattr(
        evaluation,
        "_sums_of_rankers",
        lambda rankers, is_teacher, orders, *rest, **static: measure(
            rankers, is_teacher, None, *rest, **static
        ),
    )
    assert_same(evaluated(LIVE, AUX), with_orders)


@pytest.mark.parametrize("sharded", [False, True], ids=["runs", "rows"])
@pytest.mark.parametrize("devices", [2, pytest.param(3, marks=pytest.mark.long)])
def test_devices_that_share_the_work_change_nothing(devices, sharded):
    """Rankers that they cannot share evenly, and the terms of each request."""
    choices = {"ks": (1, 2), "keep": True}
    arguments = (
        LIVE,
        [*AUX, STUDENTS["none"], *AUX[:1]],
        [BATCHES[0], evaluation_batch(2, present=5)],
    )
    expected = evaluated(*arguments, **choices)
    found = evaluated(*arguments, **choices, devices=jax.devices()[:devices], sharded=sharded)
    assert_same(found, expected)


def test_a_live_teacher_measures_as_its_logged_probabilities():
    def logged(evaluation_batch):
        batch = evaluation_batch.batch
        (probability,) = LIVE.serve(TEACHER_PARAMETERS, batch, ITEMS).probability.values()
        weight = np.broadcast_to((batch.stage > 0)[..., None], probability.shape)
        scores = {"teacher_probability": probability, "teacher_weight": weight.astype(np.float32)}
        return evaluation_batch.replace(batch=batch.replace(**jax.device_get(scores)))

    logged_batches = [logged(batch) for batch in BATCHES]

    live_teacher, live = evaluated(LIVE, [STUDENTS["shared"]])
    logged_teacher, from_log = evaluated(None, [STUDENTS["shared"]], logged_batches)

    # The ids in the training of a logged teacher are not known.
    unknown = {"unseen_users": np.nan, "unseen_items": np.nan}
    assert_same(live_teacher.sums | unknown, logged_teacher.sums)
    assert_same(live, from_log)


def test_the_terms_of_each_request_add_up_to_the_sums():
    batches = [BATCHES[0], evaluation_batch(3, present=3)]
    ks = tuple(range(1, 1 + batches[0].batch.item_id.shape[1]))

    teacher, (student,) = evaluated(LIVE, [STUDENTS["shared"]], batches, ks=ks, keep=True)

    for sums, each in (teacher, student["user"]):
        expected = {name: total for name, total in sums.items() if not name.startswith("bin_")}
        terms = each.sums | each.curves
        assert {len(array) for array in terms.values()} == {len(BATCHES[0].request_mask) + 3}
        assert each.curves.keys() >= {"survival", "value_captured", "positives_kept"}
        assert_same({name: array.sum(axis=0) for name, array in terms.items()}, expected)
    # The requests have the order in which they were read.
    _, (last,) = evaluated(LIVE, [STUDENTS["shared"]], batches[1:], ks=ks, keep=True)
    for name, array in last["user"].each.sums.items():
        np.testing.assert_array_equal(array, student["user"].each.sums[name][-3:], err_msg=name)


def test_only_the_requested_heads_are_measured():
    serves = [("blend",), ("teacher", "user"), ()]

    of_serves = [student._replace(serves=names) for student, names in zip(AUX, serves, strict=True)]
    _, some_heads = evaluated(LIVE, of_serves)

    _, all_heads = evaluated(LIVE, AUX)
    for names, some, of_all in zip(serves, some_heads, all_heads, strict=True):
        assert some.keys() == {*names}
        assert_same(some, {name: of_all[name] for name in names})


def test_sums_of_requests_are_kept_only_if_asked_for():
    _, (student,) = evaluated(LIVE, [STUDENTS["none"]])

    assert student["user"].each == ({}, {})


def test_without_requests_there_is_no_evaluation():
    with pytest.raises(ValueError, match="no evaluation requests"):
        evaluated(LIVE, [], [])


def test_ids_that_training_did_not_include_are_counted():
    student = STUDENTS["none"]
    tables = dict(student.parameters.tables)
    # Training included the even items and no user.
    tables["item"] = tables["item"].at[1::2, STUDENT.width].set(0.0)
    tables["user"] = tables["user"].at[:, STUDENT.width].set(0.0)
    forgetful = student._replace(parameters=student.parameters.replace(tables=tables))

    teacher, (student_run, forgetful_run) = evaluated(LIVE, [student, forgetful])

    assert teacher.sums["unseen_items"] == 0
    assert student_run["user"].sums["unseen_items"] == 0
    is_candidate = np.stack([batch.batch.stage for batch in BATCHES]) > 0
    is_odd = np.stack([batch.batch.item_id for batch in BATCHES]) % 2 == 1
    sums = forgetful_run["user"].sums
    assert sums["unseen_items"] == (is_candidate & is_odd).sum() > 0
    assert sums["candidates"] == is_candidate.sum()
    assert sums["unseen_users"] == sums["requests"] > 0


def test_unseen_ids_of_a_logged_teacher_are_unknown():
    teacher, _ = evaluated(None, [])

    assert np.isnan(teacher.sums["unseen_items"])
