"""The losses against hand-worked cases, loops over pairs, scikit-learn, rax, and properties."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rax
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, logit
from scipy.special import softmax as softmax_of
from sklearn.metrics import log_loss, ndcg_score

from kd_ranker.config import defaults
from kd_ranker.distillation import losses
from kd_ranker.distillation.losses import (
    DEFAULT_NUMBERS,
    LOSSES,
    USER_LOSSES,
    LossNumbers,
    bce,
    lambda_rank,
    pairs_held,
    ranknet,
    user_softmax,
)
from kd_ranker.distillation.teacher_signal import probability_of_rank

SHAPE = (3, 6, 2)
# The property tests give the losses on user labels soft labels too.
ALL = {name: loss.function for name, loss in LOSSES.items()} | {"user_softmax": user_softmax}
COMPARING = sorted(ALL.keys() - {"bce", "mse_logit"})
# A pair has the weights of both its candidates.
OF_PAIRS = {"mse_margin", "ranknet", "lambda", "rank_distil"}

over_losses = pytest.mark.parametrize("name", ALL)


def random_entries(seed):
    """Logits, probabilities of which some are equal, and weights of which some are 0."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=SHAPE).astype(np.float32)
    probability = generator.integers(1, 10, SHAPE).astype(np.float32) / 10
    weight = (generator.random(SHAPE) < 0.7).astype(np.float32) * generator.uniform(0.5, 2, SHAPE)
    return logits, probability, weight.astype(np.float32)


@functools.cache
def compiled(name):
    """A loss, and the gradient of the sum of its numerators, compiled once for each shape."""

    def numerator_of(logits, probability, weight, numbers):
        numerator, denominator = ALL[name](logits, probability, weight, numbers)
        return jnp.sum(numerator), (numerator, denominator)

    @jax.jit
    def evaluate(*arguments):
        gradient, totals = jax.grad(numerator_of, has_aux=True)(*arguments)
        return totals, gradient

    def run(logits, probability, weight, temperature=1.0, top_k=2.0):
        numbers = LossNumbers(jnp.float32(temperature), jnp.float32(top_k))
        return jax.tree.map(np.asarray, evaluate(logits, probability, weight, numbers))

    return run


def requests_of(logits, probability, weight):
    """(request, task, z, p, w) of the known candidates of each request and task, in float64."""
    for request, task in itertools.product(range(SHAPE[0]), range(SHAPE[-1])):
        known = weight[request, :, task] > 0
        yield (
            request,
            task,
            known,
            *(
                array[request, known, task].astype(np.float64)
                for array in (logits, probability, weight)
            ),
        )


def assert_is_restated(name, restate, seed, temperature, top_k=2.0):
    """Holds a loss against `restate`.

    That maps z, p and w of the known candidates of a request to its numerator, its denominator, and
    the gradient of the former.
    """
    logits, probability, weight = random_entries(seed)
    numerator, denominator = np.zeros(SHAPE[-1]), np.zeros(SHAPE[-1])
    gradient = np.zeros(SHAPE)
    for request, task, known, z, p, w in requests_of(logits, probability, weight):
        of_request = restate(z, p, w, temperature)
        numerator[task] += of_request[0]
        denominator[task] += of_request[1]
        gradient[request, known, task] = of_request[2]
    totals, actual = compiled(name)(logits, probability, weight, temperature, top_k)
    np.testing.assert_allclose(totals[0], numerator, rtol=1e-4)
    np.testing.assert_allclose(totals[1], denominator, rtol=1e-5)
    np.testing.assert_allclose(actual, gradient, rtol=1e-3, atol=1e-5)


over_cases = pytest.mark.parametrize(
    ("seed", "temperature"), [(0, 1.0), (1, 0.5), (2, 3.0), (3, 1.0)]
)


def test_bce_of_hard_labels_is_scikit_learns_log_loss():
    logits, probability, weight = random_entries(0)
    label = (probability > 0.5).astype(np.float32)
    numerator, denominator = bce(logits, label, weight)
    for task in range(SHAPE[-1]):
        expected = log_loss(
            label[..., task].ravel(),
            expit(logits[..., task].astype(np.float64)).ravel(),
            sample_weight=weight[..., task].ravel(),
        )
        np.testing.assert_allclose(numerator[task] / denominator[task], expected, rtol=1e-5)


@over_cases
def test_bce_of_soft_labels_is_the_formula(seed, temperature):
    def restate(z, p, w, temperature):
        target, student = expit(logit(p) / temperature), expit(z / temperature)
        values = -target * np.log(student) - (1 - target) * np.log(1 - student)
        return (
            temperature**2 * (w * values).sum(), w.sum(), temperature * w * (student - target)
        )  # fmt: skip

    assert_is_restated("bce", restate, seed, temperature)


@over_cases
def test_mse_logit_is_the_formula_at_any_temperature(seed, temperature):
    def restate(z, p, w, temperature):
        return (w * (z - logit(p)) ** 2).sum(), w.sum(), 2 * w * (z - logit(p))

    assert_is_restated("mse_logit", restate, seed, temperature)


@over_cases
def test_mse_margin_is_a_loop_over_pairs_at_any_temperature(seed, temperature):
    def restate(z, p, w, temperature):
        numerator = denominator = 0.0
        gradient = np.zeros(len(z))
        for i, j in itertools.combinations(range(len(z)), 2):
            error = (z[i] - z[j]) - (logit(p[i]) - logit(p[j]))
            numerator += w[i] * w[j] * error**2
            denominator += w[i] * w[j]
            gradient[[i, j]] += np.array([2, -2]) * w[i] * w[j] * error
        return numerator, denominator, gradient

    assert_is_restated("mse_margin", restate, seed, temperature)


def test_mse_margin_is_that_of_rax_which_counts_a_pair_twice():
    logits, probability, weight = random_entries(14)
    expected = rax.pairwise_mse_loss(
        *(jnp.swapaxes(array, 1, 2) for array in (logits, logit(probability))),
        where=jnp.swapaxes(weight > 0, 1, 2), reduce_fn=None,
    )  # fmt: skip
    known = (weight > 0).astype(np.float32)
    (numerator, _), _ = compiled("mse_margin")(logits, probability, known)
    np.testing.assert_allclose(2 * numerator, expected.sum(axis=(0, 2)), rtol=1e-5)


def test_mse_margin_keeps_its_digits_far_from_zero():
    """The difference of two large sums would lose the margins of 0.01 between logits near 1000."""
    logits = np.array([[[1000.0], [1000.01], [1000.03]]], np.float32)
    totals, _ = compiled("mse_margin")(logits, np.full_like(logits, 0.5), np.ones_like(logits))
    margins = np.subtract.outer(*2 * [logits[0, :, 0].astype(np.float64)])
    np.testing.assert_allclose(totals[0], (margins**2).sum() / 2, rtol=1e-2)


def test_bce_tends_to_an_eighth_of_mse_logit_as_the_temperature_grows():
    entries = random_entries(4)
    _, of_bce = compiled("bce")(*entries, temperature=200.0)
    _, of_mse = compiled("mse_logit")(*entries)
    np.testing.assert_allclose(of_bce, of_mse / 8, atol=2e-3)


@over_cases
def test_softmax_is_the_formula(seed, temperature):
    def restate(z, p, w, temperature):
        if len(z) < 2:
            return 0.0, 0.0, 0.0
        q, s = softmax_of(logit(p) / temperature), log_softmax(z / temperature)
        gradient = temperature * ((w * q).sum() * np.exp(s) - w * q)
        return -(temperature**2) * (w * q * s).sum(), (w * q).sum(), gradient

    assert_is_restated("softmax", restate, seed, temperature)


def test_softmax_counts_requests_and_is_least_at_the_teachers_logits():
    probability = np.array([[[0.9], [0.5], [0.2]], [[0.3], [0.6], [0.1]], [[0.4], [0.5], [0.6]]])
    weight = np.array([[[1], [1], [1]], [[1], [1], [0]], [[1], [0], [0]]], np.float32)
    # A number added to all logits of a request changes nothing.
    shift = np.array([3.0, -2.0, 7.0])[:, None, None]
    (numerator, denominator), gradient = compiled("softmax")(
        (logit(probability) + shift).astype(np.float32), probability.astype(np.float32), weight
    )
    np.testing.assert_allclose(denominator, 2.0, rtol=1e-6)
    shares = [softmax_of(logit(probability[0, :, 0])), softmax_of(logit(probability[1, :2, 0]))]
    entropy = -sum((q * np.log(q)).sum() for q in shares)
    np.testing.assert_allclose(numerator, entropy, rtol=1e-5)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_softmax_of_positions_teaches_zipfs_law():
    rank = np.array([2.0, 0.0, 3.0, 1.0], np.float32)
    _, gradient = compiled("softmax")(
        np.zeros((1, 4, 1), np.float32), probability_of_rank(rank)[None, :, None],
        np.ones((1, 4, 1), np.float32),
    )  # fmt: skip
    zipf = 1 / (1 + rank) / (1 + 1 / 2 + 1 / 3 + 1 / 4)
    np.testing.assert_allclose(gradient[0, :, 0], 1 / 4 - zipf, rtol=1e-5)


@over_cases
def test_user_softmax_is_the_formula_at_any_temperature(seed, temperature):
    def restate(z, y, w, _):
        if len(z) < 2:
            return 0.0, 0.0, 0.0
        s = log_softmax(z)
        gradient = (w * y).sum() * np.exp(s) - w * y
        return -(w * y * s).sum(), (w * y).sum(), gradient

    assert_is_restated("user_softmax", restate, seed, temperature)


def test_user_softmax_of_hand_worked_requests():
    """Two positives of five; a request without positives and one with one label add nothing."""
    logits = np.log([[1, 2, 5], [1, 2, 5], [1, 2, 5]])[..., None].astype(np.float32)
    label = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], np.float32)[..., None]
    weight = np.array([[1, 3, 0.5], [1, 1, 1], [1, 0, 0]], np.float32)[..., None]
    (numerator, denominator), gradient = compiled("user_softmax")(logits, label, weight)
    np.testing.assert_allclose(numerator, np.log(8) + 3 * np.log(4), rtol=1e-6)
    np.testing.assert_array_equal(denominator, 4)
    np.testing.assert_array_equal(gradient[1:], 0)
    np.testing.assert_allclose(gradient[0, :, 0], [4 / 8 - 1, 4 * 2 / 8 - 3, 4 * 5 / 8], rtol=1e-6)


@over_cases
def test_listmle_is_a_loop_over_places(seed, temperature):
    def restate(z, p, w, temperature):
        numerator = denominator = 0.0
        gradient = np.zeros(len(z))
        for i in range(len(z)):
            below = np.flatnonzero(p < p[i])
            if len(below):
                places = np.append(below, i)
                shares = softmax_of(z[places] / temperature)
                numerator -= w[i] * temperature * np.log(shares[-1])
                denominator += w[i]
                gradient[places] += w[i] * shares
                gradient[i] -= w[i]
        return numerator, denominator, gradient

    assert_is_restated("listmle", restate, seed, temperature)


def test_listmle_without_ties_is_that_of_rax():
    logits, _, weight = random_entries(13)
    probability = np.random.default_rng(13).permutation(np.prod(SHAPE)).reshape(SHAPE) / 100
    known = weight > 0
    expected = rax.listmle_loss(
        *(jnp.swapaxes(array, 1, 2) for array in (logits, probability)),
        where=jnp.swapaxes(known, 1, 2), reduce_fn=None,
    )  # fmt: skip
    (numerator, denominator), _ = compiled("listmle")(
        logits, probability.astype(np.float32), known.astype(np.float32)
    )
    np.testing.assert_allclose(numerator, expected.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(denominator, (np.maximum(known.sum(1), 1) - 1).sum(0), rtol=1e-6)


def pairs_restated(pair_weight):
    """Loops over the pairs of a request, weighted by w_i w_j `pair_weight(z, p, i, j)`."""

    def restate(z, p, w, temperature):
        numerator = denominator = 0.0
        gradient = np.zeros(len(z))
        for i, j in itertools.permutations(range(len(z)), 2):
            if p[i] > p[j]:
                weight = w[i] * w[j] * pair_weight(z, p, i, j)
                difference = (z[i] - z[j]) / temperature
                numerator += weight * temperature * np.log(1 + np.exp(-difference))
                denominator += weight
                gradient[i] -= weight * expit(-difference)
                gradient[j] += weight * expit(-difference)
        return numerator, denominator, gradient

    return restate


@over_cases
def test_ranknet_is_a_loop_over_pairs(seed, temperature):
    assert_is_restated("ranknet", pairs_restated(lambda z, p, i, j: 1.0), seed, temperature)


@over_cases
def test_lambda_weighs_a_pair_by_what_swapping_it_does_to_scikit_learns_ndcg(seed, temperature):
    def change_of_ndcg(z, p, i, j):
        swapped = z.copy()
        swapped[[i, j]] = z[[j, i]]
        return abs(ndcg_score([p], [z]) - ndcg_score([p], [swapped]))

    assert_is_restated("lambda", pairs_restated(change_of_ndcg), seed, temperature)


@pytest.mark.parametrize("top_k", [1.0, 2.0, 6.0])
def test_rank_distil_is_a_loop_over_the_pairs_below_each_of_the_first(top_k):
    def is_first(z, p, i, j):
        return float((p > p[i]).sum() < top_k)

    assert_is_restated("rank_distil", pairs_restated(is_first), 3, 0.5, top_k)


@over_cases
def test_approx_ndcg_is_the_formula(seed, temperature):
    def restate(z, p, w, temperature):
        if len(np.unique(p)) < 2:
            return 0.0, 0.0, 0.0
        above = expit(np.subtract.outer(z, z) / temperature)  # [j, i]: σ((z_j − z_i) / τ)
        place = 1 + above.sum(0) - 1 / 2
        gain = w * p
        ideal = (np.sort(gain)[::-1] / np.log2(2 + np.arange(len(z)))).sum()
        lacks = 1 - (gain / np.log2(1 + place)).sum() / ideal
        # Of the loss by each place, and of each place by each logit.
        by_place = gain * np.log(2) / ((1 + place) * np.log(1 + place) ** 2) / ideal
        slope = above * (1 - above) / temperature
        gradient = slope @ by_place - slope.sum(0) * by_place
        return w.mean() * lacks, w.mean(), w.mean() * gradient

    assert_is_restated("approx_ndcg", restate, seed, temperature)


def test_a_cold_approx_ndcg_is_what_scikit_learns_ndcg_lacks_to_1():
    logits, probability, _ = random_entries(15)
    weight = np.ones_like(logits)
    (numerator, denominator), _ = compiled("approx_ndcg")(logits, probability, weight, 1e-4)
    expected = [
        sum(1 - ndcg_score(probability[r, None, :, t], logits[r, None, :, t]) for r in range(3))
        for t in range(SHAPE[-1])
    ]
    np.testing.assert_allclose(numerator, expected, rtol=1e-4)
    np.testing.assert_array_equal(denominator, SHAPE[0])


def test_a_teacher_that_ties_all_tells_approx_ndcg_nothing():
    logits, _, weight = random_entries(17)
    for tie in (0.0, 0.4, 1.0):
        totals, gradient = compiled("approx_ndcg")(logits, np.full_like(logits, tie), weight)
        np.testing.assert_array_equal(totals, np.zeros((2, SHAPE[-1])))
        np.testing.assert_array_equal(gradient, np.zeros(SHAPE))


def test_ranknet_of_a_hand_worked_request():
    """Three candidates, the teacher's order 2, 0, 1; the student has 0 first, then 2, then 1."""
    (numerator, denominator), gradient = compiled("ranknet")(
        np.array([[[2.0], [0.0], [1.0]]], np.float32),
        np.array([[[0.5], [0.1], [0.9]]], np.float32),
        np.ones((1, 3, 1), np.float32),
    )
    # (2, 0) stands 1 the wrong way round; (2, 1) 1 and (0, 1) 2 the right way.
    expected = np.log(1 + np.exp(1)) + np.log(1 + np.exp(-1)) + np.log(1 + np.exp(-2))
    np.testing.assert_allclose(numerator, expected, rtol=1e-6)
    assert denominator == 3
    wrong, near, far = expit(1), expit(-1), expit(-2)
    np.testing.assert_allclose(
        gradient[0, :, 0], [wrong - far, near + far, -wrong - near], rtol=1e-5
    )


@pytest.mark.parametrize("loss", [ranknet, lambda_rank])
def test_a_student_that_ties_all_is_pulled_apart(loss):
    """A slope of 1/2 where two logits are equal, which a kink in the formula could lose."""
    probability = jnp.array([[[0.9], [0.1]]])
    gradient = jax.grad(lambda z: jnp.sum(jnp.divide(*loss(z, probability, jnp.ones((1, 2, 1))))))(
        jnp.zeros((1, 2, 1))
    )
    np.testing.assert_allclose(gradient[0, :, 0], [-0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("name", ["ranknet", "lambda"])
def test_a_cold_pairwise_loss_is_the_hinge_and_its_slope_stays_within_one(name):
    # Two known candidates a request, so one pair.
    weight = np.zeros(SHAPE, np.float32)
    weight[:, :2] = 1.0
    logits, probability, _ = random_entries(5)
    for temperature in (1e-3, 1.0, 1e3):
        for request in range(SHAPE[0]):
            one = weight * (np.arange(SHAPE[0]) == request)[:, None, None]
            totals, gradient = compiled(name)(logits, probability, one, temperature)
            assert (np.abs(gradient) <= totals[1] + 1e-6).all()
            if temperature == 1e-3:
                first, second = logits[request, :2]
                behind = np.sign(np.subtract(*probability[request, :2])) * (second - first)
                np.testing.assert_allclose(
                    totals[0], totals[1] * np.maximum(0, behind), rtol=1e-2, atol=2e-3
                )


@over_cases
def test_topk_is_the_formula(seed, temperature):
    def restate(z, p, w, temperature):
        first = np.array([sum(other > own for other in p) < 2 for own in p], float)
        if first.all():
            return 0.0, 0.0, 0.0
        student = expit(z / temperature)
        values = -first * np.log(student) - (1 - first) * np.log(1 - student)
        return temperature * (w * values).sum(), w.sum(), w * (student - first)

    assert_is_restated("topk", restate, seed, temperature, top_k=2.0)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_topk_without_ties_has_the_labels_of_rax(top_k):
    logits, _, weight = random_entries(6)
    weight[:, :5] = 1.0  # five known candidates and more, so every request counts
    probability = np.random.default_rng(6).permutation(SHAPE[0] * 12).reshape(SHAPE) / 100
    known = weight > 0
    labels = rax.utils.cutoff(
        jnp.swapaxes(jnp.asarray(probability), 1, 2), top_k, where=jnp.swapaxes(known, 1, 2)
    )
    expected, _ = bce(logits, jnp.swapaxes(labels, 1, 2), weight)
    (numerator, denominator), _ = compiled("topk")(
        logits, probability.astype(np.float32), weight, top_k=top_k
    )
    np.testing.assert_allclose(numerator, expected, rtol=1e-5)
    np.testing.assert_allclose(denominator, weight.sum((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("name", ["topk", "dftopk"])
def test_a_request_with_no_more_than_k_candidates_tells_nothing(name):
    probability = np.array([[[0.9], [0.5], [0.3]], [[0.6], [0.2], [0.2]]], np.float32)
    weight = np.array([[[1], [1], [0]], [[1], [1], [1]]], np.float32)
    run = functools.partial(compiled(name), np.zeros((2, 3, 1), np.float32), probability, weight)
    for top_k, counted in [(1, 5), (2, 0), (3, 0), (50, 0)]:
        (numerator, denominator), gradient = run(top_k=top_k)
        assert denominator == counted  # k = 2 takes in both that tie at place 2
        np.testing.assert_allclose(numerator, counted * np.log(2), rtol=1e-6)
        assert (gradient != 0).sum() == counted or (name == "dftopk" and counted)


@over_cases
def test_dftopk_is_topk_from_the_middle_between_the_logits_at_places_k_and_k_plus_1(
    seed, temperature
):
    def restate(z, p, w, temperature):
        first = np.array([sum(other > own for other in p) < 2 for own in p], float)
        if first.all():
            return 0.0, 0.0, 0.0
        second, third = np.argsort(-z)[1:3]
        student = expit((z - (z[second] + z[third]) / 2) / temperature)
        values = -first * np.log(student) - (1 - first) * np.log(1 - student)
        gradient = w * (student - first)
        gradient[[second, third]] -= gradient.sum() / 2
        return temperature * (w * values).sum(), w.sum(), gradient

    assert_is_restated("dftopk", restate, seed, temperature, top_k=2.0)


def test_dftopk_says_nothing_of_a_number_added_to_all_logits_and_pushes_nothing_away():
    logits, probability, weight = random_entries(12)
    shift = np.array([3.0, -2.0, 7.0], np.float32)[:, None, None]
    totals, gradient = compiled("dftopk")(logits, probability, weight)
    other_totals, _ = compiled("dftopk")(logits + shift, probability, weight)
    np.testing.assert_allclose(totals, other_totals, rtol=1e-5)
    np.testing.assert_allclose(gradient.sum(axis=1), 0.0, atol=1e-5)
    assert np.abs(gradient).max() > 0.1


def test_certain_teachers_stay_finite_at_any_temperature():
    entries = jnp.full((1, 2, 1), 3.0), jnp.array([[[0.0], [1.0]]]), jnp.ones((1, 2, 1))
    for name in LOSSES:
        for temperature in (0.05, 1.0, 40.0):
            totals, gradient = compiled(name)(*entries, temperature, top_k=1.0)
            assert np.isfinite(totals).all()
            assert np.isfinite(gradient).all()


# The first example of a shape compiles.
compiles = settings(deadline=None, max_examples=25)


@st.composite
def cases(draw):
    """Arguments of a compiled loss; no logits are equal: `lambda` would go by their places."""
    logits, probability, weight = random_entries(draw(st.integers(0, 2**32 - 1)))
    everything_known = draw(st.booleans())
    return (
        logits,
        probability,
        np.where(weight > 0, weight, 1.0).astype(np.float32) if everything_known else weight,
        draw(st.sampled_from([0.5, 1.0, 3.0])),
        draw(st.integers(1, 6)),
    )


@over_losses
@compiles
@given(case=cases(), poison=st.sampled_from([np.nan, np.inf, -np.inf, -3.0]))
def test_entries_of_weight_zero_contribute_exactly_nothing(name, case, poison):
    logits, probability, weight, *numbers = case
    hole = weight == 0
    clean = compiled(name)(*case)
    dirty = compiled(name)(
        np.where(hole, np.float32(poison), logits), np.where(hole, np.float32(poison), probability),
        weight, *numbers,
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert np.isfinite(dirty[0]).all()
    assert (dirty[1][hole] == 0).all()


@over_losses
@compiles
@given(case=cases())
def test_losses_do_not_see_padding(name, case):
    def padded(array, value):
        return np.pad(array, ((0, 0), (0, 2), (0, 0)), constant_values=value)

    logits, probability, weight, *numbers = case
    totals, gradient = compiled(name)(*case)
    other_totals, other_gradient = compiled(name)(
        padded(logits, 7.0), padded(probability, 1.0), padded(weight, 0.0), *numbers
    )
    np.testing.assert_allclose(totals, other_totals, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(padded(gradient, 0.0), other_gradient, rtol=1e-5, atol=1e-5)


@over_losses
@compiles
@given(case=cases(), order=st.permutations(range(SHAPE[1])))
def test_losses_do_not_see_the_order_of_candidates(name, case, order):
    totals, gradient = compiled(name)(*case)
    other_totals, other_gradient = compiled(name)(
        *(array[:, order] for array in case[:3]), *case[3:]
    )
    np.testing.assert_allclose(totals, other_totals, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient[:, order], other_gradient, rtol=1e-5, atol=1e-5)


@over_losses
@compiles
@given(case=cases(), scale=st.sampled_from([0.25, 3.0]))
def test_weights_scaled_alike_leave_the_loss_as_it_is(name, case, scale):
    logits, probability, weight, *numbers = case
    totals, _ = compiled(name)(*case)
    scaled, _ = compiled(name)(logits, probability, np.float32(scale) * weight, *numbers)
    factor = scale**2 if name in OF_PAIRS else scale
    np.testing.assert_allclose(scaled, np.multiply(factor, totals), rtol=1e-5, atol=1e-6)


@over_losses
@compiles
@given(case=cases())
def test_requests_and_tasks_add_up(name, case):
    """The sums over requests are what lets the step add them up over devices."""
    logits, probability, weight, *numbers = case
    parts = np.zeros((2, SHAPE[-1]))
    for request, task in itertools.product(range(SHAPE[0]), range(SHAPE[-1])):
        alone = np.zeros_like(weight)
        alone[request, :, task] = weight[request, :, task]
        parts += compiled(name)(logits, probability, alone, *numbers)[0]
    np.testing.assert_allclose(compiled(name)(*case)[0], parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("known", [0, 1])
def test_a_request_with_nothing_to_compare_counts_for_nothing(name, known):
    logits, probability, weight = random_entries(7)
    weight = np.zeros_like(weight)
    weight[:, :known] = 1.0
    for filling in (0.3, np.nan):
        totals, gradient = compiled(name)(
            np.where(weight > 0, logits, filling).astype(np.float32),
            np.where(weight > 0, probability, filling).astype(np.float32), weight, top_k=1.0,
        )  # fmt: skip
        np.testing.assert_array_equal(totals, np.zeros((2, SHAPE[-1])))
        np.testing.assert_array_equal(gradient, np.zeros(SHAPE))


@pytest.mark.parametrize("name", ["ranknet", "listmle", "topk", "dftopk"])
def test_only_the_teachers_order_counts(name):
    logits, probability, weight = random_entries(8)
    expected = compiled(name)(logits, probability, weight)
    for other in (probability**3, probability_of_rank(10 * (1 - probability)), probability / 1e3):
        actual = compiled(name)(logits, other.astype(np.float32), weight)
        jax.tree.map(np.testing.assert_array_equal, expected, actual)


@pytest.mark.parametrize("lists", [1, 4])
def test_lists_taken_a_few_at_a_time_give_the_same(lists, monkeypatch):
    """One by one, and four of the six with two left over."""
    logits, probability, weight = random_entries(10)
    expected, gradient = compiled("ranknet")(logits, probability, weight)
    monkeypatch.setattr(losses, "_PAIRS_AT_ONCE", lists * SHAPE[1] ** 2)
    assert pairs_held(*SHAPE) == lists * SHAPE[1] ** 2

    def numerator_of(logits):
        numerator, denominator = ranknet(logits, probability, weight)
        return jnp.sum(numerator), (numerator, denominator)

    other_gradient, actual = jax.jit(jax.grad(numerator_of, has_aux=True))(logits)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_allclose(other_gradient, gradient, rtol=1e-5, atol=1e-6)


@over_losses
def test_members_with_numbers_of_their_own_are_each_as_if_alone(name):
    logits, probability, weight = random_entries(11)
    members = np.stack([logits, 2 * logits, logits - 1])
    numbers = LossNumbers(jnp.array([1.0, 2.0, 0.5]), jnp.array([1.0, 2.0, 3.0]))
    together = jax.jit(jax.vmap(lambda z, numbers: ALL[name](z, probability, weight, numbers)))(
        members, numbers
    )
    for index, own in enumerate(members):
        alone, _ = compiled(name)(
            own, probability, weight, numbers.temperature[index], numbers.top_k[index]
        )
        np.testing.assert_allclose([total[index] for total in together], alone, rtol=1e-5)


def test_numbers_have_the_defaults_of_the_config():
    assert list(USER_LOSSES) == ["bce", "softmax", "bce+softmax"]
    config = defaults.get_config()
    of_config = LossNumbers(config.distill.temperature, config.distill.top_k)
    assert of_config == DEFAULT_NUMBERS
