import jax
import numpy as np
import pytest

from kd_ranker.batch import EvaluationBatch
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation.evaluate import Ranker, evaluate, make_serve
from kd_ranker.models.student import MultiInterest
from kd_ranker.models.teacher import FinalRanker
from kd_ranker.training.state import select_member, stack_members
from tests.random_batches import CATEGORY_SPEC as SPEC
from tests.random_batches import STUDENT, TEACHER, make_model, random_batch, random_items

TASKS, SHOWN, WEIGHTS = len(SPEC.tasks), 2, (1.0, 2.0, 4.0)
ITEMS = random_items(spec=SPEC)


def make_students(mode, seeds):
    """A group with a member a seed."""
    heads = MODES[mode].heads_per_task * TASKS
    models = [make_model(MultiInterest, heads, STUDENT, seed, SPEC) for seed in seeds]
    parameters = stack_members([parameters for _, parameters in models])
    return Ranker(make_serve(models[0][0], MODES[mode]), parameters)


STUDENTS = {mode: make_students(mode, [len(mode)]) for mode in ("none", "aux", "shared")}
TEACHER_MODEL, TEACHER_PARAMETERS = make_model(FinalRanker, TASKS, TEACHER, seed=9, spec=SPEC)
LIVE = Ranker(make_serve(TEACHER_MODEL, MODES["none"]), TEACHER_PARAMETERS)


def evaluation_batch(batch, present=None):
    requests, candidates = batch.item_id.shape
    truth = np.random.default_rng(1).random((requests, candidates, TASKS), dtype=np.float32)
    mask = np.arange(requests) < (requests if present is None else present)
    return EvaluationBatch(batch, truth, truth[..., 0], truth[..., 1], mask)


BATCHES = [evaluation_batch(random_batch(seed, spec=SPEC)) for seed in (1, 2)]


def assert_same(one, other, rtol=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=rtol, atol=1e-5, err_msg=name)


def run(teacher, students, batches=BATCHES):
    """The teacher's sums, and those of each group by serve name."""
    of_teacher, of_groups = evaluate(teacher, students, batches, ITEMS, WEIGHTS, SHOWN)
    return of_teacher.sums, [
        {name: summed.sums for name, summed in of_group.items()} for of_group in of_groups
    ]


@pytest.mark.parametrize("teacher", [None, LIVE], ids=["logged", "live"])
def test_many_students_in_one_pass_are_measured_as_each_alone(teacher):
    teacher_sums, together = run(teacher, list(STUDENTS.values()))
    assert [set(sums) for sums in together] == [
        {"user"}, {"user", "teacher", "blend"}, {"user"},
    ]  # fmt: skip
    for one, sums in zip(STUDENTS.values(), together, strict=True):
        alone_teacher, (alone,) = run(teacher, [one])
        assert_same(alone_teacher, teacher_sums)
        for name in sums:
            assert_same(alone[name], sums[name])
    aux = together[1]
    assert not np.allclose(aux["user"]["user_bce"], aux["teacher"]["user_bce"])


def test_the_members_of_a_group_are_measured_as_each_alone():
    seeds = (3, 4, 5)
    _, (group,) = run(LIVE, [make_students("aux", seeds)])
    for index, seed in enumerate(seeds):
        _, (one,) = run(LIVE, [make_students("aux", [seed])])
        for name in one:
            assert_same(select_member(group[name], index), select_member(one[name], 0))
    assert not np.allclose(*group["user"]["user_bce"][:2])


@pytest.mark.parametrize("devices", [2, pytest.param(8, marks=pytest.mark.long)])
def test_devices_share_the_members_of_a_group_and_change_nothing(devices):
    """Members that they cannot share evenly, beside a group of one, and each request's own sums."""
    groups, ks = [make_students("aux", (3, 4, 5)), STUDENTS["none"]], (1, 2)
    with_each = [*BATCHES[:1], evaluation_batch(random_batch(2, spec=SPEC), present=5)]
    arguments = LIVE, groups, with_each, ITEMS, WEIGHTS, SHOWN
    teacher, alone = evaluate(*arguments, ks=ks, keep=True)
    same_teacher, spread = evaluate(*arguments, ks=ks, keep=True, devices=jax.devices()[:devices])
    jax.tree.map(np.testing.assert_array_equal, same_teacher, teacher)
    for one, other, members in zip(alone, spread, (3, 1), strict=True):
        for name, of in other.items():
            cut = jax.tree.map(lambda leaf, members=members: leaf[:members], of)
            # The compiler adds up in another order where there are fewer members side by side.
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), cut, one[name]
            )


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.long), 3])
def test_rows_on_several_devices_change_nothing(devices):
    groups, ks = [make_students("aux", (3, 4, 5)), STUDENTS["none"]], (1, 2)
    arguments = LIVE, groups, BATCHES[:1], ITEMS, WEIGHTS, SHOWN
    alone = evaluate(*arguments, ks=ks, keep=True)
    spread = evaluate(*arguments, ks=ks, keep=True, devices=jax.devices()[:devices], sharded=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), spread, alone)


def test_a_live_teacher_measures_as_the_same_probabilities_logged_for_all():
    def logged(evaluated):
        batch = evaluated.batch
        (probability,) = LIVE.serve(TEACHER_PARAMETERS, batch, ITEMS).probability.values()
        weight = np.broadcast_to((batch.stage > 0)[..., None], probability.shape)
        return evaluated.replace(
            batch=batch.replace(
                teacher_probability=np.asarray(probability),
                teacher_weight=weight.astype(np.float32),
            )
        )

    one = STUDENTS["shared"]
    live_teacher, (live,) = run(LIVE, [one])
    logged_teacher, (from_log,) = run(None, [one], [logged(batch) for batch in BATCHES])
    # Of a teacher in the logs nobody knows what it met.
    assert_same(live_teacher | {"unseen_users": np.nan, "unseen_items": np.nan}, logged_teacher)
    assert_same(live["user"], from_log["user"])


def test_the_teacher_keeps_all_of_its_own_value():
    teacher, _ = run(LIVE, [])
    # Its top k holds its top shown items from k = shown on.
    survival, value_captured = teacher["survival"], teacher["value_captured"]
    np.testing.assert_allclose(survival[SHOWN - 1 :], teacher["funnel_requests"], rtol=1e-6)
    np.testing.assert_allclose(value_captured[SHOWN - 1 :], value_captured[-1], rtol=1e-6)


@pytest.mark.parametrize("teacher", [None, LIVE], ids=["logged", "live"])
def test_requests_that_fill_up_the_last_batch_count_for_nothing(teacher):
    present = 3

    def measured(filler):
        """The sums over a full batch, and one of which `filler` is all but the first requests."""
        last = jax.tree.map(
            lambda kept, other: np.concatenate([kept[:present], other[present:]]),
            evaluation_batch(random_batch(3, spec=SPEC), present),
            evaluation_batch(random_batch(filler, spec=SPEC), present),
        )
        teacher_sums, (sums,) = run(teacher, [STUDENTS["aux"]], [BATCHES[0], last])
        return teacher_sums, sums

    teacher_sums, sums = measured(filler=4)
    other_teacher_sums, other_sums = measured(filler=5)
    assert_same(teacher_sums, other_teacher_sums)
    for name in sums:
        assert_same(sums[name], other_sums[name])
    kept = [BATCHES[0].batch.label_weight, random_batch(3, spec=SPEC).label_weight[:present]]
    np.testing.assert_allclose(
        sums["user"]["label_weight"][0], sum(weight.sum() for weight in kept), rtol=1e-5
    )


def test_the_sums_of_each_request_add_up_to_the_sums_and_leave_out_what_fills_up_a_batch():
    candidates = BATCHES[0].batch.item_id.shape[1]
    ks = tuple(range(1, candidates + 1))
    batches = [BATCHES[0], evaluation_batch(random_batch(3, spec=SPEC), present=3)]
    present = len(BATCHES[0].request_mask) + 3
    students = [make_students("shared", (3, 4))]
    of_teacher, (group,) = evaluate(
        LIVE, students, batches, ITEMS, WEIGHTS, SHOWN, ks=ks, keep=True
    )
    for (sums, each), axis in ((of_teacher, 0), (group["user"], 1)):
        whole = {name: of for name, of in sums.items() if not name.startswith("bin_")}
        kept = each.alone | each.curves
        assert {of.shape[axis] for of in kept.values()} == {present}
        assert each.curves.keys() >= {"survival", "value_captured", "positives_kept"}
        assert_same(whole, {name: of.sum(axis=axis) for name, of in kept.items()})
    # The requests stand in the order in which they were read.
    _, (last,) = evaluate(LIVE, students, batches[1:], ITEMS, WEIGHTS, SHOWN, ks=ks, keep=True)
    for name, of in last["user"].each.alone.items():
        np.testing.assert_array_equal(of, group["user"].each.alone[name][:, -3:], err_msg=name)


def test_the_serving_choices_that_are_asked_for_are_measured_alone():
    students = [STUDENTS["none"], STUDENTS["aux"], STUDENTS["aux"]]
    serves = [None, ("blend",), ("teacher", "user")]
    _, (none, blend, two) = evaluate(LIVE, students, BATCHES, ITEMS, WEIGHTS, SHOWN, serves=serves)
    assert [set(of) for of in (none, blend, two)] == [{"user"}, {"blend"}, {"user", "teacher"}]
    _, (whole,) = run(LIVE, students[1:2])
    for name, summed in (blend | two).items():
        assert_same(summed.sums, whole[name])
        # No request is kept unless that is asked for.
        assert summed.each == ({}, {})


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no evaluation requests"):
        run(LIVE, [], [])


def test_ids_that_training_never_met_are_counted():
    student = STUDENTS["none"]
    tables = dict(student.parameters.tables)
    width = STUDENT.width
    # Of the items, training met the even ones; of the users none.
    tables["item"] = tables["item"].at[:, 1::2, width].set(0.0)
    tables["user"] = tables["user"].at[:, :, width].set(0.0)
    forgetful = student._replace(parameters=student.parameters.replace(tables=tables))
    teacher_sums, (sums, of_forgetful) = run(LIVE, [student, forgetful])
    assert teacher_sums["unseen_items"] == 0 == sums["user"]["unseen_items"][0]
    stages = [np.asarray(batch.batch.stage) for batch in BATCHES]
    odd = sum(
        ((stage > 0) & (batch.batch.item_id % 2 == 1)).sum()
        for stage, batch in zip(stages, BATCHES, strict=True)
    )
    assert of_forgetful["user"]["unseen_items"][0] == odd > 0
    assert of_forgetful["user"]["candidates"][0] == sum((stage > 0).sum() for stage in stages)
    assert of_forgetful["user"]["unseen_users"][0] == of_forgetful["user"]["requests"][0] > 0
    logged, _ = run(None, [])
    assert np.isnan(logged["unseen_items"])
