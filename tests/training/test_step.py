import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_ranker.batch import IN_BATCH, Stage
from kd_ranker.batches.cutting import Span, unpack
from kd_ranker.distillation.losses import USER_LOSSES
from kd_ranker.distillation.modes import MODES
from kd_ranker.distillation.teacher_signal import SIGNALS
from kd_ranker.distillation.terms import Term
from kd_ranker.embedding.lookup import gather_rows
from kd_ranker.embedding.row_optimizers import ROW_OPTIMIZERS
from kd_ranker.models.model import COMPUTE_DTYPES, apply_model, build_model, score
from kd_ranker.models.student import MultiInterest, TwoTower
from kd_ranker.models.teacher import FinalRanker
from kd_ranker.requests.row_files import columns_of
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.optimizers import SCHEDULES
from kd_ranker.training.state import (
    Constants,
    LiveTeacher,
    select_run,
    stack_runs,
)
from kd_ranker.training.step import make_step, many_steps, one_step, with_live_teacher
from tests.batches.packing_by_hand import packed, prepared, starts_of
from tests.random_batches import (
    CATEGORY_SPEC,
    SPEC,
    STUDENT,
    TEACHER,
    random_batch,
    random_items,
)
from tests.requests.random_requests import random_request
from tests.training.steps import (
    assert_close,
    assert_equal,
    hyperparameters,
    learned,
    lowered,
    make_train_spec,
    program_of,
    run_of,
    run_stacks,
    state_of,
    train,
    train_spec_of,
    world_of,
)

TASKS = len(SPEC.tasks)


LIVE, CONSTANTS = world_of(SPEC)


@pytest.mark.parametrize(
    ("mode", "mapping", "devices"), [("aux", "pmap", 8), ("shared", "shard_map", 2)]
)
def test_a_global_batch_trains_the_same_on_any_devices(mode, mapping, devices):
    train_spec, state = make_train_spec(mode, spec=CATEGORY_SPEC)
    # Weights differ from request to request, so a mean of the devices' means would be wrong.
    batches = [random_batch(seed, requests=16, spec=CATEGORY_SPEC) for seed in range(6)]
    options = {"live": True, "spec": CATEGORY_SPEC}

    one, losses = train(train_spec, state, batches, **options)
    other, other_losses = train(
        train_spec, state, batches, mapping=mapping, devices=devices, **options
    )

    assert_close(losses, other_losses, 1e-5)
    assert_close(one.parameters, other.parameters, 1e-5)
    assert_close(one.transform, other.transform, 1e-5)


def test_steps_in_one_call_are_those_on_the_batches_themselves():
    """However the steps are cut into calls, to the last bit, and none of them compiles again."""
    requests = [random_request(seed) for seed in range(20)]
    requests += [random_request(20, 0, 0, 3), random_request(21, 1, 1, 1)]
    spec = dataclasses.replace(SPEC, teacher_version="v1")
    steps = 4
    data, kinds, slots = prepared(columns_of(requests, spec, for_training=True), 12, 0.6)
    rows = np.random.default_rng(0).integers(0, len(requests), (8, steps))
    batches = packed(data, starts_of(kinds, rows), slots)
    train_spec, state = make_train_spec()
    unpacked = [unpack(batches, step) for step in range(steps)]
    expected, expected_losses = train(train_spec, state, unpacked)
    assert (expected.parameters.tables["item"] != state.parameters.tables["item"][0]).any()

    spread = MAPPINGS["shard_map"](jax.devices()[:2])
    traces = []

    def counted(*arguments):
        traces.append(1)
        return many_steps(make_step([train_spec]))(*arguments)

    take = spread.map_step(counted)
    numbers = (stack_runs([hyperparameters()]),)
    sharded_batches = spread.shard(batches)
    constants = spread.place(CONSTANTS.replace(teacher=None))

    def train_with_stops(stops):
        states = spread.place((state,))
        for start, stop in itertools.pairwise((0, *stops, steps)):
            states, losses = take(states, sharded_batches, (Span(start, stop), numbers), constants)
        return jax.tree.map(np.asarray, spread.unreplicate((states, losses)))

    one_by_one = train_with_stops([1, 2, 3])
    (found,), (losses,) = one_by_one
    assert_close(run_of(found).parameters, expected.parameters, 1e-5)
    assert_close(select_run(losses, 0), expected_losses, 1e-5)
    for number in range(3):
        for stops in itertools.combinations([1, 2, 3], number):
            assert_equal(train_with_stops(stops), one_by_one)
    assert len(traces) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_gradient_descent_on_the_whole_loss(mode):
    """The step against plain differentiation of everything, whole tables included, with SGD."""
    spec = CATEGORY_SPEC
    train_spec, stack = make_train_spec(mode, "sgd", spec=spec)
    state = run_of(stack)
    live, constants = world_of(spec)
    batch = random_batch(5, spec=spec)
    numbers = hyperparameters(weight_decay=0.0, table_weight_decay=0.0)
    teacher = jax.jit(
        lambda: jax.nn.sigmoid(score(live.model, constants.teacher, batch, constants.items))
    )()

    def entropy(logits, target, weight):
        values = -target * jax.nn.log_sigmoid(logits) - (1 - target) * jax.nn.log_sigmoid(-logits)
        return jnp.mean(
            jnp.sum(weight * values, (0, 1)) / jnp.sum(weight * jnp.ones_like(values), (0, 1))
        )

    def loss(parameters, transform):
        # A row that is only padding is not trained, so its gradient is cut here as well.
        lookups = train_spec.model.embedding
        embedded = gather_rows(lookups, parameters.tables, batch, constants.items)
        logits = apply_model(train_spec.model, parameters.dense, embedded, batch, constants.items)
        total = entropy(logits[..., :TASKS], batch.user_label, batch.label_weight[..., None])
        if mode == "none":
            return total
        if mode == "aux":
            seen = logits[..., TASKS:]
        else:
            seen = transform["scale"] * logits + transform["offset"]
        mask = (batch.stage > 0)[..., None].astype(jnp.float32)
        return total + 0.7 * entropy(seen, teacher, mask)

    differentiated = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    loss_before, (gradients, transform_gradients) = differentiated(
        state.parameters, state.transform
    )
    after, losses = train(train_spec, stack, [batch], numbers, live=True, spec=spec)

    def descend(value, gradient):
        return value - 0.01 * gradient

    np.testing.assert_allclose(losses["loss"], loss_before, rtol=1e-5)
    expected = jax.tree.map(descend, state.parameters.dense, gradients.dense)
    assert_close(after.parameters.dense, expected, 1e-6)
    expected = jax.tree.map(descend, state.transform, transform_gradients)
    assert_close(after.transform, expected, 1e-6)
    width = STUDENT.width
    for name, table in after.parameters.tables.items():
        gradient = gradients.tables[name]
        expected = state.parameters.tables[name] - 0.02 * gradient
        assert_close(table[:, :width], expected[:, :width], 1e-6)
        is_touched = np.any(gradient != 0, axis=1)
        np.testing.assert_array_equal(table[:, width], is_touched)
        rows = train_spec.model.embedding.tables[name].size + 1
        assert losses[f"rows_touched/{name}"] == pytest.approx(is_touched.sum() / rows)
    parts = {"dense": gradients.dense, "tables": gradients.tables}
    if mode == "shared":
        parts["transform"] = transform_gradients
    for part, gradient in parts.items():
        norm = np.linalg.norm(
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
        )
        rate = 0.02 if part == "tables" else 0.01
        np.testing.assert_allclose(losses[f"gradient_norm/{part}"], norm, rtol=1e-5)
        np.testing.assert_allclose(losses[f"update_norm/{part}"], rate * norm, rtol=1e-3)


def test_losses_depend_on_neither_devices_nor_other_runs():
    """A stack of two runs per loss, all stacks in one program.

    `test_losses` has the sums of all losses add up. Adam would scale up the rounding of a gradient
    that cancels: softmax ignores a bias.
    """
    names = ["bce", "softmax", "lambda", "dftopk"]
    train_spec, state = make_train_spec("shared", "sgd", seeds=(0, 1), student=TwoTower)
    terms = [(Term(name),) for name in names]
    train_specs = [
        train_spec._replace(user_loss=user_loss)
        for user_loss in itertools.islice(itertools.cycle(USER_LOSSES), len(names))
    ]
    first = hyperparameters(distill_weight=0.3, temperature=2.0, top_k=1.0)
    second = hyperparameters(distill_weight=3.0)
    batches = [random_batch(seed) for seed in range(3)]
    for batch in batches:
        batch.user_label[:3] = 0  # devices without positives

    def take_steps(batches, *runs, devices=1):
        def numbers_of_stack(stack_terms):
            return stack_runs([run._replace(terms=stack_terms) for run in runs])

        numbers = [numbers_of_stack(stack_terms) for stack_terms in terms]
        return run_stacks(train_specs, [state] * len(names), batches, numbers, devices=devices)

    reference, losses = take_steps(batches, first, second)
    assert all((stack_losses["distill_loss"] > 0).all() for stack_losses in losses)
    # A request a device.
    other, other_losses = take_steps(batches, first, second, devices=8)
    assert_close(losses, other_losses, 1e-5)
    for one, another in zip(reference, other, strict=True):
        assert_close(learned(run_of(one))[:2], learned(run_of(another))[:2], 1e-6)

    beside_another, _ = take_steps(batches, second, second)
    for one, another in zip(reference, beside_another, strict=True):
        assert_equal(run_of(one, 1), run_of(another, 1))

    _, at_once = take_steps(batches[:1], first, second)
    bce, softmax, both, _ = (stack_losses["user_loss"] for stack_losses in at_once)
    np.testing.assert_allclose(both, bce + softmax, rtol=1e-6)

    # A value of weight 0 changes no bit.
    poisoned = []
    for batch in batches:
        is_valid = batch.teacher_weight > 0
        probability = np.where(is_valid, batch.teacher_probability, np.float32(np.nan))
        poisoned.append(batch.replace(teacher_probability=probability))
    assert_equal((reference, losses), take_steps(poisoned, first, second))


def test_without_teacher_values_a_batch_does_not_distill():
    batch = random_batch(3)
    batch = batch.replace(
        teacher_weight=np.zeros_like(batch.teacher_weight),
        teacher_probability=np.full_like(batch.teacher_probability, np.nan),
    )
    shared, losses = train(*make_train_spec("shared", "sgd"), [batch])
    none, _ = train(*make_train_spec("none", "sgd"), [batch])
    assert losses["distill_loss"] == 0
    assert_close(shared.parameters, none.parameters, 1e-7)


def test_stages_train_as_a_teacher_that_logged_them():
    train_spec, state = make_train_spec("aux", "sgd")
    batch = random_batch(3)
    probability, weight = SIGNALS["stage"].read(batch)
    with_stages_as_scores = batch.replace(teacher_probability=probability, teacher_weight=weight)
    without_teacher = batch.replace(teacher_weight=np.zeros_like(batch.teacher_weight))

    by_scores, score_losses = train(
        train_spec, state, [with_stages_as_scores],
        hyperparameters(terms=(Term("softmax", "scores"),)),
    )  # fmt: skip
    by_stages, stage_losses = train(
        train_spec, state, [without_teacher], hyperparameters(terms=(Term("softmax", "stage"),))
    )

    assert score_losses["distill_loss"] > 0
    assert_equal(by_scores, by_stages)
    assert_equal(score_losses, stage_losses)


def test_terms_add_up_by_their_weights():
    """A stack per term, one of all terms, and one of all in which a single weight is not 0."""
    train_spec, state = make_train_spec("shared", "sgd")
    weights = (1.0, 0.3, 2.0)
    terms_of_stacks = [
        (Term("bce"),),
        (Term("softmax", "stage"),),
        (Term("dftopk"),),
        (Term("bce"), Term("softmax", "stage", 0.3), Term("dftopk", weight=2.0)),
        (Term("bce"), Term("softmax", "stage", 0.0), Term("dftopk", weight=0.0)),
    ]
    numbers = [stack_runs([hyperparameters(terms=terms)]) for terms in terms_of_stacks]

    states, losses = run_stacks([train_spec] * 5, [state] * 5, [random_batch(3)], numbers)

    totals = [float(stack_losses["distill_loss"][0]) for stack_losses in losses]
    *single, all_terms, bce_of_three = totals
    assert len(set(single)) == 3
    np.testing.assert_allclose(all_terms, np.dot(weights, single), rtol=1e-5)
    np.testing.assert_allclose(bce_of_three, single[0], rtol=1e-6)
    assert_close(states[0].parameters, states[4].parameters, 1e-7)


def test_padding_changes_nothing():
    """Its number changes the gradients by the rounding of float32, and its content no bit."""
    spec, size = CATEGORY_SPEC, 10
    batch = random_batch(4, candidates=size, spec=spec)
    counts = np.arange(size) < 7
    noisy = batch.replace(
        stage=batch.stage * counts,
        user_label=np.where(counts[:, None], batch.user_label, np.float32(np.nan)),
        label_weight=batch.label_weight * counts,
        teacher_weight=batch.teacher_weight * counts[:, None],
    )
    few = batch.first(7)
    padded_fields = {}
    for field in IN_BATCH:
        if field.of not in ("request", "event"):
            array = getattr(few, field.name)
            widths = [(0, 0), (0, size - 7)] + [(0, 0)] * (array.ndim - 2)
            padded_fields[field.name] = np.pad(array, widths)
    padded = few.replace(**padded_fields)
    # Programs for other shapes round otherwise, and Adam divides a gradient by its own size. After
    # a step of SGD at so high a rate, the parameters are little but the gradients.
    train_spec, state = make_train_spec("aux", "sgd", spec=spec)
    numbers = hyperparameters(
        learning_rate=1e3, table_learning_rate=1e3, weight_decay=0.0, table_weight_decay=0.0
    )

    def train_on(batch):
        return train(train_spec, state, [batch], numbers, live=True, spec=spec)

    on_few = train_on(few)
    on_padded = train_on(padded)
    for leaf, other in zip(jax.tree.leaves(on_few), jax.tree.leaves(on_padded), strict=True):
        assert np.linalg.norm(leaf - other) <= 1e-6 * np.linalg.norm(leaf)
    assert_equal(on_padded, train_on(noisy))
    _, losses = on_padded
    assert np.isfinite(losses["loss"])


def test_candidates_without_labels_are_as_good_as_padding():
    """Mode none must not depend on how many unlabeled candidates fill up a batch."""
    batches = [random_batch(seed) for seed in range(3)]
    without_unlabeled = []
    for batch in batches:
        stage = np.where(batch.label_weight > 0, batch.stage, 0).astype(np.int8)
        without_unlabeled.append(batch.replace(stage=stage))
    train_spec, state = make_train_spec("none")

    expected, expected_metrics = train(train_spec, state, batches)

    trained, metrics = train(train_spec, state, without_unlabeled)
    assert_equal(trained, expected)
    # Norms may add up in another order.
    assert_close(metrics, expected_metrics, atol=1e-6)


def test_an_unshown_negative_is_a_label_of_zero_with_its_weight():
    """Runs on two devices against single runs on batches with such labels."""
    weights = (0.2, 3.0)
    train_spec, state = make_train_spec("aux", seeds=(0, 0))
    learns_unshown = train_spec._replace(unshown_are_negatives=True)
    # All have labels, of which those of the candidates that were not shown mean nothing.
    batches = [random_batch(seed) for seed in range(3)]
    numbers = [stack_runs([hyperparameters(unshown_weight=weight) for weight in weights])]

    (after,), _ = run_stacks(
        [learns_unshown], [state], batches, numbers, mapping="shard_map", devices=2
    )

    def labeled(batch, weight):
        unshown = (batch.stage == Stage.RETRIEVED) | (batch.stage == Stage.PASSED)
        return batch.replace(
            label_weight=np.where(unshown, np.float32(weight), batch.label_weight),
            user_label=np.where(unshown[..., None], np.float32(0), batch.user_label),
        )

    for run, weight in enumerate(weights):
        expected, _ = train(*make_train_spec("aux"), [labeled(batch, weight) for batch in batches])
        assert_close(run_of(after, run).parameters, expected.parameters, 1e-5)


def batch_by_stages(seed):
    """Candidates of later stages first; the last ones have no label, fewer no score."""
    batch = random_batch(seed, candidates=9)
    order = np.argsort(-batch.stage, axis=1, kind="stable")

    def ordered(array):
        return np.take_along_axis(array, order.reshape(*order.shape, *[1] * (array.ndim - 2)), 1)

    fields = {
        field.name: ordered(getattr(batch, field.name))
        for field in IN_BATCH
        if field.of not in ("request", "event")
    }
    fields |= {name: fields[name][:, :6] for name in ("user_label", "label_weight")}
    scores = {name: fields[name][:, :8] for name in ("teacher_probability", "teacher_weight")}
    # Some of the retrieved have scores too; one request has no shown candidate.
    generator = np.random.default_rng(seed)
    is_scored = generator.random(scores["teacher_weight"].shape) < 0.6
    scores["teacher_weight"] = (is_scored & (fields["stage"][:, :8, None] > 0)).astype(np.float32)
    fields["stage"][0] = np.minimum(fields["stage"][0], Stage.PASSED)
    fields["label_weight"][0] = 0
    return batch.replace(**fields | scores)


def near_shown(batch, margin):
    """Loops over requests, tasks and candidates."""
    is_near = np.zeros((*batch.stage.shape, TASKS), bool)
    for request, task in np.ndindex(len(batch.stage), TASKS):
        probability = batch.teacher_probability[request, :, task].astype(np.float64)
        has_score = batch.teacher_weight[request, :, task] > 0
        shown = [
            index
            for index in range(batch.num_labeled)
            if batch.stage[request, index] == Stage.SHOWN and has_score[index]
        ]
        if not shown:
            continue
        mean = np.average(probability[shown], weights=batch.label_weight[request, shown])
        for index in np.flatnonzero(has_score):
            unshown = batch.stage[request, index] in (Stage.RETRIEVED, Stage.PASSED)
            is_near[request, index, task] = unshown and probability[index] > (1 - margin) * mean
    return is_near


@pytest.mark.parametrize("user_loss", USER_LOSSES)
def test_unshown_candidates_near_the_shown_are_no_negatives(user_loss):
    """Two runs of a stack with other margins, each against a loop over candidates."""
    train_spec, state = make_train_spec("aux", seeds=(0, 0))
    train_spec = train_spec._replace(
        user_loss=user_loss, unshown_are_negatives=True, drops_near_shown=True
    )
    margins = (0.05, 0.6)
    numbers = stack_runs(
        [hyperparameters(unshown_weight=0.3, unshown_margin=margin) for margin in margins]
    )
    dropped = np.zeros(2)
    for seed in range(6):
        batch = batch_by_stages(seed)
        _, (losses,) = run_stacks([train_spec], [state], [batch], [numbers], mapping="shard_map")

        parameters = run_of(state).parameters
        items = random_items()
        embedded = gather_rows(train_spec.model.embedding, parameters.tables, batch, items)
        logits = apply_model(train_spec.model, parameters.dense, embedded, batch, items)
        logits = logits[..., :TASKS]
        unshown = (batch.stage == Stage.RETRIEVED) | (batch.stage == Stage.PASSED)
        padding = [(0, 0), (0, 3), (0, 0)]
        label = np.where(unshown[..., None], 0, np.pad(batch.user_label, padding))
        label_weight = np.pad(batch.label_weight, padding[:2])
        label_weight = np.where(unshown, np.float32(0.3), label_weight)
        for run, margin in enumerate(margins):
            is_near = near_shown(batch, margin)
            assert not is_near[0].any()
            dropped[run] += is_near.sum()
            weight = np.where(is_near, 0, label_weight[..., None]).astype(np.float32)
            terms = [loss(logits, label, weight) for loss in USER_LOSSES[user_loss].values()]
            means = [np.mean(numerator / denominator) for numerator, denominator in terms]
            np.testing.assert_allclose(losses["user_loss"][run], sum(means), rtol=1e-5)
    assert 0 < dropped[0] < dropped[1]
    _, step = program_of((train_spec,), None, "shard_map", 1)
    assert step._cache_size() == 1


def test_negatives_dropped_by_scores_depend_on_no_device_and_no_missing_score():
    train_spec, state = make_train_spec("none", "sgd")
    train_spec = train_spec._replace(unshown_are_negatives=True, drops_near_shown=True)
    numbers = hyperparameters(unshown_weight=0.3, unshown_margin=0.4)
    batches = [batch_by_stages(seed) for seed in range(3)]

    one, losses = train(train_spec, state, batches, numbers)

    other, other_losses = train(train_spec, state, batches, numbers, devices=8)
    assert_close(other_losses, losses, 1e-5)
    assert_close(learned(other)[:2], learned(one)[:2], 1e-6)
    # Whatever stands in place of a missing score, not a bit changes.
    poisoned = []
    for batch in batches:
        is_known = batch.teacher_weight > 0
        probability = np.where(is_known, batch.teacher_probability, np.float32(np.nan))
        poisoned.append(batch.replace(teacher_probability=probability))
    assert_equal(train(train_spec, state, poisoned, numbers), (one, losses))


def test_without_a_margin_or_scores_all_unshown_are_negatives():
    train_spec, state = make_train_spec("none", "sgd")
    train_spec = train_spec._replace(unshown_are_negatives=True)
    drops = train_spec._replace(drops_near_shown=True)
    numbers = hyperparameters(unshown_weight=0.3)
    with_margin = hyperparameters(unshown_weight=0.3, unshown_margin=0.4)
    batch = batch_by_stages(0)
    unscored = batch.replace(teacher_weight=np.zeros_like(batch.teacher_weight))

    all_negative = train(train_spec, state, [batch], numbers)

    # Off, the program reads no margin.
    assert_equal(train(train_spec, state, [batch], with_margin), all_negative)
    assert_close(train(drops, state, [unscored], with_margin), all_negative, 1e-6)
    _, losses = train(drops, state, [batch], with_margin)
    assert abs(losses["user_loss"] - all_negative[1]["user_loss"]) > 1e-3


@pytest.mark.parametrize("stage", [Stage.RETRIEVED, Stage.PASSED])
def test_a_live_teacher_drops_what_its_scores_as_logged_would_drop(stage):
    """Candidates before its stage have no score, so they stay negatives."""
    train_spec, state = make_train_spec("none", "sgd")
    train_spec = train_spec._replace(unshown_are_negatives=True, drops_near_shown=True)
    numbers = stack_runs([hyperparameters(unshown_weight=0.3, unshown_margin=0.9)])
    batch = random_batch(3)
    teacher = LIVE._replace(stage=stage)
    scored = jax.jit(functools.partial(with_live_teacher, teacher, batch, CONSTANTS))()
    as_logged = batch.replace(
        teacher_probability=np.asarray(scored.teacher_probability),
        teacher_weight=np.asarray(scored.teacher_weight),
    )
    _, (expected,) = run_stacks([train_spec], [state], [as_logged], [numbers])

    spread, step = program_of((train_spec,), teacher, "pmap", 1)
    stepped = step(spread.place((state,)), spread.shard(batch), (numbers,), spread.place(CONSTANTS))

    _, (losses,) = jax.tree.map(np.asarray, spread.unreplicate(stepped))
    np.testing.assert_allclose(losses["user_loss"], expected["user_loss"], rtol=1e-5)


def test_both_loss_weights_are_traced():
    train_spec, state = make_train_spec("shared")
    batch = random_batch(3)
    flipped = batch.replace(user_label=1 - batch.user_label)
    options = {"live": True, "mapping": "shard_map"}
    for user, distill, rate in [(1, 0, 0.1), (1, 5, 0.01), (0.5, 0.7, 0.01), (0, 0.7, 0.01)]:
        numbers = hyperparameters(
            1 + distill, distill, user_weight=user, distill_weight=distill, learning_rate=rate
        )
        after, losses = train(train_spec, state, [batch], numbers, **options)
        flipped_after, flipped_losses = train(train_spec, state, [flipped], numbers, **options)
        for found in (losses, flipped_losses):
            expected = user * found["user_loss"] + distill * found["distill_loss"]
            np.testing.assert_allclose(found["loss"], expected, rtol=1e-6)
        # At a user weight of 0, no bit of the labels comes through.
        equal_leaves = jax.tree.map(np.array_equal, after.parameters, flipped_after.parameters)
        assert jax.tree.all(equal_leaves) == (user == 0)
        assert (losses["loss"] == flipped_losses["loss"]) == (user == 0)
    _, step = program_of((train_spec,), LIVE, "shard_map", 1)
    assert step._cache_size() == 1


def test_the_live_teacher_scores_what_its_stage_admits():
    batch = random_batch(0)
    teacher_logits = jax.jit(lambda: score(LIVE.model, CONSTANTS.teacher, batch, CONSTANTS.items))
    expected = jax.nn.sigmoid(teacher_logits())
    for stage in (Stage.RETRIEVED, Stage.PASSED, Stage.SHOWN):
        teacher = LiveTeacher(LIVE.model, stage)
        scored = jax.jit(functools.partial(with_live_teacher, teacher, batch, CONSTANTS))()
        is_admitted = np.repeat((batch.stage >= stage)[..., None], TASKS, -1)
        np.testing.assert_array_equal(scored.teacher_weight, is_admitted)
        np.testing.assert_allclose(scored.teacher_probability, expected, rtol=1e-5)


RUNS = [
    {"seed": 0, "steps": 2},
    {"seed": 0, "steps": 5, "distill_weight": 3.0, "temperature": 2.0},
    {"seed": 1, "steps": 9, "distill_weight": 0.0, "learning_rate": 3e-3, "weight_decay": 0.0},
]


def numbers_of(runs, **more):
    numbers = []
    for run in runs:
        changes = {name: value for name, value in run.items() if name != "seed"}
        numbers.append(hyperparameters(**changes | more))
    return stack_runs(numbers)


def test_a_diverged_run_stops_and_leaves_the_others_unchanged():
    batches = [random_batch(seed) for seed in range(6)]
    train_spec, state = make_train_spec("shared", seeds=[run["seed"] for run in RUNS])
    healthy = numbers_of(RUNS)
    rates = healthy.optimizer.learning_rate.at[1].set(1e30)
    diverging = healthy._replace(optimizer=healthy.optimizer._replace(learning_rate=rates))

    (after,), (losses,) = run_stacks([train_spec], [state], batches, [diverging])

    (expected,), _ = run_stacks([train_spec], [state], batches, [healthy])
    step = int(after.non_finite_step[1])
    assert 1 < step <= 6
    assert not np.isfinite(losses["loss"][1])
    np.testing.assert_array_equal(after.non_finite_step, [0, step, 0])
    for run in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, run_of(after, run), run_of(expected, run))
    # It is as it was before the step at which its loss was found not to be finite.
    (before,), _ = run_stacks([train_spec], [state], batches[: step - 1], [diverging])
    assert_equal(learned(run_of(after, 1)), learned(run_of(before, 1)))


def test_a_gradient_that_is_not_finite_leaves_the_state_from_before(monkeypatch):
    """The slope of a root is infinite at 0, where its value is finite."""

    def rooted(logits, probability, weight, numbers):
        zero = jnp.sum(jnp.sqrt(jnp.maximum(logits - 1e9, 0)), (0, 1))
        return zero, jnp.ones_like(zero)

    monkeypatch.setitem(USER_LOSSES, "rooted", {"rooted": rooted})
    train_spec, state = make_train_spec("none")
    after, losses = train(train_spec._replace(user_loss="rooted"), state, [random_batch(0)])
    assert np.isfinite(losses["loss"])
    assert after.non_finite_step == 1
    assert losses["update_norm/dense"] == losses["update_norm/tables"] == 0
    assert_equal(learned(after), learned(run_of(state)))


def test_a_run_ends_after_its_own_number_of_steps_as_a_lone_run():
    """Equal to the last bit to its state after that step; equal up to rounding to a lone run.

    A stack per mode, each with an optimizer, a schedule and a student of its own.
    """
    kinds = [*zip(MODES, ROW_OPTIMIZERS, (MultiInterest, TwoTower, MultiInterest), strict=True)]
    train_specs = [
        train_spec_of(mode, optimizer, SPEC, student)._replace(
            schedule=functools.partial(schedule, 2), unshown_are_negatives=student is TwoTower
        )
        for (mode, optimizer, student), schedule in zip(
            kinds, itertools.cycle(SCHEDULES.values()), strict=False
        )
    ]
    batches = [random_batch(seed) for seed in range(9)]

    def after(runs, steps):
        seeds = tuple(run["seed"] for run in runs)
        states = [
            state_of(mode, optimizer, SPEC, student, seeds) for mode, optimizer, student in kinds
        ]
        numbers = [numbers_of(runs, unshown_weight=0.3)] * len(kinds)
        return run_stacks(train_specs, states, batches[:steps], numbers)[0]

    together = after(RUNS, 9)
    for index, run in enumerate(RUNS):
        at_its_end = after(RUNS, run["steps"])
        by_itself = after([run], run["steps"])
        for stack, ended_stack, lone_stack in zip(together, at_its_end, by_itself, strict=True):
            found = learned(run_of(stack, index))
            assert_equal(found, learned(run_of(ended_stack, index)))
            assert_close(found[:2], learned(run_of(lone_stack))[:2], 1e-5)


def test_a_run_that_is_finished_can_no_longer_fail():
    """A loss that is not finite on a batch that it does not train on is none of its faults."""
    train_spec, state = make_train_spec("shared", seeds=(0, 0))
    numbers = stack_runs([hyperparameters(steps=steps) for steps in (1, 3)])
    good = random_batch(0)
    bad = random_batch(1)
    bad = bad.replace(user_features=np.full_like(bad.user_features, np.nan))
    (after,), (losses,) = run_stacks([train_spec], [state], [good, bad], [numbers])
    assert not np.isfinite(losses["loss"]).any()
    np.testing.assert_array_equal(after.non_finite_step, [0, 2])


def test_the_teacher_is_paid_for_once_and_nothing_is_sorted():
    """Whatever the number of runs, the program holds one teacher."""

    def sorts_and_flops(runs):
        train_spec, state = make_train_spec("shared", seeds=range(runs))
        program = lowered(train_spec, state, random_batch(0), CONSTANTS, LIVE).compile()
        return program.as_text().count(" sort("), program.cost_analysis()["flops"]

    teacher = jax.jit(lambda batch: score(LIVE.model, CONSTANTS.teacher, batch, CONSTANTS.items))
    teacher_flops = teacher.lower(random_batch(0)).compile().cost_analysis()["flops"]
    sorts, flops = sorts_and_flops(1)
    many_sorts, many_flops = sorts_and_flops(8)
    assert sorts == many_sorts == 0
    # XLA counts a loop's body once, so the tables do not show here.
    assert many_flops < teacher_flops + 8 * (flops - teacher_flops) * 1.1


def test_unknown_ids_train_the_reserved_row_and_are_counted():
    spec = CATEGORY_SPEC
    batches = [random_batch(seed, spec=spec) for seed in range(2)]
    items = world_of(spec)[1].items
    unknown = {"user": 1, "item": 0, "category": 0}
    for index, batch in enumerate(batches):
        # Negative, one past the end, far beyond; some of them only fill up space.
        batch.item_id[index + 1, :3] = [-1, spec.num_items, 2**31 - 1]
        # A negative category means no value.
        batch.request_category[index] = [-7, spec.num_categories, 2**31 - 1]
        batch.candidate_category[index + 1, :3] = [2**31 - 1, spec.num_categories, -1]
        num_unknown = (batch.stage[index + 1, :3] > 0).sum()
        unknown["item"] += num_unknown
        unknown["category"] += 2 + 2 * num_unknown
    batches[1].user_id[3] = -7
    train_spec, state = make_train_spec("shared", "sgd", spec=spec)
    after, losses = train(train_spec, state, batches, devices=2, live=True, spec=spec)
    assert np.isfinite(losses["loss"])
    assert after.unknown_ids == unknown
    item_ids = np.concatenate([batch.item_id[batch.stage > 0] for batch in batches])
    known_items = item_ids[np.isin(item_ids, np.arange(spec.num_items))]
    categories = [items.category[known_items].ravel()]
    for batch in batches:
        categories.append(batch.request_category.ravel())
        categories.append(batch.candidate_category[batch.stage > 0].ravel())
    met = {
        "user": np.concatenate([batch.user_id for batch in batches]),
        "item": item_ids,
        "category": np.concatenate(categories),
    }
    width = STUDENT.width
    before = run_of(state).parameters.tables
    for name, table in after.parameters.tables.items():
        reserved = train_spec.model.embedding.tables[name].size
        assert 1 <= table[reserved, width] <= 2
        assert (table[reserved, :width] != 0).any()
        # Nothing is clamped: a row at either end changes only if its own id occurs.
        for row in set(range(len(table))) - {reserved, *met[name].tolist()}:
            np.testing.assert_array_equal(table[row], before[name][row])


def test_devices_exchange_rows_but_no_tables():
    # No other array has as many rows as one of these tables.
    spec = dataclasses.replace(CATEGORY_SPEC, num_users=990)
    train_spec, state = make_train_spec("shared", "adam", spec=spec)
    batch = random_batch(0, requests=8, candidates=9, spec=spec)
    program = lowered(train_spec, state, batch, Constants(random_items(spec=spec), None), devices=2)
    lines = program.compile().as_text().splitlines()
    exchanges = [line for line in lines if " all-gather(" in line or " all-reduce(" in line]
    assert exchanges
    for rows in (table.rows for table in train_spec.model.embedding.tables.values()):
        assert any(f",{rows}," in line for line in lines)  # the table itself
        assert not any(f",{rows}," in line or f"[{rows}," in line for line in exchanges)
        # A gradient would have the table's rows and an embedding's width.
        assert not any(f"{rows},{STUDENT.width}]" in line for line in lines)


@pytest.mark.parametrize("row_kernel", [True, False])
def test_a_step_for_a_tpu_has_the_kernel_of_its_spec(row_kernel):
    """Lowered for a TPU, which needs neither a TPU nor its compiler."""
    train_spec, state = make_train_spec("none")
    step = MAPPINGS["shard_map"](jax.devices()[:1]).map_step(
        one_step(make_step([train_spec._replace(row_kernel=row_kernel)]))
    )
    numbers = stack_runs([hyperparameters()])
    constants = CONSTANTS.replace(teacher=None)
    traced = step.trace((state,), random_batch(0), (numbers,), constants)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in text) == row_kernel


@pytest.mark.parametrize("name", COMPUTE_DTYPES)
def test_products_and_gradients_have_the_configs_precision(name):
    """A device takes less than float32 by default, which a CPU does not show."""
    student = STUDENT.copy_and_resolve_references()
    teacher = TEACHER.copy_and_resolve_references()
    student.compute_dtype = name
    teacher.compute_dtype = name
    train_spec, state = make_train_spec("shared")
    model, _ = build_model(MultiInterest, SPEC, TASKS, student)
    live, _ = build_model(FinalRanker, SPEC, TASKS, teacher)
    of_model = train_spec._replace(model=model)
    text = lowered(of_model, state, random_batch(0), CONSTANTS, LIVE._replace(model=live)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) > 20
    exact = ["precision = [HIGHEST, HIGHEST]" in line for line in products]
    assert exact == [name == "float32"] * len(products)
    assert ["bf16" in line for line in products] == [name == "bfloat16"] * len(products)
