import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from kd_ranker.batch import Stage
from kd_ranker.batches.cutting import Span
from kd_ranker.batches.sampling import Slots
from kd_ranker.distillation.losses import USER_LOSSES, LossNumbers
from kd_ranker.distillation.modes import MODES
from kd_ranker.distillation.teacher_signal import SIGNALS
from kd_ranker.embedding.lookup import gather_rows, rows_of_ids
from kd_ranker.embedding.row_optimizers import ROW_OPTIMIZERS
from kd_ranker.models.model import COMPUTE_DTYPES, apply_model, build_model, score
from kd_ranker.models.student import MultiInterest, TwoTower
from kd_ranker.models.teacher import FinalRanker
from kd_ranker.requests.columns import columns_of, needed, only_counting
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.recipes import OPTIMIZERS, SCHEDULES
from kd_ranker.training.state import (
    Frozen,
    Hyperparameters,
    LiveTeacher,
    OptimizerNumbers,
    Recipe,
    Term,
    init_state,
    select_member,
    stack_members,
)
from kd_ranker.training.step import in_turn, make_step, with_live_teacher
from tests.batches.packing_by_hand import packed, prepared, starts_of, unpacked
from tests.random_batches import (
    CATEGORY_SPEC,
    SPEC,
    STUDENT,
    TEACHER,
    make_model,
    random_batch,
    random_items,
)
from tests.requests.random_requests import random_request

TASKS = len(SPEC.tasks)


@functools.cache
def world_of(spec):
    """A live teacher, and what a step reads along with it."""
    model, parameters = make_model(FinalRanker, TASKS, TEACHER, seed=1, spec=spec)
    return LiveTeacher(model, Stage.RETRIEVED), Frozen(random_items(spec=spec), parameters)


LIVE, FROZEN = world_of(SPEC)


@functools.cache
def recipe_of(mode, optimizer, spec, student=MultiInterest):
    heads = MODES[mode].heads_per_task * TASKS
    model, _ = build_model(student, spec, heads, STUDENT)
    return Recipe(
        model=model,
        mode=MODES[mode],
        terms=(Term("bce", "logged"),) if MODES[mode].teacher_logits else (),
        optimizer=OPTIMIZERS[optimizer](),
        row_optimizer=ROW_OPTIMIZERS[optimizer],
        schedule=lambda step, steps: jnp.ones_like(steps),
    )


PROGRAMS = {}


def program_of(recipes, teacher, mapping, devices):
    """One mapped step for all tests that want it: it compiles once for each number of members."""
    key = (*map(id, recipes), id(teacher), mapping, devices)
    if key not in PROGRAMS:
        spread = MAPPINGS[mapping](jax.devices()[:devices])
        PROGRAMS[key] = spread, spread.map_step(make_step(recipes, teacher))
    return PROGRAMS[key]


def make_recipe(mode="shared", optimizer="adam", seeds=(0,), spec=SPEC, student=MultiInterest):
    """A recipe, and the state of a group with a member a seed."""
    how = mode, optimizer, spec, student
    return recipe_of(*how), state_of(*how, tuple(seeds))


@functools.cache
def state_of(mode, optimizer, spec, student, seeds):
    recipe = recipe_of(mode, optimizer, spec, student)
    slots = recipe.row_optimizer.slots(STUDENT.width)
    draw = program_of_init(student, spec, MODES[mode].heads_per_task * TASKS, slots)
    members = jax.tree.map(lambda *of: np.stack(of), *(draw(jax.random.key(of)) for of in seeds))
    # In one program, not one an array.
    return jax.jit(lambda parameters: init_state(recipe, parameters, TASKS, True))(members)


@functools.cache
def program_of_init(student, spec, heads, slots):
    """Parameters by a key: what is drawn takes as long to compile as a step does."""
    _, init = build_model(student, spec, heads, STUDENT)
    return jax.jit(lambda key: init(key, slots))


def hyperparameters(**changes):
    numbers = {
        "user_weight": 1.0,
        "distill_weight": 0.7,
        "term_weights": (1.0,),
        "temperature": 1.0,
        "top_k": 2.0,
        "learning_rate": 0.01,
        "table_learning_rate": 0.02,
        "weight_decay": 0.1,
        "table_weight_decay": 0.1,
        "steps": 1000,
        "unshown_weight": 0.0,
    }
    numbers = jax.tree.map(jnp.float32, numbers | changes)
    return Hyperparameters(
        loss=LossNumbers(numbers.pop("temperature"), numbers.pop("top_k")),
        optimizer=OptimizerNumbers(*(numbers.pop(name) for name in OptimizerNumbers._fields)),
        **numbers,
    )


def run_groups(
    recipes,
    states,
    batches,
    numbers,
    mapping="pmap",
    devices=1,
    live=True,
    spec=SPEC,
):
    """The states after a step on each batch, and the losses of the last, a group each."""
    teacher, frozen = world_of(spec)
    if not live:
        teacher, frozen = None, frozen.replace(teacher=None)
    spread, step = program_of(tuple(recipes), teacher, mapping, devices)
    states, frozen = spread.place(tuple(states)), spread.place(frozen)
    for batch in batches:
        states, losses = step(states, spread.shard(batch), tuple(numbers), frozen)
    return jax.tree.map(np.asarray, spread.unreplicate((states, losses)))


def run(recipe, state, batches, numbers=None, **how):
    """The same of one group of one member, without the axis of members."""
    numbers = stack_members([numbers or hyperparameters()])
    (state,), (losses,) = run_groups([recipe], [state], batches, [numbers], **how)
    return alone(state), select_member(losses, 0)


def alone(state, member=0):
    """A member's state without the axis of members, and without what means nothing."""
    own = select_member(state.replace(step=None, unknown_ids=None, owners=None), member)
    return own.replace(step=state.step, unknown_ids=state.unknown_ids)


def assert_close(one, other, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), one, other)


long = pytest.mark.long


@pytest.mark.parametrize(
    ("modes", "spec", "spreads"),
    [
        pytest.param(["aux", "shared"], SPEC, [("pmap", 8), ("shard_map", 2)], id="modes"),
        pytest.param(MODES, SPEC, [("pmap", 2), ("shard_map", 8)], id="further", marks=long),
        pytest.param(["shared"], CATEGORY_SPEC, [("shard_map", 8)], id="categories"),
    ],
)
def test_the_same_global_batch_gives_the_same_parameters_on_any_devices(modes, spec, spreads):
    """A group a mode, in one program for a number of devices."""
    recipes, states = zip(*(make_recipe(mode, spec=spec) for mode in modes), strict=True)
    numbers = [stack_members([hyperparameters()])] * len(modes)
    # Weights differ from request to request, so a mean of the devices' means would be wrong.
    batches = [random_batch(seed, requests=16, spec=spec) for seed in range(20)]
    reference, losses = run_groups(recipes, states, batches, numbers, spec=spec)
    for mapping, devices in spreads:
        others, other_losses = run_groups(
            recipes, states, batches, numbers, mapping=mapping, devices=devices, spec=spec
        )
        assert_close(losses, other_losses, 1e-5)
        for one, other in zip(reference, others, strict=True):
            assert_close(one.parameters, other.parameters, 1e-5)
            assert_close(one.transform, other.transform, 1e-5)


def sample_of(requests, negative_rate, stage=Stage.RETRIEVED, logged=Stage.RETRIEVED, steps=2):
    """Arguments of `packing_by_hand.packed`: batches of some steps, eight requests each."""
    spec = dataclasses.replace(SPEC, teacher_version="v1")
    columns = only_counting(needed(columns_of(requests, spec), logged, history=True), stage)
    data, kinds, slots = prepared(columns, 12, negative_rate, stage=stage)
    rows = np.random.default_rng(0).integers(0, len(requests), (8, steps))
    return data, starts_of(kinds, rows), slots


@pytest.mark.parametrize(("mapping", "devices"), [("pmap", 2), ("shard_map", 1)])
def test_steps_in_one_call_are_those_on_the_batches_themselves(mapping, devices):
    """However the steps are cut into calls, to the last bit, and none of them compiles anew."""
    requests = [random_request(seed) for seed in range(20)]
    requests += [random_request(20, 0, 0, 3), random_request(21, 1, 1, 1)]
    steps = 4
    batches = packed(*sample_of(requests, 0.6, steps=steps))
    recipe, state = make_recipe()
    expected, expected_losses = run(recipe, state, unpacked(batches), live=False)
    assert (expected.parameters.tables["item"] != state.parameters.tables["item"][0]).any()

    spread = MAPPINGS[mapping](jax.devices()[:devices])
    traces = []

    def counted(*arguments):
        traces.append(1)
        return in_turn(make_step([recipe]))(*arguments)

    take = spread.map_step(counted)
    numbers = (stack_members([hyperparameters()]),)
    on_devices = spread.shard(batches), spread.place(FROZEN.replace(teacher=None))

    def after(stops):
        states = spread.place((state,))
        for span in itertools.starmap(Span, itertools.pairwise((0, *stops, steps))):
            states, losses = take(states, on_devices[0], (span, numbers), on_devices[1])
        return jax.tree.map(np.asarray, spread.unreplicate((states, losses)))

    one_by_one = (found,), (losses,) = after([1, 2, 3])
    assert_close(alone(found).parameters, expected.parameters, 1e-5)
    assert_close(select_member(losses, 0), expected_losses, 1e-5)
    for cuts in range(3):
        for stops in itertools.combinations([1, 2, 3], cuts):
            jax.tree.map(np.testing.assert_array_equal, after(stops), one_by_one)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("modes", "live"),
    [(("aux", "shared"), True), (("aux", "shared"), False), (("none",), False)],
    ids=["live", "logged", "none"],
)
def test_a_step_leaves_out_what_cannot_count(modes, live):
    """Batches of what counts, with the fewest slots that do, against all candidates."""
    requests = [random_request(seed) for seed in range(8)] + [random_request(8, 0, 0, 3)]
    recipes, states = zip(*map(make_recipe, modes), strict=True)
    numbers = [stack_members([hyperparameters()])] * len(modes)
    stage = LIVE.stage if live else Stage.SHOWN
    logged = Stage.RETRIEVED if modes != ("none",) and not live else None
    data, starts, slots = sample_of(requests, 0.6, stage, logged)
    everything = *sample_of(requests, 0.6)[:2], Slots(12, 12, 12)

    def after(data, starts, slots):
        batches = unpacked(packed(data, starts, slots))
        assert (batches[0].item_id.shape[1], batches[0].labelled, batches[0].judged) == slots
        return run_groups(recipes, states, batches, numbers, live=live)

    few, few_losses = after(data, starts, slots)
    every, every_losses = after(*everything)
    assert slots.labelled < 12
    assert (slots.candidates < 12) == (not live)
    assert_close(few_losses, every_losses, 1e-5)
    for one, other in zip(few, every, strict=True):
        assert_close(one.parameters, other.parameters, 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_gradient_descent_on_the_whole_loss(mode):
    """The step against plain differentiation of everything, whole tables included, with SGD."""
    spec = CATEGORY_SPEC
    recipe, group = make_recipe(mode, "sgd", spec=spec)
    state, (live, frozen) = alone(group), world_of(spec)
    batch = random_batch(5, spec=spec)
    numbers = hyperparameters(weight_decay=0.0, table_weight_decay=0.0)
    teacher = jax.jit(
        lambda: jax.nn.sigmoid(score(live.model, frozen.teacher, batch, frozen.items))
    )()

    def entropy(logits, target, weight):
        values = -target * jax.nn.log_sigmoid(logits) - (1 - target) * jax.nn.log_sigmoid(-logits)
        return jnp.mean(
            jnp.sum(weight * values, (0, 1)) / jnp.sum(weight * jnp.ones_like(values), (0, 1))
        )

    def loss(parameters, transform):
        # A row that is only padding is not trained, so its gradient is cut here as well.
        lookups = recipe.model.embedding
        embedded = gather_rows(lookups, parameters.tables, batch, frozen.items, whole_rows=False)
        logits = apply_model(recipe.model, parameters.dense, embedded, batch, frozen.items)
        total = entropy(logits[..., :TASKS], batch.user_label, batch.label_weight[..., None])
        if mode == "none":
            return total
        seen = {
            "aux": lambda: logits[..., TASKS:],
            "shared": lambda: transform["scale"] * logits + transform["offset"],
        }[mode]()
        mask = (batch.stage > 0)[..., None].astype(jnp.float32)
        return total + 0.7 * entropy(seen, teacher, mask)

    differentiated = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    before, (gradients, transform_gradients) = differentiated(state.parameters, state.transform)
    after, losses = run(recipe, group, [batch], numbers, spec=spec)
    np.testing.assert_allclose(losses["loss"], before, rtol=1e-5)
    assert_close(
        after.parameters.dense,
        jax.tree.map(lambda p, g: p - 0.01 * g, state.parameters.dense, gradients.dense), 1e-6,
    )  # fmt: skip
    assert_close(
        after.transform,
        jax.tree.map(lambda p, g: p - 0.01 * g, state.transform, transform_gradients), 1e-6,
    )  # fmt: skip
    for name, table in after.parameters.tables.items():
        before, gradient = state.parameters.tables[name], gradients.tables[name]
        width = STUDENT.width
        assert_close(table[:, :width], (before - 0.02 * gradient)[:, :width], 1e-6)
        np.testing.assert_array_equal(table[:, width], np.any(gradient != 0, axis=1))


def test_losses_are_the_same_on_any_devices_and_in_any_company():
    """A group a loss, each of two members, in either mode, and all groups in one program.

    Of single candidates, lists and pairs; `test_losses` has the sums of all losses add up.
    """
    names = ["bce", "softmax", "lambda", "dftopk"]
    modes = ["aux" if index % 2 else "shared" for index in range(len(names))]
    students = {
        mode: make_recipe(mode, "sgd", seeds=(0, 1), student=TwoTower) for mode in set(modes)
    }
    recipes = [
        students[mode][0]._replace(terms=(Term(name, "logged"),))
        for name, mode in zip(names, modes, strict=True)
    ]
    states = [students[mode][1] for mode in modes]
    first = hyperparameters(distill_weight=0.3, temperature=2.0, top_k=1.0)
    second = hyperparameters(distill_weight=3.0)
    batches = [random_batch(seed) for seed in range(3)]

    def take_steps(batches, *members, devices=1):
        numbers = [stack_members(members)] * len(names)
        return run_groups(recipes, states, batches, numbers, live=False, devices=devices)

    reference, losses = take_steps(batches, first, second)
    assert all((of_group["distill_loss"] > 0).all() for of_group in losses)
    # A request a device.
    other, other_losses = take_steps(batches, first, second, devices=8)
    assert_close(losses, other_losses, 1e-5)
    for one, another in zip(reference, other, strict=True):
        assert_close(alone(one).parameters, alone(another).parameters, 1e-6)
        assert_close(alone(one).transform, alone(another).transform, 1e-6)

    beside_another, _ = take_steps(batches, second, second)
    for one, another in zip(reference, beside_another, strict=True):
        jax.tree.map(np.testing.assert_array_equal, alone(one, 1), alone(another, 1))

    # What stands at weight 0 changes no bit.
    poisoned = [
        batch.replace(
            teacher_probability=np.where(
                batch.teacher_weight > 0, batch.teacher_probability, np.float32(np.nan)
            )
        )
        for batch in batches
    ]
    dirty = take_steps(poisoned, first, second)
    jax.tree.map(np.testing.assert_array_equal, (reference, losses), dirty)


def test_a_batch_without_any_valid_teacher_value_is_a_batch_without_distillation():
    batch = random_batch(3)
    batch = batch.replace(
        teacher_weight=np.zeros_like(batch.teacher_weight),
        teacher_probability=np.full_like(batch.teacher_probability, np.nan),
    )
    shared, losses = run(*make_recipe("shared", "sgd"), [batch], live=False)
    none, _ = run(*make_recipe("none", "sgd"), [batch], live=False)
    assert losses["distill_loss"] == 0
    assert_close(shared.parameters, none.parameters, 1e-7)


def test_stages_teach_what_a_teacher_that_says_them_does_and_need_none():
    recipe, state = make_recipe("aux", "sgd")
    recipes = [recipe._replace(terms=(Term("softmax", signal),)) for signal in SIGNALS]
    batch = random_batch(3)
    probability, weight = SIGNALS["stage"](batch)
    said = batch.replace(teacher_probability=probability, teacher_weight=weight)
    silent = batch.replace(teacher_weight=np.zeros_like(batch.teacher_weight))
    logged, losses = run(recipes[0], state, [said], live=False)
    stage, of_stage = run(recipes[1], state, [silent], live=False)
    assert losses["distill_loss"] > 0
    jax.tree.map(np.testing.assert_array_equal, (logged, losses), (stage, of_stage))


def test_several_terms_add_up_by_their_weights():
    recipe, state = make_recipe("shared", "sgd")
    terms = (Term("bce", "logged"), Term("softmax", "stage"), Term("dftopk", "logged"))
    batch = random_batch(3)

    def distill_loss(terms, weights):
        numbers = hyperparameters(term_weights=weights)
        after, losses = run(recipe._replace(terms=terms), state, [batch], numbers, live=False)
        expected = losses["user_loss"] + 0.7 * losses["distill_loss"]
        np.testing.assert_allclose(losses["loss"], expected, rtol=1e-6)
        return after, losses["distill_loss"]

    each = [distill_loss((term,), (1.0,))[1] for term in terms]
    assert len(set(map(float, each))) == 3
    weights = (1.0, 0.3, 2.0)
    _, together = distill_loss(terms, weights)
    np.testing.assert_allclose(together, np.dot(weights, each), rtol=1e-5)
    # A weight of 0 is as good as no term.
    first, alone_loss = distill_loss(terms[:1], (1.0,))
    beside, with_others = distill_loss(terms, (1.0, 0.0, 0.0))
    np.testing.assert_allclose(with_others, alone_loss, rtol=1e-6)
    assert_close(first.parameters, beside.parameters, 1e-7)


def test_stages_are_heard_of_candidates_of_which_the_teacher_does_not_speak():
    """The logged teacher knows what was passed, and a batch holds the rest behind that."""
    requests = [random_request(seed) for seed in range(8)]
    recipe, state = make_recipe("shared", "sgd")
    recipe = recipe._replace(terms=(Term("listmle", "stage"),))
    few, _ = unpacked(packed(*sample_of(requests, 0.6)))
    assert few.judged < few.item_id.shape[1]
    _, losses = run(recipe, state, [few], live=False)
    _, fewer_losses = run(recipe, state, [few.first(few.judged)], live=False)
    assert losses["distill_loss"] != fewer_losses["distill_loss"]
    assert losses["user_loss"] == pytest.approx(fewer_losses["user_loss"])


def test_a_user_loss_of_weight_zero_leaves_a_student_of_the_teacher_alone():
    recipe, state = make_recipe("shared")
    batch = random_batch(3)
    numbers = hyperparameters(user_weight=0.0)
    alone_with_teacher, losses = run(recipe, state, [batch], numbers, live=False)
    # No bit of what users did has come through.
    flipped = batch.replace(user_label=1 - batch.user_label)
    other, _ = run(recipe, state, [flipped], numbers, live=False)
    jax.tree.map(np.testing.assert_array_equal, alone_with_teacher, other)
    np.testing.assert_allclose(losses["loss"], 0.7 * losses["distill_loss"], rtol=1e-6)
    half, losses = run(recipe, state, [batch], hyperparameters(user_weight=0.5), live=False)
    expected = 0.5 * losses["user_loss"] + 0.7 * losses["distill_loss"]
    np.testing.assert_allclose(losses["loss"], expected, rtol=1e-6)
    assert (half.parameters.tables["item"] != other.parameters.tables["item"]).any()


def test_user_losses_are_means_over_all_devices_that_add_up():
    """On one device and on four, where requests without positives leave devices without labels."""
    # Adam would scale up the rounding of a gradient that cancels: softmax ignores a bias.
    recipe, state = make_recipe("none", "sgd")
    batch = random_batch(5, requests=8)
    label = (batch.user_label > 0.5).astype(np.float32)
    label[:3] = 0
    batch = batch.replace(user_label=label)
    recipes = [recipe._replace(user_loss=name) for name in USER_LOSSES]
    numbers, states = [stack_members([hyperparameters()])] * 3, [state] * 3
    one, losses = run_groups(recipes, states, [batch], numbers)
    four, other_losses = run_groups(recipes, states, [batch], numbers, devices=4)
    assert_close(losses, other_losses, 1e-6)
    for each, other in zip(one, four, strict=True):
        assert_close(each.parameters, other.parameters, 1e-5)
    bce, softmax, both = (float(of["user_loss"][0]) for of in losses)
    assert both == pytest.approx(bce + softmax)

    tables, dense = alone(state).parameters.tables, alone(state).parameters.dense
    rows = gather_rows(recipe.model.embedding, tables, batch, FROZEN.items, whole_rows=False)
    logits = np.asarray(apply_model(recipe.model, dense, rows, batch, FROZEN.items))
    expected = []
    for task in range(TASKS):
        sums = np.zeros(2)
        for z, y, w in zip(logits[..., task], label[..., task], batch.label_weight, strict=True):
            z, y, w = z[w > 0], y[w > 0], w[w > 0]
            if len(z) > 1:
                sums += -(w * y * log_softmax(z)).sum(), (w * y).sum()
        expected.append(sums[0] / sums[1])
    assert softmax == pytest.approx(np.mean(expected), rel=1e-5)


def padded_to(batch, candidates):
    """The batch with more candidates, all of them padding."""
    more = candidates - batch.item_id.shape[1]
    return jax.tree.map(
        lambda array: np.pad(array, [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2))
        if array.ndim > 1 and array.shape[1] == batch.item_id.shape[1] else array,
        batch,
    )  # fmt: skip


def test_padding_changes_nothing():
    """Its number changes the gradients by the rounding of float32, and what it holds no bit."""
    spec = CATEGORY_SPEC
    batch = random_batch(4, candidates=10, spec=spec)
    counts = np.arange(10) < 7
    noisy = batch.replace(
        stage=batch.stage * counts,
        user_label=np.where(counts[:, None], batch.user_label, np.float32(np.nan)),
        label_weight=batch.label_weight * counts,
        teacher_weight=batch.teacher_weight * counts[:, None],
    )
    few = batch.first(7)
    padded = padded_to(few, 10)
    assert padded.item_id.shape[1] == few.item_id.shape[1] + 3
    # Programs for other shapes round otherwise, and Adam divides a gradient by its own size: where
    # nearly all of it cancels, 1e-11 of rounding would move a parameter by 2e-6. After a step of
    # SGD at so high a rate, the parameters are little but the gradients.
    recipe, state = make_recipe("aux", "sgd", spec=spec)
    numbers = hyperparameters(
        learning_rate=1e3, table_learning_rate=1e3, weight_decay=0.0, table_weight_decay=0.0
    )
    one, other, same = (run(recipe, state, [of], numbers, spec=spec) for of in (few, padded, noisy))

    def compare(one, other):
        assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(one)

    jax.tree.map(compare, one, other)
    jax.tree.map(np.testing.assert_array_equal, other, same)
    assert np.isfinite(other[1]["loss"])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_candidates_that_no_label_speaks_of_are_as_good_as_padding(optimizer):
    """Mode none must not depend on how many unlabelled candidates fill up a batch."""
    batches = [random_batch(seed) for seed in range(3)]
    without = [
        batch.replace(stage=np.where(batch.label_weight > 0, batch.stage, 0).astype(np.int8))
        for batch in batches
    ]
    recipe, state = make_recipe("none", optimizer)
    one, other = run(recipe, state, batches), run(recipe, state, without)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_an_unshown_negative_is_a_label_of_zero_with_its_weight():
    """Members on several devices against one alone, with a batch whose log says so."""
    weights = (0.2, 3.0)
    recipe, state = make_recipe("aux", seeds=(0, 0))
    learns_unshown = recipe._replace(unshown_are_negatives=True)
    # All have labels, of which those of the candidates that were not shown mean nothing.
    batches = [random_batch(seed) for seed in range(3)]
    numbers = stack_members([hyperparameters(unshown_weight=weight) for weight in weights])
    (after,), _ = run_groups(
        [learns_unshown], [state], batches, [numbers], mapping="shard_map", devices=2
    )
    _, lone = make_recipe("aux")
    for member, weight in enumerate(weights):
        labelled = []
        for batch in batches:
            unshown = (batch.stage == Stage.RETRIEVED) | (batch.stage == Stage.PASSED)
            labelled.append(
                batch.replace(
                    label_weight=np.where(unshown, np.float32(weight), batch.label_weight),
                    user_label=np.where(unshown[..., None], np.float32(0), batch.user_label),
                )
            )
        expected, _ = run(recipe, lone, labelled)
        assert_close(alone(after, member).parameters, expected.parameters, 1e-5)


def test_unshown_negatives_are_all_that_a_batch_holds():
    """With as few slots as will do for labels, against slots for all; some labels not drawn."""
    requests = [random_request(seed, shown=6) for seed in range(8)]
    few_positives = (np.arange(6) < 2)[:, None]
    requests = [
        dataclasses.replace(request, user_label=request.user_label * few_positives)
        for request in requests
    ]
    recipe, state = make_recipe("shared")
    recipe = recipe._replace(unshown_are_negatives=True)
    data, starts, slots = sample_of(requests, 0.5, Stage.RETRIEVED)
    assert slots.labelled < slots.candidates == 12
    results = []
    for wanted in (slots, Slots(12, 12, 12)):
        batches = unpacked(packed(data, starts, wanted))
        numbers = hyperparameters(unshown_weight=0.5)
        results.append(run(recipe, state, batches, numbers, live=False))
    # Shown candidates whose labels were not drawn are no negatives.
    assert ((batches[0].stage == Stage.SHOWN) & (batches[0].label_weight == 0)).any()
    (few, few_losses), (every, every_losses) = results
    assert_close(few.parameters, every.parameters, 1e-5)
    assert_close(few_losses, every_losses, 1e-5)


def test_numbers_are_traced_so_a_sweep_compiles_once():
    recipe, state = make_recipe("shared")
    traces = []
    step = make_step([recipe], LIVE)

    def counted(*arguments):
        traces.append(1)
        return step(*arguments)

    spread = MAPPINGS["pmap"](jax.devices()[:1])
    mapped = spread.map_step(counted)
    frozen = spread.place(FROZEN)
    losses = []
    for weight, rate, temperature, top_k in [
        (0.0, 0.1, 1.0, 1), (1.0, 0.01, 2.0, 2), (5.0, 0.0, 0.5, 3)
    ]:  # fmt: skip
        numbers = hyperparameters(
            distill_weight=weight, learning_rate=rate, temperature=temperature, top_k=top_k
        )
        states, batch = spread.place((state,)), spread.shard(random_batch(0))
        _, (loss,) = mapped(states, batch, (stack_members([numbers]),), frozen)
        losses.append(float(loss["loss"][0]))
    assert len(traces) == 1
    assert len(set(losses)) == 3


def test_the_live_teacher_scores_what_its_stage_admits():
    batch = random_batch(0)
    of_teacher = jax.jit(lambda: score(LIVE.model, FROZEN.teacher, batch, FROZEN.items))
    expected = jax.nn.sigmoid(of_teacher())
    for stage in (Stage.RETRIEVED, Stage.PASSED, Stage.SHOWN):
        teacher = LiveTeacher(LIVE.model, stage)
        scored = jax.jit(lambda of=teacher: with_live_teacher(of, batch, FROZEN))()
        np.testing.assert_array_equal(
            scored.teacher_weight, np.repeat((batch.stage >= stage)[..., None], TASKS, -1)
        )
        np.testing.assert_allclose(scored.teacher_probability, expected, rtol=1e-5)


MEMBERS = [
    {"seed": 0, "distill_weight": 0.7},
    {"seed": 0, "distill_weight": 3.0, "temperature": 2.0},
    {"seed": 1, "distill_weight": 0.0, "learning_rate": 0.003, "table_learning_rate": 0.01},
]


def population(modes, spec=SPEC):
    """Recipes, states and numbers of a group a mode, each with all of `MEMBERS`."""
    seeds = [member["seed"] for member in MEMBERS]
    groups = [make_recipe(mode, seeds=seeds, spec=spec) for mode in modes]
    recipes, states = zip(*groups, strict=True)
    numbers = stack_members(
        [hyperparameters(**{k: v for k, v in m.items() if k != "seed"}) for m in MEMBERS]
    )
    return recipes, states, [numbers] * len(modes)


def test_a_member_of_a_population_ends_as_the_same_member_alone():
    spec = CATEGORY_SPEC
    batches = [random_batch(seed, spec=spec) for seed in range(20)]
    recipes, states, numbers = population(MODES, spec)
    after, losses = run_groups(recipes, states, batches, numbers, spec=spec)
    for mode, group, group_losses in zip(MODES, after, losses, strict=True):
        for index, member in enumerate(MEMBERS):
            recipe, state = make_recipe(mode, seeds=[member["seed"]], spec=spec)
            own = hyperparameters(**{k: v for k, v in member.items() if k != "seed"})
            expected, expected_losses = run(recipe, state, batches, own, spec=spec)
            assert_close(alone(group, index).parameters, expected.parameters, 1e-5)
            assert_close(alone(group, index).transform, expected.transform, 1e-5)
            assert_close(select_member(group_losses, index), expected_losses, 1e-5)


def test_a_member_that_diverges_is_frozen_and_costs_the_others_no_bit():
    batches = [random_batch(seed) for seed in range(6)]
    recipes, states, (healthy, *_) = population(("shared",))
    rates = healthy.optimizer.learning_rate.at[1].set(1e30)
    ill = healthy._replace(optimizer=healthy.optimizer._replace(learning_rate=rates))
    (after,), (losses,) = run_groups(recipes, states, batches, [ill])
    (expected,), _ = run_groups(recipes, states, batches, [healthy])
    step = int(after.non_finite_step[1])
    assert 1 < step <= 6
    assert not np.isfinite(losses["loss"][1])
    np.testing.assert_array_equal(after.non_finite_step, [0, step, 0])
    for member in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, alone(after, member), alone(expected, member))
    # It is as it was before the step at which its loss was found not to be finite.
    (before,), _ = run_groups(recipes, states, batches[: step - 1], [ill])
    one, other = alone(after, 1), alone(before, 1)
    for name in ("parameters", "transform", "optimizer_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(other, name))


def test_a_member_ends_after_its_own_number_of_steps_as_the_same_member_alone():
    """In its own program, to the last bit, as it was after that step; as alone up to rounding.

    A group an optimizer, and each schedule with one of them or more.
    """
    lengths, seeds = (2, 5, 9), (0, 0, 1)
    recipes = [
        make_recipe("shared", optimizer)[0]._replace(schedule=functools.partial(schedule, 2))
        for optimizer, schedule in zip(
            ROW_OPTIMIZERS, itertools.cycle(SCHEDULES.values()), strict=False
        )
    ]
    batches = [random_batch(seed) for seed in range(max(lengths))]

    def after(seeds, batches, *lengths):
        states = [make_recipe("shared", optimizer, seeds)[1] for optimizer in ROW_OPTIMIZERS]
        numbers = stack_members([hyperparameters(steps=steps) for steps in lengths])
        return run_groups(recipes, states, batches, [numbers] * len(recipes), live=False)[0]

    together = after(seeds, batches, *lengths)
    for member, steps in enumerate(lengths):
        then = after(seeds, batches[:steps], *lengths)
        by_itself = after([seeds[member]], batches[:steps], steps)
        for group, group_then, group_alone in zip(together, then, by_itself, strict=True):
            for name in ("parameters", "transform", "optimizer_state"):
                one, other = (getattr(alone(of, member), name) for of in (group, group_then))
                jax.tree.map(np.testing.assert_array_equal, one, other)
            for name in ("parameters", "transform"):
                one, other = getattr(alone(group, member), name), getattr(alone(group_alone), name)
                assert_close(one, other, 1e-5)


def test_a_member_that_is_finished_can_no_longer_fail():
    """A loss that is not finite on a batch that it does not train on is none of its faults."""
    recipe, state = make_recipe("shared", seeds=(0, 0))
    numbers = stack_members([hyperparameters(steps=steps) for steps in (1, 3)])
    good, bad = random_batch(0), random_batch(1)
    bad = bad.replace(user_features=np.full_like(bad.user_features, np.nan))
    (after,), (losses,) = run_groups([recipe], [state], [good, bad], [numbers])
    assert not np.isfinite(losses["loss"]).any()
    np.testing.assert_array_equal(after.non_finite_step, [0, 2])


def test_the_teacher_is_paid_for_once_and_nothing_is_sorted():
    """Whatever the number of members, the program holds one teacher."""

    def sorts_and_flops(members):
        recipe, state = make_recipe("shared", seeds=range(members))
        numbers = stack_members([hyperparameters()] * members)
        spread = MAPPINGS["shard_map"](jax.devices()[:1])
        arguments = ((state,), random_batch(0), (numbers,), FROZEN)
        program = spread.map_step(make_step([recipe], LIVE)).lower(*arguments).compile()
        return program.as_text().count(" sort("), program.cost_analysis()["flops"]

    teacher = jax.jit(lambda batch: score(LIVE.model, FROZEN.teacher, batch, FROZEN.items))
    teacher_flops = teacher.lower(random_batch(0)).compile().cost_analysis()["flops"]
    (sorts, flops), (many_sorts, many_flops) = sorts_and_flops(1), sorts_and_flops(8)
    assert sorts == many_sorts == 0
    # XLA counts a loop's body once, so the tables do not show here.
    assert many_flops < teacher_flops + 8 * (flops - teacher_flops) * 1.1


def test_one_request_with_one_candidate_trains():
    recipe, state = make_recipe("shared")
    after, losses = run(recipe, state, [random_batch(0, requests=1, candidates=1)])
    assert np.isfinite(losses["loss"])
    assert after.step == 1


@pytest.mark.parametrize(
    ("devices", "spec"), [(1, SPEC), (2, CATEGORY_SPEC)], ids=["1", "2-categories"]
)
def test_ids_out_of_range_train_the_reserved_row_and_are_counted(devices, spec):
    batches = [random_batch(seed, spec=spec) for seed in range(2)]
    items = world_of(spec)[1].items
    unknown = {"user": 1, "item": 0} | ({"category": 0} if spec.num_categories else {})
    for index, batch in enumerate(batches):
        # Negative, one past the end, far beyond; some of them only fill up space.
        batch.item_id[index + 1, :3] = [-1, spec.num_items, 2**31 - 1]
        unknown["item"] += (batch.stage[index + 1, :3] > 0).sum()
        if spec.num_categories:
            # A negative one stands for no value.
            batch.request_category[index] = [-7, spec.num_categories, 2**31 - 1]
            batch.candidate_category[index + 1, :3] = [2**31 - 1, spec.num_categories, -1]
            unknown["category"] += 2 + 2 * (batch.stage[index + 1, :3] > 0).sum()
    batches[1].user_id[3] = -7
    recipe, state = make_recipe("shared", "sgd", spec=spec)
    after, losses = run(recipe, state, batches, devices=devices, spec=spec)
    assert np.isfinite(losses["loss"])
    assert after.unknown_ids == unknown
    width, before = STUDENT.width, alone(state).parameters.tables
    for name, table in after.parameters.tables.items():
        reserved = recipe.model.embedding.tables[name].size
        assert 1 <= table[reserved, width] <= 2
        assert (table[reserved, :width] != 0).any()
        # Nothing is clamped: a row at either end changes only if its own id occurs.
        of_items = np.concatenate([batch.item_id[batch.stage > 0] for batch in batches])
        met = {
            "user": np.concatenate([batch.user_id for batch in batches]),
            "item": of_items,
            "category": np.concatenate(
                [items.category[of_items[np.isin(of_items, np.arange(spec.num_items))]].ravel()]
                + [batch.request_category.ravel() for batch in batches]
                + [batch.candidate_category[batch.stage > 0].ravel() for batch in batches]
            ),
        }[name]
        for row in set(range(len(table))) - {reserved, *met.tolist()}:
            np.testing.assert_array_equal(table[row], before[name][row])


def test_devices_exchange_ids_and_rows_and_nothing_of_a_tables_size():
    # No other array has as many rows as one of these tables.
    spec = dataclasses.replace(CATEGORY_SPEC, num_users=990)
    recipe, state = make_recipe("shared", "adam", spec=spec)
    teacher, frozen = world_of(spec)
    spread = MAPPINGS["shard_map"](jax.devices()[:2])
    numbers = (stack_members([hyperparameters()]),)
    step = spread.map_step(make_step([recipe], teacher))
    batch = random_batch(0, requests=8, candidates=9, spec=spec)
    text = step.lower((state,), batch, numbers, frozen).compile()
    lines = text.as_text().splitlines()
    exchanges = [line for line in lines if " all-gather(" in line or " all-reduce(" in line]
    assert exchanges
    for rows in (table.rows for table in recipe.model.embedding.tables.values()):
        assert any(f",{rows}," in line for line in lines)  # the table itself
        assert not any(f",{rows}," in line or f"[{rows}," in line for line in exchanges)
        # A gradient would have the table's rows and an embedding's width.
        assert not any(f"{rows},{STUDENT.width}]" in line for line in lines)


def test_hashed_tables_train_under_both_mappings():
    config = STUDENT.copy_and_resolve_references()
    config.update({"item_rows": 7, "user_rows": 5, "category_rows": 100})
    spec = CATEGORY_SPEC
    model, init = build_model(MultiInterest, spec, TASKS, config)
    recipe = recipe_of("none", "sgd", spec)._replace(model=model)
    parameters = jax.jit(lambda: stack_members([init(jax.random.key(0), 0)]))()
    state = init_state(recipe, parameters, TASKS, True)
    assert {name: table.shape[1] for name, table in parameters.tables.items()} == {
        "user": 8, "item": 8, "category": 104
    }  # fmt: skip
    batch = random_batch(0, spec=spec)
    batch.item_id[0, 0] = batch.request_category[0, 0] = 10**9
    how = {"live": False, "spec": spec}
    one, _ = run(recipe, state, [batch], **how)
    other, _ = run(recipe, state, [batch], mapping="shard_map", devices=2, **how)
    assert_close(one.parameters, other.parameters, 1e-6)
    assert one.unknown_ids == {"user": 0, "item": 0, "category": 0}
    for name in ("item", "category"):
        assert (one.parameters.tables[name][model.embedding.tables[name].size :] == 0).all()
    # What only fills up has a hash as well, of a row that it must not train.
    table = model.embedding.tables["category"]
    row_of_filler = int(rows_of_ids(table, jnp.array(-1)))
    assert row_of_filler not in rows_of_ids(table, jnp.arange(spec.num_categories))
    counts = one.parameters.tables["category"][:, STUDENT.width]
    assert counts[row_of_filler] == 0 < counts.max()


def test_bfloat16_computes_coarsely_and_keeps_float32():
    config = STUDENT.copy_and_resolve_references()
    config.compute_dtype = "bfloat16"
    spec = CATEGORY_SPEC
    model, _ = build_model(MultiInterest, spec, TASKS, config)
    recipe, state = make_recipe("shared", spec=spec)
    batches = [random_batch(seed, spec=spec) for seed in range(10)]
    _, exact_losses = run(recipe, state, batches, spec=spec)
    coarse, losses = run(recipe._replace(model=model), state, batches, spec=spec)
    assert losses["loss"] != exact_losses["loss"]
    np.testing.assert_allclose(losses["loss"], exact_losses["loss"], rtol=0.02)
    assert {leaf.dtype for leaf in jax.tree.leaves((coarse.parameters, losses))} == {
        np.dtype(np.float32)
    }


@pytest.mark.parametrize("name", COMPUTE_DTYPES)
def test_products_and_their_gradients_have_the_precision_of_the_config(name):
    """A device takes less than float32 by default, which a CPU does not show."""
    student, teacher = (config.copy_and_resolve_references() for config in (STUDENT, TEACHER))
    student.compute_dtype = teacher.compute_dtype = name
    recipe, state = make_recipe("shared")
    model, _ = build_model(MultiInterest, SPEC, TASKS, student)
    live, _ = build_model(FinalRanker, SPEC, TASKS, teacher)
    step = make_step([recipe._replace(model=model)], LIVE._replace(model=live))
    numbers = (stack_members([hyperparameters()]),)
    mapped = MAPPINGS["shard_map"](jax.devices()[:1]).map_step(step)
    text = mapped.lower((state,), random_batch(0), numbers, FROZEN).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) > 20
    exact = ["precision = [HIGHEST, HIGHEST]" in line for line in products]
    assert exact == [name == "float32"] * len(products)
    assert ["bf16" in line for line in products] == [name == "bfloat16"] * len(products)
