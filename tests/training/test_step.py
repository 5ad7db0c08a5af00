import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_ranker.batch import Stage
from kd_ranker.data import sampling
from kd_ranker.data.columns import columns_of
from kd_ranker.distillation.losses import LOSSES, bce
from kd_ranker.distillation.modes import MODES
from kd_ranker.embedding.lookup import gather
from kd_ranker.embedding.row_optimizers import ROW_OPTIMIZERS
from kd_ranker.models.model import apply_model, build_model, score
from kd_ranker.models.student import MultiInterest, TwoTower
from kd_ranker.models.teacher import FinalRanker
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.step import (
    Frozen,
    Hyperparameters,
    LiveTeacher,
    Recipe,
    init_state,
    make_step,
    select_member,
    stack_members,
    with_live_teacher,
)
from tests.batches import SPEC, STUDENT, TEACHER, make_model, random_batch, random_items
from tests.data.requests import random_request

TASKS = len(SPEC.tasks)
ITEMS = random_items()
TEACHER_MODEL, TEACHER_PARAMETERS = make_model(FinalRanker, TASKS, TEACHER, seed=1)
LIVE = LiveTeacher(TEACHER_MODEL, Stage.RETRIEVED)


@functools.cache
def recipe_of(mode, optimizer, student=MultiInterest):
    heads = MODES[mode].heads_per_task * TASKS
    model, _ = build_model(student, SPEC, heads, STUDENT)
    return Recipe(
        model=model,
        mode=MODES[mode],
        distill_loss=bce,
        optimizer=optax.scale_by_adam() if optimizer == "adam" else optax.identity(),
        row_optimizer=ROW_OPTIMIZERS[optimizer],
        schedule=optax.constant_schedule(1.0),
    )


PROGRAMS = {}


def program_of(recipes, live, mapping, devices):
    """One mapped step for all tests that want it: it compiles once for each number of members."""
    key = (*map(id, recipes), live, mapping, devices)
    if key not in PROGRAMS:
        spread = MAPPINGS[mapping](jax.devices()[:devices])
        PROGRAMS[key] = spread, spread.map_step(make_step(recipes, LIVE if live else None))
    return PROGRAMS[key]


def make_recipe(mode="shared", optimizer="adam", seeds=(0,), student=MultiInterest):
    """A recipe, and the state of a group with a member a seed."""
    recipe = recipe_of(mode, optimizer, student)
    heads = MODES[mode].heads_per_task * TASKS
    _, init = build_model(student, SPEC, heads, STUDENT)
    slots = recipe.row_optimizer.slots(STUDENT.width)
    parameters = [init(jax.random.key(seed), slots) for seed in seeds]
    keys = jnp.stack([jax.random.key_data(jax.random.key(2))] * len(seeds))
    return recipe, init_state(recipe, stack_members(parameters), TASKS, True, keys)


def hyperparameters(**changes):
    numbers = {
        "distill_weight": 0.7,
        "temperature": 1.0,
        "top_k": 2.0,
        "learning_rate": 0.01,
        "table_learning_rate": 0.02,
        "weight_decay": 0.1,
        "table_weight_decay": 0.1,
    }
    return Hyperparameters(**{name: jnp.float32(n) for name, n in (numbers | changes).items()})


def run_groups(recipes, states, batches, numbers, mapping="pmap", devices=1, live=True, data=None):
    """The states after a step on each batch, and the losses of the last, a group each."""
    spread, step = program_of(tuple(recipes), live, mapping, devices)
    states = spread.replicate(tuple(states))
    frozen = spread.replicate(Frozen(ITEMS, TEACHER_PARAMETERS if live else None, data))
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


@pytest.mark.parametrize("mode", MODES)
def test_the_same_global_batch_gives_the_same_parameters_on_any_devices(mode):
    recipe, state = make_recipe(mode)
    # Weights differ from request to request, so a mean of the devices' means would be wrong.
    batches = [random_batch(seed, requests=16) for seed in range(20)]
    reference, losses = run(recipe, state, batches)
    for mapping, devices in [
        ("pmap", 2), ("pmap", 8), ("shard_map", 2), ("shard_map", 8)
    ]:  # fmt: skip
        other, other_losses = run(recipe, state, batches, mapping=mapping, devices=devices)
        assert_close(reference.parameters, other.parameters, 1e-5)
        assert_close(reference.transform, other.transform, 1e-5)
        assert_close(losses, other_losses, 1e-5)


@pytest.mark.parametrize(("mapping", "devices"), [("pmap", 1), ("pmap", 8), ("shard_map", 2)])
def test_a_step_cuts_its_batch_from_a_draw(mapping, devices):
    """Three steps of one draw against the same batches, cut on the host."""
    requests = [random_request(seed) for seed in range(20)]
    requests += [random_request(20, 0, 0, 3), random_request(21, 1, 1, 1)]
    spec = dataclasses.replace(SPEC, teacher_version="v1")
    data, numbers = sampling.training_data(columns_of(requests, spec), 12, 0.5, 0.6)
    generator = np.random.default_rng(0)
    rows = generator.integers(0, len(requests), (8, 3))
    start = generator.random((8, 3, sampling.KINDS))
    drawn = sampling.draw(rows, start, numbers[rows])
    batches = [sampling.cut_batch(data, drawn, step) for step in range(3)]
    recipe, state = make_recipe()
    expected, _ = run(recipe, state, batches, live=False)
    found, _ = run(
        recipe, state, [drawn] * 3, mapping=mapping, devices=devices, live=False, data=data
    )
    assert_close(expected.parameters, found.parameters, 1e-5)
    assert (expected.parameters.tables["item"] != state.parameters.tables["item"][0]).any()


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_gradient_descent_on_the_whole_loss(mode):
    """The step against plain differentiation of everything, whole tables included, with SGD."""
    recipe, group = make_recipe(mode, "sgd")
    state = alone(group)
    batch, numbers = random_batch(5), hyperparameters(weight_decay=0.0, table_weight_decay=0.0)
    teacher = jax.nn.sigmoid(score(TEACHER_MODEL, TEACHER_PARAMETERS, batch, ITEMS))

    def entropy(logits, target, weight):
        values = -target * jax.nn.log_sigmoid(logits) - (1 - target) * jax.nn.log_sigmoid(-logits)
        return jnp.mean(
            jnp.sum(weight * values, (0, 1)) / jnp.sum(weight * jnp.ones_like(values), (0, 1))
        )

    def loss(parameters, transform):
        # A row that is only padding is not trained, so its gradient is cut here as well.
        spec = recipe.model.embedding
        embedded = gather(spec, parameters.tables, batch, whole_rows=False)
        logits = apply_model(recipe.model, parameters.dense, embedded, batch, ITEMS)
        total = entropy(logits[..., :TASKS], batch.user_label, batch.label_weight[..., None])
        if mode == "none":
            return total
        seen = {
            "aux": lambda: logits[..., TASKS:],
            "shared": lambda: transform["scale"] * logits + transform["offset"],
        }[mode]()
        mask = (batch.stage > 0)[..., None].astype(jnp.float32)
        return total + 0.7 * entropy(seen, teacher, mask)

    gradients, transform_gradients = jax.grad(loss, argnums=(0, 1))(
        state.parameters, state.transform
    )
    after, losses = run(recipe, group, [batch], numbers)
    np.testing.assert_allclose(losses["loss"], loss(state.parameters, state.transform), rtol=1e-5)
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


def test_every_loss_is_the_same_on_any_devices_and_in_any_company():
    """A group a loss, each of two members, in either mode, and all groups in one program."""
    names = [name for name in LOSSES if name != "bce"]  # which the other tests take
    modes = ["aux" if index % 2 else "shared" for index in range(len(names))]
    students = {
        mode: make_recipe(mode, "sgd", seeds=(0, 1), student=TwoTower) for mode in set(modes)
    }
    recipes = [
        students[mode][0]._replace(distill_loss=LOSSES[name])
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
    for devices in (2, 8):
        other, other_losses = take_steps(batches, first, second, devices=devices)
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


@pytest.mark.parametrize("mode", ["aux", "shared"])
def test_teacher_values_of_weight_zero_change_no_bit(mode):
    recipe, state = make_recipe(mode)
    batch = random_batch(3)
    hole = batch.teacher_weight == 0
    assert hole.any()
    results = [
        run(recipe, state, [batch.replace(
            teacher_probability=np.where(hole, value, batch.teacher_probability).astype(np.float32)
        )], live=False)
        for value in (0.5, np.nan, np.inf, -7.0)
    ]  # fmt: skip
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)
    assert np.isfinite(results[0][1]["loss"])


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


def test_padding_changes_nothing():
    batch = random_batch(4, candidates=7)
    padded = jax.tree.map(
        lambda array: np.pad(array, [(0, 0), (0, 3)] + [(0, 0)] * (array.ndim - 2))
        if array.ndim > 1 and array.shape[1] == batch.item_id.shape[1] else array,
        batch,
    )  # fmt: skip
    assert padded.item_id.shape[1] == batch.item_id.shape[1] + 3
    recipe, state = make_recipe("aux")
    one, other = run(recipe, state, [batch]), run(recipe, state, [padded])
    assert_close(one, other, 1e-6)


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


def test_numbers_are_traced_so_a_sweep_compiles_once():
    recipe, state = make_recipe("shared")
    traces = []
    step = make_step([recipe], LIVE)

    def counted(*arguments):
        traces.append(1)
        return step(*arguments)

    spread = MAPPINGS["pmap"](jax.devices()[:1])
    mapped = spread.map_step(counted)
    frozen = spread.replicate(Frozen(ITEMS, TEACHER_PARAMETERS))
    losses = []
    for weight, rate, temperature, top_k in [
        (0.0, 0.1, 1.0, 1), (1.0, 0.01, 2.0, 2), (5.0, 0.0, 0.5, 3)
    ]:  # fmt: skip
        numbers = hyperparameters(
            distill_weight=weight, learning_rate=rate, temperature=temperature, top_k=top_k
        )
        states, batch = spread.replicate((state,)), spread.shard(random_batch(0))
        _, (loss,) = mapped(states, batch, (stack_members([numbers]),), frozen)
        losses.append(float(loss["loss"][0, 0]))
    assert len(traces) == 1
    assert len(set(losses)) == 3


def test_the_live_teacher_scores_what_its_stage_admits():
    batch, frozen = random_batch(0), Frozen(ITEMS, TEACHER_PARAMETERS)
    for stage in (Stage.RETRIEVED, Stage.PASSED):
        scored = with_live_teacher(LiveTeacher(TEACHER_MODEL, stage), batch, frozen)
        np.testing.assert_array_equal(
            scored.teacher_weight, np.repeat((batch.stage >= stage)[..., None], TASKS, -1)
        )
        np.testing.assert_allclose(
            scored.teacher_probability,
            jax.nn.sigmoid(score(TEACHER_MODEL, TEACHER_PARAMETERS, batch, ITEMS)),
            rtol=1e-6,
        )


MEMBERS = [
    {"seed": 0, "distill_weight": 0.7},
    {"seed": 0, "distill_weight": 3.0, "temperature": 2.0},
    {"seed": 1, "distill_weight": 0.0, "learning_rate": 0.003, "table_learning_rate": 0.01},
]


def population(modes):
    """Recipes, states and numbers of a group a mode, each with all of `MEMBERS`."""
    groups = [make_recipe(mode, seeds=[member["seed"] for member in MEMBERS]) for mode in modes]
    recipes, states = zip(*groups, strict=True)
    numbers = stack_members(
        [hyperparameters(**{k: v for k, v in m.items() if k != "seed"}) for m in MEMBERS]
    )
    return recipes, states, [numbers] * len(modes)


@pytest.mark.parametrize(("mapping", "devices"), [("pmap", 1), ("pmap", 2), ("shard_map", 2)])
def test_a_member_of_a_population_ends_as_the_same_member_alone(mapping, devices):
    batches = [random_batch(seed) for seed in range(50)]
    recipes, states, numbers = population(tuple(MODES))
    after, losses = run_groups(recipes, states, batches, numbers, mapping=mapping, devices=devices)
    for mode, group, group_losses in zip(MODES, after, losses, strict=True):
        for index, member in enumerate(MEMBERS):
            changes = {name: number for name, number in member.items() if name != "seed"}
            recipe, state = make_recipe(mode, seeds=[member["seed"]])
            expected, expected_losses = run(recipe, state, batches, hyperparameters(**changes))
            assert_close(alone(group, index).parameters, expected.parameters, 1e-5)
            assert_close(alone(group, index).transform, expected.transform, 1e-5)
            assert_close(select_member(group_losses, index), expected_losses, 1e-5)


def test_a_member_that_diverges_is_frozen_and_costs_the_others_no_bit():
    batches = [random_batch(seed) for seed in range(6)]
    recipes, states, (healthy, *_) = population(("shared",))
    ill = healthy.replace(learning_rate=healthy.learning_rate.at[1].set(1e30))
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


def test_the_teacher_is_paid_for_once_and_nothing_is_sorted():
    """Whatever the number of members, the program holds one teacher."""

    def sorts_and_flops(members):
        recipe, state = make_recipe("shared", seeds=range(members))
        numbers = stack_members([hyperparameters()] * members)
        spread = MAPPINGS["shard_map"](jax.devices()[:1])
        arguments = ((state,), random_batch(0), (numbers,), Frozen(ITEMS, TEACHER_PARAMETERS))
        program = spread.map_step(make_step([recipe], LIVE)).lower(*arguments).compile()
        return program.as_text().count(" sort("), program.cost_analysis()["flops"]

    items = jnp.asarray(ITEMS)
    teacher = jax.jit(lambda batch: score(TEACHER_MODEL, TEACHER_PARAMETERS, batch, items))
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


@pytest.mark.parametrize("devices", [1, 2])
def test_ids_out_of_range_train_the_reserved_row_and_are_counted(devices):
    batches = [random_batch(seed) for seed in range(2)]
    unknown = 0
    for index, batch in enumerate(batches):
        # Negative, one past the end, far beyond; some of them only fill up space.
        batch.item_id[index + 1, :3] = [-1, SPEC.num_items, 2**31 - 1]
        unknown += (batch.stage[index + 1, :3] > 0).sum()
    batches[1].user_id[3] = -7
    recipe, state = make_recipe("shared", "sgd")
    after, losses = run(recipe, state, batches, devices=devices)
    assert np.isfinite(losses["loss"])
    assert after.unknown_ids == {"item": unknown, "user": 1}
    width, before = STUDENT.width, alone(state).parameters.tables
    for name, table in after.parameters.tables.items():
        assert 1 <= table[-1, width] <= 2
        assert (table[-1, :width] != 0).any()
        # Nothing is clamped: a row at either end changes only if its own id occurs.
        met = {
            "user": np.concatenate([batch.user_id for batch in batches]),
            "item": np.concatenate([batch.item_id[batch.stage > 0] for batch in batches]),
        }[name]
        for row in set(range(len(table) - 1)) - set(met.tolist()):
            np.testing.assert_array_equal(table[row], before[name][row])


def test_devices_exchange_ids_and_rows_and_nothing_of_a_tables_size():
    recipe, state = make_recipe("shared", "adam")
    spread = MAPPINGS["shard_map"](jax.devices()[:2])
    numbers = (stack_members([hyperparameters()]),)
    step = spread.map_step(make_step([recipe], LIVE))
    batch = random_batch(0, requests=8, candidates=5)
    text = step.lower((state,), batch, numbers, Frozen(ITEMS, TEACHER_PARAMETERS)).compile()
    lines = text.as_text().splitlines()
    exchanges = [line for line in lines if " all-gather(" in line or " all-reduce(" in line]
    assert exchanges
    for rows in (SPEC.num_users + 1, SPEC.num_items + 1):
        assert any(f",{rows}," in line for line in lines)  # the table itself
        assert not any(f",{rows}," in line or f"[{rows}," in line for line in exchanges)
        # A gradient would have the table's rows and an embedding's width.
        assert not any(f"{rows},{STUDENT.width}]" in line for line in lines)


def test_hashed_tables_train_under_both_mappings():
    config = STUDENT.copy_and_resolve_references()
    config.update({"item_rows": 7, "user_rows": 5})
    model, init = build_model(MultiInterest, SPEC, TASKS, config)
    recipe = recipe_of("none", "sgd")._replace(model=model)
    parameters = stack_members([init(jax.random.key(0), 0)])
    keys = jax.random.key_data(jax.random.key(2))[None]
    state = init_state(recipe, parameters, TASKS, True, keys)
    assert {name: table.shape[1] for name, table in parameters.tables.items()} == {
        "user": 6, "item": 8
    }  # fmt: skip
    batch = random_batch(0)
    batch.item_id[0, 0] = 10**9
    one, _ = run(recipe, state, [batch], live=False)
    other, _ = run(recipe, state, [batch], live=False, mapping="shard_map", devices=2)
    assert_close(one.parameters, other.parameters, 1e-6)
    assert one.unknown_ids == {"user": 0, "item": 0}
    assert (one.parameters.tables["item"][-1] == 0).all()


def test_bfloat16_computes_coarsely_and_keeps_float32():
    config = STUDENT.copy_and_resolve_references()
    config.compute_dtype = "bfloat16"
    model, _ = build_model(MultiInterest, SPEC, TASKS, config)
    recipe, state = make_recipe("shared")
    batches = [random_batch(seed) for seed in range(10)]
    _, exact_losses = run(recipe, state, batches)
    coarse, losses = run(recipe._replace(model=model), state, batches)
    assert losses["loss"] != exact_losses["loss"]
    np.testing.assert_allclose(losses["loss"], exact_losses["loss"], rtol=0.02)
    assert {leaf.dtype for leaf in jax.tree.leaves((coarse.parameters, losses))} == {
        np.dtype(np.float32)
    }
    # The arithmetic itself, and not only its result.
    spread = MAPPINGS["shard_map"](jax.devices()[:1])
    step = spread.map_step(make_step([recipe._replace(model=model)]))
    numbers = (stack_members([hyperparameters()]),)
    text = step.lower((state,), batches[0], numbers, Frozen(ITEMS, None)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("bf16" in line for line in products)
