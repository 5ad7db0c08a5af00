"""Distillation losses: distances between the student's logits and the teacher's probabilities.

Each loss is a pure function

    loss(logits, probability, weight, numbers) -> (numerator, denominator)

    logits         z [requests, candidates, tasks], any real number
    probability    p [requests, candidates, tasks], the teacher's, in [0, 1]
    weight         w [requests, candidates, tasks], ≥ 0
    numbers        `LossNumbers`, traced: the formulas name those that a loss uses
    numerator      [tasks], a weighted sum
    denominator    [tasks], the sum of its weights

The last two are separate because the step divides by the denominator of all devices. Within
a task and a request, a candidate is *known* if its weight is greater than 0. The logit of p is that
of p clipped to [1e-6, 1 − 1e-6].

    bce, mse_logit     compare p with σ(z), a candidate by itself
    mse_margin         compares the margins between each two candidates of a request
    softmax            compares the distributions of p and z over a request
    listmle            the likelihood of the teacher's order of a request under z
    ranknet, lambda    compare the order of each two candidates of a request
    rank_distil        the same, if one of the two is among the first k
    approx_ndcg        compares the whole order of a request, by a smooth NDCG
    adr_mse            compares the places of a request with smooth ones
    topk, dftopk       compare the sets of the first k of a request

The first three need probabilities. For the others positions are enough, which `teacher_signal`
turns into pseudo-probabilities. All except the first two compare the candidates of a request. A
request without candidates to compare adds nothing to numerator or denominator.

User labels take the losses of `USER_LOSSES`, which have the same form.

An entry of weight 0 may contain any value, including NaN. It contributes exactly nothing to the
loss and to its gradient, so padding in a batch changes nothing.

To add a loss, write such a function and add a `Loss` with it to `LOSSES`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import rax
from jaxtyping import Array, Bool, Float

Number = float | Float[Array, ""]


class LossNumbers(NamedTuple):
    """The numbers of `config.distill` that losses take: traced, so a sweep compiles once."""

    temperature: Number = 1.0  # τ > 0
    top_k: Number = 10.0  # k ≥ 1, a whole number
    own: Mapping[str, Number] = {}  # further numbers by name, see `Loss.numbers`


Logits = Float[Array, "R N T"]
Totals = tuple[Float[Array, "T"], Float[Array, "T"]]
LossFunction = Callable[[Logits, Logits, Logits, LossNumbers], Totals]


class Loss(NamedTuple):
    """A distillation loss.

    Attributes:
      function: the loss; the module's docstring has its contract.
      needs_probabilities: whether it uses p as probabilities, not only as an order.
      numbers: the defaults of its further numbers by name, which `function` finds in
        `LossNumbers.own`. `config.distill.numbers` overrides them, and a sweep may vary that key.
    """

    function: LossFunction
    needs_probabilities: bool = False
    numbers: Mapping[str, float] = {}


# Types of the arrays of one request and one task.
_List = Float[Array, "N"]
_Known = Bool[Array, "N"]
_Pairs = Float[Array, "N*N"]
_Sums = tuple[Float[Array, ""], Float[Array, ""]]

DEFAULT_NUMBERS = LossNumbers()

# Keeps the logit of a logged probability of exactly 0 or 1 finite.
_PROBABILITY_FLOOR = 1e-6
# The pairs that a pairwise loss holds at a time. More of them did not save time on a CPU.
_PAIRS_AT_ONCE = 2**18


def of_one_list(
    loss: LossFunction,
    logits: Sequence[float],
    probability: Sequence[float],
    weight: Sequence[float] | None = None,
    **numbers: Any,
) -> tuple[float, ...]:
    """Return numerator and denominator for one request and one task, to 4 places.

    Weights are 1 by default. A candidate of weight 0 and of values NaN follows the others.
    """
    weight = weight or [1.0] * len(logits)

    def array_of(values: Sequence[float], last: float) -> Logits:
        return jnp.array([*values, last])[None, :, None]

    totals = loss(
        array_of(logits, jnp.nan),
        array_of(probability, jnp.nan),
        array_of(weight, 0.0),
        LossNumbers(**numbers),
    )
    return tuple(round(float(total[0]), 4) for total in totals)


def weighted_totals(values: Logits, weight: Logits) -> Totals:
    """Return the weighted sum of `values` per task, and the sum of weights per task."""
    return jnp.sum(weight * values, axis=(0, 1)), jnp.sum(weight, axis=(0, 1))


def _only_known(
    logits: Logits, probability: Logits, weight: Logits
) -> tuple[Bool[Array, "R N T"], Logits, Logits]:
    """Return the mask of known entries, and both arrays with safe values in all others."""
    # A product with 0 does not remove a NaN, so values that must not count are replaced before use.
    known = weight > 0
    return known, jnp.where(known, logits, 0.0), jnp.where(known, probability, 0.5)


def _teacher_logit(probability: Logits) -> Logits:
    """Return the logit of p, clipped to [1e-6, 1 − 1e-6]."""
    clipped = jnp.clip(probability, _PROBABILITY_FLOOR, 1 - _PROBABILITY_FLOOR)
    return jax.scipy.special.logit(clipped)


# With its slope given, a step computes one exponential for an entry, not four.
@jax.custom_jvp
def _cross_entropy(logits: Logits, probability: Logits) -> Logits:
    """Return -p log σ(z) - (1 - p) log σ(-z) = log(1 + exp(z)) - p z."""
    rest = jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return jnp.maximum(logits, 0.0) + rest - probability * logits


_cross_entropy.defjvps(
    lambda change, _, logits, probability: (jax.nn.sigmoid(logits) - probability) * change,
    lambda change, _, logits, probability: -logits * change,
)


def bce(
    logits: Logits, probability: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """Binary cross entropy against soft labels, in nats.

    With temperature τ both sides are softened and the loss is scaled so that its gradient keeps its
    size (Hinton, Vinyals and Dean, 2015, section 2.1):

        τ² · BCE(z / τ, σ(logit(p) / τ)),   BCE(z, p) = -p log σ(z) - (1 - p) log σ(-z)

    At τ = 1, p is not clipped.

    Example:
      At z = 0 every label costs log 2:

      >>> of_one_list(bce, [0.0], [0.3], [2.0])
      (1.3863, 2.0)
    """
    temperature = numbers.temperature
    _, logits, probability = _only_known(logits, probability, weight)
    softened = jax.nn.sigmoid(_teacher_logit(probability) / temperature)
    target = jnp.where(temperature == 1.0, probability, softened)
    values = temperature**2 * _cross_entropy(logits / temperature, target)
    return weighted_totals(values, weight)


def mse_logit(
    logits: Logits, probability: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """Squared difference of logits.

        (z − logit(p))²

    Its gradient is 8 times the limit of that of `bce` as τ grows (Hinton, Vinyals and Dean, 2015,
    section 2.1, show the same for a softmax). A temperature would change nothing: it cancels in
    τ² (z / τ − logit(p) / τ)². An error at a small p weighs as much as one at p = 1/2.

    Example:
      A probability of 1/2 has the logit 0:

      >>> of_one_list(mse_logit, [3.0], [0.5], [2.0])
      (18.0, 2.0)
    """
    _, logits, probability = _only_known(logits, probability, weight)
    return weighted_totals(jnp.square(logits - _teacher_logit(probability)), weight)


def mse_margin(
    logits: Logits, probability: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """Squared difference of the margins of each pair of candidates of a request (MarginMSE).

    Hofstätter et al. (2020, arXiv 2010.02666), over all pairs in place of a relevant and another
    document. With l = logit(p) and d = z − l, over the pairs of known candidates of a request

        numerator = Σ_{i<j} w_i w_j ((z_i − z_j) − (l_i − l_j))²,   denominator = Σ_{i<j} w_i w_j

    With weights of 1 the denominator is the number of pairs. No pair is held: with the mean
    m = Σ w d / Σ w,

        numerator = Σ w · Σ w (d − m)²,   denominator = Σ_i w_i (Σ w − w_i) / 2

    Unlike `mse_logit`, it does not change if a number is added to all logits of a request. A
    temperature would change nothing, as there.

    Example:
      The teacher sees a margin of 0 where the student has one of 3:

      >>> of_one_list(mse_margin, [4.0, 1.0], [0.5, 0.5], [2.0, 1.0])
      (18.0, 2.0)
    """
    known, logits, probability = _only_known(logits, probability, weight)
    comparable = jnp.sum(known, axis=1) > 1  # [R, T]
    total = jnp.sum(weight, axis=1, keepdims=True)
    difference = logits - _teacher_logit(probability)
    mean = jnp.sum(weight * difference, axis=1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    numerator = jnp.sum(total * weight * jnp.square(difference - mean), axis=1)
    denominator = jnp.sum(weight * (total - weight), axis=1) / 2
    return (
        jnp.sum(jnp.where(comparable, numerator, 0.0), axis=0),
        jnp.sum(jnp.where(comparable, denominator, 0.0), axis=0),
    )


def softmax(
    logits: Logits, probability: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """Listwise cross entropy between distributions over the candidates of a request, in nats.

    ListNet's loss with top one probabilities (Cao et al., ICML 2007, section 4), softened as in
    Hinton, Vinyals and Dean (2015, section 2.1). With both softmaxes over the known candidates j of
    the request,

        q = softmax_j(logit(p_j) / τ),   s = softmax_j(z_j / τ),

        numerator = τ² Σ_requests Σ_i −w_i q_i log s_i,   denominator = Σ_requests Σ_i w_i q_i

    over the requests with at least two known candidates. With weights of 1 the denominator is their
    number, so the loss is a mean over requests. It does not change if a number is added to all
    logits of a request. Its minimum is the entropy of q times τ², not 0.

    Example:
      Two candidates with equal student logits cost log 2 for any teacher probabilities:

      >>> of_one_list(softmax, [1.0, 1.0], [0.9, 0.1])
      (0.6931, 1.0)
    """
    temperature = numbers.temperature
    known, logits, probability = _only_known(logits, probability, weight)
    teacher = jax.nn.softmax(_teacher_logit(probability) / temperature, axis=1, where=known)
    numerator, denominator = _listwise(logits / temperature, teacher, weight, known)
    return temperature**2 * numerator, denominator


def user_softmax(
    logits: Logits, label: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """Listwise cross entropy of the positive user labels of a request, in nats.

    ListNet's loss with top one probabilities (Cao et al., ICML 2007, section 4), with the labels y
    in place of a distribution. With the softmax over the labeled candidates j of the request,
    those of weight w > 0,

        numerator = Σ_requests Σ_i −w_i y_i log softmax_j(z_j)_i,
        denominator = Σ_requests Σ_i w_i y_i

    over the requests with at least two labeled candidates. With weights of 1 the loss is a mean
    over positives. The weight of a negative does not matter, unless it is 0. A request without
    positives adds exactly nothing.

    The loss does not change if a constant is added to all logits of a request, so σ(z) is not
    a probability. Adding `bce` restores that scale; Bai et al. (CIKM 2023, arXiv 2211.01494)
    discuss such sums.

    Example:
      Two labeled candidates with equal logits: the positive one costs its weight times log 2.

      >>> of_one_list(user_softmax, [1.0, 1.0], [1.0, 0.0], [2.0, 1.0])
      (1.3863, 2.0)
    """
    known, logits, label = _only_known(logits, label, weight)
    return _listwise(logits, jnp.where(known, label, 0.0), weight, known)


def _listwise(
    logits: Logits, target: Logits, weight: Logits, known: Bool[Array, "R N T"]
) -> Totals:
    """Sum −w · target · log softmax(z), and w · target, over requests with two known."""
    comparable = jnp.sum(known, axis=1) > 1  # [R, T]

    def of_requests(array: Array) -> Array:
        return jnp.swapaxes(array, 1, 2)  # rax looks at the last axis

    values = rax.softmax_loss(
        of_requests(logits),
        of_requests(target),
        where=of_requests(known),
        weights=of_requests(weight),
        reduce_fn=None,
    )
    total = jnp.sum(weight * target, axis=1)
    return (
        jnp.sum(jnp.where(comparable, values, 0.0), axis=0),
        jnp.sum(jnp.where(comparable, total, 0.0), axis=0),
    )


def listmle(
    logits: Logits, probability: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """Likelihood of the teacher's order, place by place, in nats (ListMLE).

    Xia et al. (ICML 2008, section 4.1): drawn one by one with chances in proportion to exp(z / τ),
    the candidates of a request come in the teacher's order with some likelihood, and the loss is
    minus its logarithm. Over the known candidates i of a request below which there is another,

        numerator = Σ w_i · τ log(1 + Σ_{j: p_j < p_i} exp((z_j − z_i) / τ)),   denominator = Σ w_i

    So with weights of 1 the loss is a mean over places, where the paper has the sum of a list.
    Candidates of equal p are not compared, as in `ranknet`: each of them leads the list of those
    below it. Without ties this is the paper's loss. The factor τ keeps the gradient of a place
    within [−1, 1].

    Example:
      A student that ties three candidates draws the first one with a chance of 1/3, and the next of
      the two that are left with 1/2: log 3 + log 2.

      >>> of_one_list(listmle, [1.0, 1.0, 1.0], [0.1, 0.9, 0.5])
      (1.7918, 2.0)
    """
    temperature = numbers.temperature
    known, logits, probability = _only_known(logits, probability, weight)
    # The lowest first; unknown candidates come after all others, so that no sum includes them.
    order = jnp.argsort(jnp.where(known, probability, jnp.inf), axis=1)
    probability = jnp.take_along_axis(probability, order, axis=1)
    scaled = jnp.take_along_axis(logits / temperature, order, axis=1)
    weight = jnp.take_along_axis(weight, order, axis=1)
    place = jnp.arange(probability.shape[1])[None, :, None]
    opens_tie = jnp.diff(probability, axis=1, prepend=-1.0) != 0
    below = jax.lax.cummax(jnp.where(opens_tie, place, 0), axis=1)
    sums = jax.lax.cumlogsumexp(scaled, axis=1)
    lower = jnp.take_along_axis(sums, jnp.maximum(below - 1, 0), axis=1)
    values = temperature * jax.nn.softplus(lower - scaled)
    return weighted_totals(values, jnp.where(below > 0, weight, 0.0))


def ranknet(
    logits: Logits, probability: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """Logistic loss of the pairs that the teacher orders, in nats (RankNet).

    Burges et al. (ICML 2005), with certain targets: over the pairs of known candidates of a request
    with p_i > p_j,

        numerator = Σ w_i w_j · τ log(1 + exp(−(z_i − z_j) / τ)),   denominator = Σ w_i w_j

    With weights of 1 the denominator is the number of such pairs, so the loss is a mean over pairs,
    and a request with more of them counts more. Candidates of equal p are no pair. 1 / τ is
    RankNet's slope σ; the factor τ keeps the gradient of a pair within [−1, 1]. (The square that
    `bce` has would let it grow, since here nothing softens the target.) Towards τ = 0 the loss of a
    pair is max(0, z_j − z_i).

    Time is proportional to all R · N · N · T pairs. Memory is not: it is about six float32 arrays
    of the pairs that are held at a time, at most 2^18 unless a single list has more.

    Example:
      The teacher ties one of the three pairs. The logits of the other two differ by one; one of
      these pairs is in the wrong order: log(1 + e⁻¹) + log(1 + e).

      >>> of_one_list(ranknet, [1.0, 0.0, 2.0], [0.9, 0.2, 0.2])
      (1.6265, 2.0)
    """

    def equal_weights(logits: _List, probability: _List, known: _Known) -> _Pairs:
        return jnp.ones(len(logits) ** 2)

    return _pairwise(logits, probability, weight, numbers, equal_weights)


def lambda_rank(
    logits: Logits, probability: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """RankNet's pairs, weighted by the change in NDCG if the two are swapped (LambdaRank).

    Burges, Ragno and Le (NIPS 2006), as a loss in the frame of Wang et al. (LambdaLoss, CIKM 2018):
    over the pairs of known candidates of a request with p_i > p_j,

        numerator = Σ w_i w_j |ΔNDCG_ij| · τ log(1 + exp(−(z_i − z_j) / τ)),
        denominator = Σ w_i w_j |ΔNDCG_ij|,

        |ΔNDCG_ij| = (p_i − p_j) · |1 / log2(1 + r_i) − 1 / log2(1 + r_j)| / ideal DCG

    with r the place, from 1, that z gives a candidate among the known ones of its request, and the
    ideal DCG = Σ p_i / log2(1 + place of p_i). So the gain of a candidate is p itself: DCG is the
    expected number of actions if the user examines places in proportion to the discount. The loss
    is a mean over pairs that gives higher weights to pairs that matter at the top. The weights, and
    so the denominator, are constants: no gradient goes through them.

    Candidates of equal p are no pair; candidates of equal z are placed in their order in the batch.
    Temperature and memory are as in `ranknet`.

    Example:
      The student puts last what the teacher puts first. Their ideal DCG is 0.5 + 0.25 / log2(3),
      and swapping the two changes DCG by 0.25 · (1 − 1 / log2(3)), so |ΔNDCG| = 0.1403. The
      numerator is that times log(1 + e):

      >>> of_one_list(lambda_rank, [0.0, 1.0], [0.5, 0.25])
      (0.1842, 0.1403)
    """

    def changes_of_ndcg(logits: _List, probability: _List, known: _Known) -> _Pairs:
        weights = rax.dcg_lambdaweight(
            logits, probability, where=known, normalize=True, gain_fn=lambda gain: gain
        )
        # rax has them times the length of the list, padding included.
        return weights / logits.shape[0]

    return _pairwise(logits, probability, weight, numbers, changes_of_ndcg)


def rank_distil(
    logits: Logits, probability: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """RankNet's pairs with one among the teacher's first k, in nats (RankDistil).

    Reddi et al. (AISTATS 2021) keep the order of the teacher's first k, and these above all others.
    The order of the others does not affect the shown list. Here that is `ranknet` over the pairs of
    known candidates of a request in which the higher one is among the first k, as in `topk`:

        numerator = Σ w_i w_j · τ log(1 + exp(−(z_i − z_j) / τ)),   denominator = Σ w_i w_j,
        over p_i > p_j, y_i = 1

    The paper also has losses with a margin or of a likelihood of orders, and it draws the others
    from a whole corpus; these are not implemented. If the batch holds at most k candidates of a
    request, the loss is `ranknet`. Temperature and memory are as there.

    Example:
      The logit of the first is one above that of the second and one below that of the third. The
      latter two are no pair: log(1 + e⁻¹) + log(1 + e).

      >>> of_one_list(rank_distil, [1.0, 0.0, 2.0], [0.9, 0.3, 0.2], top_k=1.0)
      (1.6265, 2.0)
    """

    def is_first_among_k(logits: _List, probability: _List, known: _Known) -> _Pairs:
        first, _ = _first_k(probability[None, :, None], known[None, :, None], numbers.top_k)
        return jnp.repeat(first.ravel(), len(logits)).astype(logits.dtype)

    return _pairwise(logits, probability, weight, numbers, is_first_among_k)


def approx_ndcg(
    logits: Logits, probability: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """Gap between 1 and a smooth NDCG of the student's order (ApproxNDCG).

    Qin, Liu and Li (Information Retrieval 13, 2010, section 4): with a smooth place of each known
    candidate of a request,

        r_i = 1 + Σ_{j ≠ i} σ((z_j − z_i) / τ),   DCG = Σ_i w_i p_i / log2(1 + r_i),

        numerator = Σ_requests v · (1 − DCG / ideal DCG),   denominator = Σ_requests v

    where the ideal DCG has in place of r_i the place, from 1, of w_i p_i among those of the
    request, and v is the mean weight of its known candidates. The sums run over the requests in
    which the teacher gives two known candidates different p. With weights of 1 the denominator is
    their number, so the loss is a mean over requests, in [0, 1). The gain of a candidate is p
    itself, as in `lambda_rank`; the paper has 2^grade − 1. As τ tends to 0 the places become the
    true ones, and the gradient vanishes except near ties; it is not bounded by 1. Memory: see
    `ranknet`.

    Example:
      The student ties two candidates, so both have place 1.5: DCG = 0.75 / log2(2.5) = 0.5674, of
      an ideal 0.5 + 0.25 / log2(3) = 0.6577.

      >>> of_one_list(approx_ndcg, [1.0, 1.0], [0.5, 0.25])
      (0.1374, 1.0)
    """

    def loss_of_list(logits: _List, probability: _List, known: _Known, weight: _List) -> _Sums:
        ndcg = rax.ndcg_metric(
            logits / numbers.temperature,
            probability,
            where=known,
            weights=weight,
            gain_fn=lambda gain: gain,
            rank_fn=rax.utils.approx_ranks,
            reduce_fn=None,
        )
        lowest = jnp.min(probability, where=known, initial=1.0)
        comparable = jnp.max(probability, where=known, initial=0.0) > lowest
        mean_weight = jnp.sum(weight) / jnp.maximum(jnp.sum(known), 1)
        request_weight = jnp.where(comparable, mean_weight, 0.0)
        return request_weight * (1 - ndcg), request_weight

    return _list_by_list(loss_of_list, logits, probability, weight)


def adr_mse(
    logits: Logits, probability: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """Squared distance between the teacher's places and smooth ones, discounted (ADR-MSE).

    The approximate discounted rank MSE of Schlatt et al. (Rank-DistiLLM, ECIR 2025). With the place
    r_i that p gives a known candidate of a request, from 1, and its smooth place s_i under z,

        s_i = 1 + Σ_{j ≠ i} σ((z_j − z_i) / τ),

        numerator = Σ w_i (r_i − s_i)² / log2(1 + r_i),   denominator = Σ w_i

    The sums run over the requests in which the teacher gives two known candidates different p. So
    with weights of 1 the loss is a mean over candidates. It uses the order of p only.

    Candidates of equal p are not compared: r_i is the mean of their places, and in s_i each of the
    others counts 1/2. The paper has no ties, and without them this is its loss. This matters for a
    log of stages: there, the student may order the candidates of a stage as it likes.

    Places are among the candidates that the batch holds. The loss of n candidates can be as large
    as n², and its gradient is not bounded by 1. As τ tends to 0 the gradient vanishes except near
    ties. Memory: see `ranknet`.

    Example:
      The student ties two candidates, so both have the smooth place 1.5, half a place off:
      0.25 / log2(2) + 0.25 / log2(3).

      >>> of_one_list(adr_mse, [1.0, 1.0], [0.5, 0.25])
      (0.4077, 2.0)
    """

    def loss_of_list(logits: _List, probability: _List, known: _Known, weight: _List) -> _Sums:
        # Entry [i, j] of a pair is about the candidate i, and another one j.
        is_higher = (probability[None, :] > probability[:, None]) & known
        is_lower = (probability[None, :] < probability[:, None]) & known
        passes = jax.nn.sigmoid((logits[None, :] - logits[:, None]) / numbers.temperature)
        # Those of equal p count 1/2 in both places, which cancels.
        excess = jnp.where(is_higher, passes - 1, jnp.where(is_lower, passes, 0.0))
        distance = jnp.sum(excess, axis=1)

        num_higher = jnp.sum(is_higher, axis=1)
        num_equal = jnp.sum(known) - num_higher - jnp.sum(is_lower, axis=1)  # itself included
        place = 1 + num_higher + (num_equal - 1) / 2
        comparable = jnp.any(is_higher & known[:, None])
        weight = jnp.where(comparable & known, weight, 0.0)
        discount = 1 / jnp.log2(1 + jnp.where(known, place, 1.0))
        return jnp.sum(weight * discount * jnp.square(distance)), jnp.sum(weight)

    return _list_by_list(loss_of_list, logits, probability, weight)


def _pairwise(
    logits: Logits,
    probability: Logits,
    weight: Logits,
    numbers: LossNumbers,
    pair_weights: Callable[[_List, _List, _Known], _Pairs],
) -> Totals:
    """Return the logistic loss of pairs with p_i > p_j, weighted by w_i · w_j · `pair_weights`.

    `pair_weights` maps one list of logits, its probabilities and its mask of known ones to one
    weight per pair, in the order of `rax.utils.compute_pairs`. The weights of other pairs do not
    matter.
    """
    temperature = numbers.temperature

    def loss_of_list(logits: _List, probability: _List, known: _Known, weight: _List) -> _Sums:
        fixed = jax.lax.stop_gradient(logits)
        is_ordered = rax.utils.compute_pairs(probability, jnp.greater)
        weights = rax.utils.compute_pairs(weight, jnp.multiply)
        weights = weights * pair_weights(fixed, probability, known)
        weights = jnp.where(is_ordered, weights, 0.0)
        values = rax.pairwise_logistic_loss(
            logits / temperature, probability, where=known, reduce_fn=None
        )
        return temperature * jnp.sum(weights * values), jnp.sum(weights)

    return _list_by_list(loss_of_list, logits, probability, weight)


def _list_by_list(
    loss_of_list: Callable[[_List, _List, _Known, _List], _Sums],
    logits: Logits,
    probability: Logits,
    weight: Logits,
) -> Totals:
    """Return the sums of `loss_of_list` over requests, with few pairs held at a time.

    `loss_of_list` maps the logits of a request and task, their probabilities, the mask of known
    ones and their weights to a numerator and a denominator. No gradient goes through the
    denominator.
    """
    known, logits, probability = _only_known(logits, probability, weight)
    requests, candidates, tasks = logits.shape
    with_gradient = jax.value_and_grad(loss_of_list, has_aux=True)

    def lists(array: Array) -> Array:
        return jnp.swapaxes(array, 1, 2).reshape(requests * tasks, candidates)

    # Process some lists at a time, each with its gradient, so that pairs are freed early.
    fixed = jax.lax.stop_gradient(logits)
    (numerator, denominator), gradient = jax.lax.map(
        lambda arrays: with_gradient(*arrays),
        (lists(fixed), lists(probability), lists(known), lists(weight)),
        batch_size=min(requests * tasks, max(1, _PAIRS_AT_ONCE // candidates**2)),
    )
    gradient = jnp.swapaxes(gradient.reshape(requests, tasks, candidates), 1, 2)
    # This sum is 0 and has the gradient computed above.
    slope = jnp.sum(gradient * (logits - fixed), axis=(0, 1))
    return (
        jnp.sum(numerator.reshape(requests, tasks), axis=0) + slope,
        jnp.sum(denominator.reshape(requests, tasks), axis=0),
    )


def topk(
    logits: Logits, probability: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """Binary cross entropy of being among the teacher's first k of the request, in nats.

        numerator = Σ w · τ BCE(z / τ, y),   denominator = Σ w,   y = [fewer than k have a larger p]

    with BCE as in `bce`, and p compared among the known candidates of the request. The sums run
    over the known candidates of those requests in which y is 0 for at least one. A request in which
    all are among the first k has nothing to compare. If p ties at place k, all that tie are among
    the first. The factor τ keeps the gradient within [−1, 1], as in `ranknet`.

    The first k are those of the candidates that the batch holds. These are a sample of the request,
    so among all of its candidates they reach further down than place k.

    Example:
      At z = 0 each known candidate costs log 2. A request with a single one does not count:

      >>> of_one_list(topk, [0.0, 0.0], [0.2, 0.9], top_k=1.0)
      (1.3863, 2.0)
      >>> of_one_list(topk, [0.0], [0.9], top_k=1.0)
      (0.0, 0.0)
    """
    known, logits, probability = _only_known(logits, probability, weight)
    first, comparable = _first_k(probability, known, numbers.top_k)
    return _membership(logits, first, jnp.where(comparable, weight, 0.0), numbers.temperature)


def dftopk(
    logits: Logits, probability: Logits, weight: Logits, numbers: LossNumbers = DEFAULT_NUMBERS
) -> Totals:
    """`topk` with one threshold per request, in nats (DFTopK).

    The differentiable top k of Zhu et al. (2025, arXiv 2510.11472): with z_(k) the k-th largest
    logit among the known candidates of the request, a candidate belongs to the first k with
    probability

        σ((z − t) / τ),   t = (z_(k) + z_(k+1)) / 2,

        numerator = Σ w · τ BCE((z − t) / τ, y),   denominator = Σ w

    with y, k and the sums as in `topk`. The gradient flows through t: what pushes a candidate up
    pushes the two at the threshold down, so gradients of a request sum to 0, and a number added to
    all of its logits changes nothing. The slope of a single logit therefore is not bounded by 1.

    The paper's operator is this σ((z − t) / τ). Three things are not the paper's: all that tie at
    place k of the teacher are among the first; the factor τ, as in `topk`; and there is one ranker
    to train, so there is no term for a cascade of two and no learned weights between its terms.

    Example:
      The first k = 1 of three are right: the logits minus the threshold 3 are 1, −1 and −3. The
      cost is 2 log(1 + e⁻¹) + log(1 + e⁻³):

      >>> of_one_list(dftopk, [4.0, 2.0, 0.0], [0.9, 0.2, 0.1], top_k=1.0)
      (0.6751, 3.0)
    """
    known, logits, probability = _only_known(logits, probability, weight)
    first, comparable = _first_k(probability, known, numbers.top_k)
    descending = jnp.sort(jnp.where(known, logits, -jnp.inf), axis=1, descending=True)
    middle = (_at_place(descending, numbers.top_k) + _at_place(descending, numbers.top_k + 1)) / 2
    # A request with a candidate behind the first k has a logit at place k + 1.
    threshold = jnp.where(comparable, middle, 0.0)
    weight = jnp.where(comparable, weight, 0.0)
    return _membership(logits - threshold, first, weight, numbers.temperature)


def _membership(
    logits: Logits, first: Bool[Array, "R N T"], weight: Logits, temperature: Number
) -> Totals:
    """Return the cross entropy of being among the `first`; its slope stays within [−1, 1]."""
    values = temperature * _cross_entropy(logits / temperature, first.astype(logits.dtype))
    return weighted_totals(values, weight)


def _first_k(
    probability: Logits, known: Bool[Array, "R N T"], top_k: Number
) -> tuple[Bool[Array, "R N T"], Bool[Array, "R 1 T"]]:
    """Return masks: the teacher's first k, and requests with a known candidate outside them."""
    descending = jnp.sort(jnp.where(known, probability, -jnp.inf), axis=1, descending=True)
    first = probability >= _at_place(descending, top_k)
    return first, jnp.any(known & ~first, axis=1, keepdims=True)


def _at_place(descending: Logits, place: Number) -> Float[Array, "R 1 T"]:
    """Return the value at a place, from 1; −∞ if there are fewer known candidates."""
    index = jnp.asarray(place).astype(jnp.int32) - 1
    return jnp.take(descending, index, axis=1, mode="fill", fill_value=-jnp.inf)[:, None]


LOSSES: dict[str, Loss] = {
    "bce": Loss(bce, needs_probabilities=True),
    "mse_logit": Loss(mse_logit, needs_probabilities=True),
    "mse_margin": Loss(mse_margin, needs_probabilities=True),
    "softmax": Loss(softmax),
    "listmle": Loss(listmle),
    "ranknet": Loss(ranknet),
    "lambda": Loss(lambda_rank),
    "rank_distil": Loss(rank_distil),
    "approx_ndcg": Loss(approx_ndcg),
    "adr_mse": Loss(adr_mse),
    "topk": Loss(topk),
    "dftopk": Loss(dftopk),
}
"""The distillation losses by name."""

USER_LOSSES: dict[str, dict[str, LossFunction]] = {
    "bce": {"bce": bce},
    "softmax": {"softmax": user_softmax},
    "bce+softmax": {"bce": bce, "softmax": user_softmax},
}
"""The terms of the loss on user labels, by `train.user_loss`: they are summed, each a mean."""
