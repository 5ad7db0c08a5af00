"""The losses against loops over the known candidates of a request, scikit-learn and rax."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax, logit
from scipy.special import softmax as softmax_of
from scipy.stats import rankdata
from sklearn.metrics import ndcg_score

from kd_ranker.config import defaults
from kd_ranker.distillation import losses
from kd_ranker.distillation.losses import (
    DEFAULT_NUMBERS,
    LOSSES,
    USER_LOSSES,
    LossNumbers,
    of_one_list,
    user_softmax,
)

SHAPE = (3, 6, 2)
# The losses on user labels are compared with soft labels too.
ALL = {name: loss.function for name, loss in LOSSES.items()} | {"user_softmax": user_softmax}


class Case(NamedTuple):
    """Logits, probabilities and weights [requests, candidates, tasks], and a loss's numbers."""

    logits: np.ndarray
    probability: np.ndarray
    weight: np.ndarray
    temperature: float = 1.0
    top_k: float = 2.0


def random_case(seed, temperature=1.0, top_k=2.0, known=0.7, levels=9):
    """A case with probabilities of `levels` values, and with no value where the weight is 0."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=SHAPE)
    probability = (1 + generator.integers(0, levels, SHAPE)) / 10
    weight = (generator.random(SHAPE) < known) * generator.uniform(0.5, 2, SHAPE)
    poison = generator.choice([np.nan, np.inf, -np.inf, -3.0], (2, *SHAPE))
    logits, probability = np.where(weight > 0, [logits, probability], poison)
    arrays = (array.astype(np.float32) for array in (logits, probability, weight))
    return Case(*arrays, temperature, top_k)


# Few known candidates, all of them, and a teacher that ties them all.
CASES = [
    random_case(0, temperature=0.5, top_k=1.0, known=0.2),
    random_case(1, temperature=0.5, top_k=2.0, known=0.7),
    random_case(2, temperature=0.5, top_k=3.0, known=1.0),
    random_case(3, temperature=1.0, top_k=4.0, known=0.2),
    random_case(4, temperature=1.0, top_k=5.0, known=0.7),
    random_case(5, temperature=1.0, top_k=6.0, known=1.0),
    random_case(6, temperature=3.0, top_k=1.0, known=0.2),
    random_case(7, temperature=3.0, top_k=2.0, known=0.7),
    random_case(8, temperature=3.0, top_k=3.0, known=1.0),
    random_case(9, levels=1),
]


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


NOTHING = 0.0, 0.0


def bce(z, p, w, temperature, _):
    target, student = expit(logit(p) / temperature), expit(z / temperature)
    values = -target * np.log(student) - (1 - target) * np.log(1 - student)
    return temperature**2 * (w * values).sum(), w.sum()


def mse_logit(z, p, w, *_):
    return (w * (z - logit(p)) ** 2).sum(), w.sum()


def mse_margin(z, p, w, *_):
    pairs = list(itertools.combinations(range(len(z)), 2))
    errors = [(z[i] - z[j]) - (logit(p[i]) - logit(p[j])) for i, j in pairs]
    weights = np.array([w[i] * w[j] for i, j in pairs])
    return (weights * np.square(errors)).sum(), weights.sum()


def softmax(z, p, w, temperature, _):
    if len(z) < 2:
        return NOTHING
    q, s = softmax_of(logit(p) / temperature), log_softmax(z / temperature)
    return -(temperature**2) * (w * q * s).sum(), (w * q).sum()


def user_softmax_by_hand(z, y, w, *_):
    if len(z) < 2:
        return NOTHING
    return -(w * y * log_softmax(z)).sum(), (w * y).sum()


def listmle(z, p, w, temperature, _):
    numerator = 0.0
    denominator = 0.0
    for i in range(len(z)):
        below = np.flatnonzero(p < p[i])
        if len(below):
            log_shares = log_softmax(z[np.append(below, i)] / temperature)
            numerator -= w[i] * temperature * log_shares[-1]
            denominator += w[i]
    return numerator, denominator


def over_pairs(pair_weight, z, p, w, temperature, top_k):
    """A loop over pairs with weights w_i w_j `pair_weight(z, p, i, j, top_k)`."""
    numerator = 0.0
    denominator = 0.0
    for i, j in itertools.permutations(range(len(z)), 2):
        if p[i] > p[j]:
            weight = w[i] * w[j] * pair_weight(z, p, i, j, top_k)
            numerator += weight * temperature * np.log1p(np.exp((z[j] - z[i]) / temperature))
            denominator += weight
    return numerator, denominator


def equal_weight(*_):
    return 1.0


def is_above_in_top_k(z, p, i, j, top_k):
    return float((p > p[i]).sum() < top_k)


def ndcg(p, z):
    discount = np.log2(2 + np.arange(len(z)))
    return (p[np.argsort(-z)] / discount).sum() / (np.sort(p)[::-1] / discount).sum()


def change_of_ndcg(z, p, i, j, _):
    swapped = z.copy()
    swapped[[i, j]] = z[[j, i]]
    return abs(ndcg(p, z) - ndcg(p, swapped))


def approx_ndcg(z, p, w, temperature, _):
    if len(np.unique(p)) < 2:
        return NOTHING
    place = 1 / 2 + expit(np.subtract.outer(z, z) / temperature).sum(0)
    gain = w * p
    ideal = (np.sort(gain)[::-1] / np.log2(2 + np.arange(len(z)))).sum()
    return w.mean() * (1 - (gain / np.log2(1 + place)).sum() / ideal), w.mean()


def adr_mse(z, p, w, temperature, _):
    if len(np.unique(p)) < 2:
        return NOTHING
    place = rankdata(-p)  # the mean place of those that tie
    smooth = np.ones(len(z))
    for i, j in itertools.permutations(range(len(z)), 2):
        smooth[i] += 0.5 if p[i] == p[j] else expit((z[j] - z[i]) / temperature)
    return (w * (place - smooth) ** 2 / np.log2(1 + place)).sum(), w.sum()


def topk_of(z, p, w, temperature, top_k, middle=0.0):
    first = np.array([(p > own).sum() < top_k for own in p], float)
    if first.all():
        return NOTHING
    student = expit((z - middle) / temperature)
    values = -first * np.log(student) - (1 - first) * np.log(1 - student)
    return temperature * (w * values).sum(), w.sum()


def dftopk(z, p, w, temperature, top_k):
    if len(z) <= top_k:
        return NOTHING
    # From the middle between the logits at the places k and k + 1.
    around = np.sort(z)[::-1][int(top_k) - 1 : int(top_k) + 1]
    return topk_of(z, p, w, temperature, top_k, around.mean())


RESTATED = {
    "bce": bce,
    "mse_logit": mse_logit,
    "mse_margin": mse_margin,
    "softmax": softmax,
    "user_softmax": user_softmax_by_hand,
    "listmle": listmle,
    "ranknet": functools.partial(over_pairs, equal_weight),
    "lambda": functools.partial(over_pairs, change_of_ndcg),
    "rank_distil": functools.partial(over_pairs, is_above_in_top_k),
    "approx_ndcg": approx_ndcg,
    "adr_mse": adr_mse,
    "topk": topk_of,
    "dftopk": dftopk,
}


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("name", ALL)
def test_totals_and_gradients_are_those_of_a_loop_over_requests(name, case):
    """So a loss adds up over requests, and sees neither padding nor the order of candidates."""
    expected, expected_gradient = np.zeros((2, SHAPE[-1])), np.zeros(SHAPE)
    for request, task in itertools.product(range(SHAPE[0]), range(SHAPE[-1])):
        known = case.weight[request, :, task] > 0
        z, *others = (array[request, known, task].astype(np.float64) for array in case[:3])

        def restated(z, others=others):
            return RESTATED[name](z, *others, *case[3:])

        expected[:, task] += restated(z)
        # Central differences, one logit at a time.
        steps = 1e-5 * np.eye(len(z))
        sides = [restated(z + step)[0] - restated(z - step)[0] for step in steps]
        expected_gradient[request, known, task] = np.array(sides) / 2e-5
    totals, gradient = compiled(name)(*case)
    np.testing.assert_allclose(totals, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-5)
    # Without anything to compare, exactly nothing.
    assert (gradient[case.weight == 0] == 0).all()
    empty = expected[1] == 0
    assert not np.any(np.asarray(totals)[:, empty])
    assert not gradient[..., empty].any()


def test_cold_approx_ndcg_is_one_minus_scikit_learns_ndcg():
    logits, probability, weight, *_ = random_case(15, known=1.0)
    (numerator, denominator), _ = compiled("approx_ndcg")(
        logits, probability, np.ones_like(weight), 1e-4
    )
    scores = [
        [ndcg_score([probability[r, :, t]], [logits[r, :, t]]) for t in range(SHAPE[-1])]
        for r in range(SHAPE[0])
    ]
    np.testing.assert_allclose(numerator, np.sum(1 - np.array(scores), axis=0), rtol=1e-4)
    np.testing.assert_array_equal(denominator, SHAPE[0])
    restated = ndcg(probability[0, :, 0], logits[0, :, 0])  # by which `lambda` is restated
    assert restated == pytest.approx(scores[0][0], rel=1e-6)


def test_adr_mse_by_hand():
    """A cold student that swaps two places, one that is right, and one that ties a tie."""
    swapped = of_one_list(losses.adr_mse, [2.0, 3.0, 1.0], [0.9, 0.5, 0.1], temperature=1e-3)
    assert swapped == (round(1 + 1 / np.log2(3), 4), 3.0)
    weighted = of_one_list(losses.adr_mse, [2.0, 3.0, 1.0], [0.9, 0.5, 0.1], [3.0, 1.0, 2.0])
    places = [1.0, 2.0, 3.0]
    smooth = [1 + expit(1) + expit(-1), 1 + expit(-1) + expit(-2), 1 + expit(1) + expit(2)]
    terms = np.square(np.subtract(places, smooth)) / np.log2([2.0, 3.0, 4.0])
    assert weighted == (round(float(np.dot([3.0, 1.0, 2.0], terms)), 4), 6.0)
    right = of_one_list(losses.adr_mse, [3.0, 2.0, 1.0], [0.9, 0.5, 0.1], temperature=1e-3)
    assert right == (0.0, 3.0)
    # The order of the two that the teacher ties does not matter.
    tied = of_one_list(losses.adr_mse, [9.0, 2.0, 7.0], [0.9, 0.1, 0.1], temperature=1e-3)
    assert tied == (0.0, 3.0)
    assert of_one_list(losses.adr_mse, [3.0], [0.5]) == NOTHING
    assert of_one_list(losses.adr_mse, [3.0, 1.0], [0.5, 0.5]) == NOTHING


def test_mse_margin_keeps_its_digits_far_from_zero():
    """The difference of two large sums would lose the margins of 0.01 between logits near 1000."""
    logits = np.array([[[1000.0], [1000.01], [1000.03]]], np.float32)
    totals, _ = compiled("mse_margin")(logits, np.full_like(logits, 0.5), np.ones_like(logits))
    margins = np.subtract.outer(*2 * [logits[0, :, 0].astype(np.float64)])
    np.testing.assert_allclose(totals[0], (margins**2).sum() / 2, rtol=1e-2)


def test_certain_teachers_and_tied_students_stay_finite():
    entries = jnp.full((1, 2, 1), 3.0), jnp.array([[[0.0], [1.0]]]), jnp.ones((1, 2, 1))
    for name in LOSSES:
        for temperature in (0.05, 1.0, 40.0):
            totals, gradient = compiled(name)(*entries, temperature, top_k=1.0)
            assert np.isfinite(totals).all()
            assert np.isfinite(gradient).all()
            if temperature == 1:
                assert gradient[0, 0] > 0 > gradient[0, 1], name


@pytest.mark.parametrize("lists", [1, 4])
def test_lists_taken_a_few_at_a_time_give_the_same(lists, monkeypatch):
    """One by one, and four of the six with two left over."""
    case = CASES[1]
    expected, gradient = compiled("ranknet")(*case)
    monkeypatch.setattr(losses, "_PAIRS_AT_ONCE", lists * SHAPE[1] ** 2)
    actual, other_gradient = compiled.__wrapped__("ranknet")(*case)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_allclose(other_gradient, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_stacked_runs_have_the_losses_of_single_runs(name):
    logits, probability, weight, *_ = random_case(11)
    runs = np.stack([logits, 2 * logits, logits - 1])
    numbers = LossNumbers(jnp.array([1.0, 2.0, 0.5]), jnp.array([1.0, 2.0, 3.0]))
    together = jax.jit(jax.vmap(lambda z, numbers: ALL[name](z, probability, weight, numbers)))(
        runs, numbers
    )
    for index, own in enumerate(runs):
        by_itself, _ = compiled(name)(
            own, probability, weight, numbers.temperature[index], numbers.top_k[index]
        )
        np.testing.assert_allclose([total[index] for total in together], by_itself, rtol=1e-5)


def test_numbers_have_the_defaults_of_the_config():
    assert list(USER_LOSSES) == ["bce", "softmax", "bce+softmax"]
    config = defaults.get_config()
    of_config = LossNumbers(config.distill.temperature, config.distill.top_k)
    assert of_config == DEFAULT_NUMBERS


def test_bce_takes_a_probability_of_zero_as_it_is():
    """Clipped at 1e-6, it would take 0.001 off."""
    assert of_one_list(losses.bce, [1000.0], [0.0]) == (1000.0, 1.0)
