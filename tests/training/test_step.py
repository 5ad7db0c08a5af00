import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_ranker.batch import Stage
from kd_ranker.distillation.losses import bce
from kd_ranker.distillation.modes import MODES
from kd_ranker.embedding.row_optimizers import ROW_OPTIMIZERS
from kd_ranker.models.model import build_model, score
from kd_ranker.models.student import MultiInterest
from kd_ranker.models.teacher import FinalRanker
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.step import (
    Frozen,
    Hyperparameters,
    Recipe,
    init_state,
    make_step,
    with_live_teacher,
)
from tests.batches import SPEC, STUDENT, TEACHER, random_batch, random_items

TASKS = len(SPEC.tasks)
ITEMS = random_items()
TEACHER_MODEL, TEACHER_PARAMETERS = build_model(
    FinalRanker, SPEC, TASKS, TEACHER, jax.random.key(1)
)


def make_recipe(mode="shared", optimizer="adam", live=True):
    heads = MODES[mode].heads_per_task * TASKS
    model, parameters = build_model(MultiInterest, SPEC, heads, STUDENT, jax.random.key(0))
    recipe = Recipe(
        model=model,
        mode=MODES[mode],
        distill_loss=bce,
        optimizer=optax.scale_by_adam() if optimizer == "adam" else optax.identity(),
        row_optimizer=ROW_OPTIMIZERS[optimizer],
        schedule=optax.constant_schedule(1.0),
        teacher=TEACHER_MODEL if live else None,
        teacher_stage=Stage.RETRIEVED,
    )
    return recipe, init_state(
        recipe, parameters, TASKS, True, jax.random.key_data(jax.random.key(2))
    )


def hyperparameters(**changes):
    numbers = {
        "distill_weight": 0.7,
        "temperature": 1.0,
        "learning_rate": 0.01,
        "table_learning_rate": 0.02,
        "weight_decay": 0.1,
        "table_weight_decay": 0.1,
    }
    return Hyperparameters(**{name: jnp.float32(n) for name, n in (numbers | changes).items()})


def run(recipe, state, batches, numbers=None, mapping="pmap", devices=1):
    """The state after a step on each batch, and the losses of the last."""
    spread = MAPPINGS[mapping](jax.devices()[:devices])
    step = spread.map_step(make_step(recipe))
    teacher = TEACHER_PARAMETERS if recipe.teacher else None
    state, frozen = spread.replicate(state), spread.replicate(Frozen(ITEMS, teacher))
    for batch in batches:
        state, losses = step(state, spread.shard(batch), numbers or hyperparameters(), frozen)
    return jax.tree.map(np.asarray, spread.unreplicate((state, losses)))


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


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_gradient_descent_on_the_whole_loss(mode):
    """The step against plain differentiation of everything, whole tables included, with SGD."""
    recipe, state = make_recipe(mode, "sgd")
    batch, numbers = random_batch(5), hyperparameters(weight_decay=0.0, table_weight_decay=0.0)
    teacher = jax.nn.sigmoid(score(TEACHER_MODEL, TEACHER_PARAMETERS, batch, ITEMS))

    def entropy(logits, target, weight):
        values = -target * jax.nn.log_sigmoid(logits) - (1 - target) * jax.nn.log_sigmoid(-logits)
        return jnp.mean(
            jnp.sum(weight * values, (0, 1)) / jnp.sum(weight * jnp.ones_like(values), (0, 1))
        )

    def loss(parameters, transform):
        # A row that is only padding is not trained, so its gradient is cut here as well.
        logits = score(recipe.model, parameters, batch, ITEMS)
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
    after, losses = run(recipe, state, [batch], numbers)
    np.testing.assert_allclose(losses["loss"], loss(state.parameters, state.transform), rtol=1e-5)
    assert_close(
        after.parameters.dense,
        jax.tree.map(lambda p, g: p - 0.01 * g, state.parameters.dense, gradients.dense), 1e-6,
    )  # fmt: skip
    assert_close(
        after.transform,
        jax.tree.map(lambda p, g: p - 0.01 * g, state.transform, transform_gradients), 1e-6,
    )  # fmt: skip
    assert_close(
        after.parameters.tables,
        jax.tree.map(lambda p, g: p - 0.02 * g, state.parameters.tables, gradients.tables), 1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["aux", "shared"])
def test_teacher_values_of_weight_zero_change_no_bit(mode):
    recipe, state = make_recipe(mode, live=False)
    batch = random_batch(3)
    hole = batch.teacher_weight == 0
    assert hole.any()
    results = [
        run(recipe, state, [batch.replace(
            teacher_probability=np.where(hole, value, batch.teacher_probability).astype(np.float32)
        )])
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
    _, (shared, losses) = None, run(*make_recipe("shared", "sgd", live=False), [batch])
    none, _ = run(*make_recipe("none", "sgd", live=False), [batch])
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
    step = make_step(recipe)

    def counted(*arguments):
        traces.append(1)
        return step(*arguments)

    spread = MAPPINGS["pmap"](jax.devices()[:1])
    mapped = spread.map_step(counted)
    frozen = spread.replicate(Frozen(ITEMS, TEACHER_PARAMETERS))
    losses = []
    for weight, rate, temperature in [(0.0, 0.1, 1.0), (1.0, 0.01, 2.0), (5.0, 0.0, 0.5)]:
        numbers = hyperparameters(
            distill_weight=weight, learning_rate=rate, temperature=temperature
        )
        _, loss = mapped(spread.replicate(state), spread.shard(random_batch(0)), numbers, frozen)
        losses.append(float(loss["loss"][0]))
    assert len(traces) == 1
    assert len(set(losses)) == 3


def test_the_live_teacher_scores_what_its_stage_admits():
    batch, frozen = random_batch(0), Frozen(ITEMS, TEACHER_PARAMETERS)
    for stage in (Stage.RETRIEVED, Stage.PASSED):
        recipe, _ = make_recipe("shared")
        scored = with_live_teacher(recipe._replace(teacher_stage=stage), batch, frozen)
        np.testing.assert_array_equal(
            scored.teacher_weight, np.repeat((batch.stage >= stage)[..., None], TASKS, -1)
        )
        np.testing.assert_allclose(
            scored.teacher_probability,
            jax.nn.sigmoid(score(TEACHER_MODEL, TEACHER_PARAMETERS, batch, ITEMS)),
            rtol=1e-6,
        )


def test_one_request_with_one_candidate_trains():
    recipe, state = make_recipe("shared")
    after, losses = run(recipe, state, [random_batch(0, requests=1, candidates=1)])
    assert np.isfinite(losses["loss"])
    assert after.step == 1
