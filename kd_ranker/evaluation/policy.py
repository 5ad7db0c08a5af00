"""The number of candidates that the student passes, chosen per request.

A policy reads the student's sorted scores of a request and chooses k. A request passes few
candidates where the student is sure, and many elsewhere. Policies are fitted on validation
requests, so that all keep the same share of the final value there, and measured on test requests.

Axes: `R` requests, `K` values of k, increasing; the last is all that was retrieved.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float64, Int

from kd_ranker.evaluation.metrics import HINDSIGHT, Sums

Choice = Int[np.ndarray, "R"]
"""The place in `ks` of each request's k."""


class Curves(NamedTuple):
    """The value captured at each k by one student, per request.

    Attributes:
      ks: [K], the values of k to choose among.
      score: [R, K], the student's value of its k-th candidate, or of its last one.
      captured: [R, K], the teacher's value of the items shown if k pass; it does not decrease.
      candidates: [R], how many were retrieved.
    """

    ks: Int[np.ndarray, "K"]
    score: Float[np.ndarray, "R K"]
    captured: Float[np.ndarray, "R K"]
    candidates: Float[np.ndarray, "R"]

    def first(self, requests: int) -> "Curves":
        """The curves of the first requests."""
        return Curves(self.ks, *(of[:requests] for of in self[1:]))

    @property
    def lost(self) -> Float64[np.ndarray, "R K"]:
        """The value lost at each k, against passing all, over the mean value of a request."""
        total = self.captured[:, -1:].astype(np.float64)
        return np.maximum(total - self.captured, 0) / total.mean()

    @property
    def scored(self) -> Float64[np.ndarray, "R K"]:
        """The candidates that the teacher scores at each k: all of a request with fewer."""
        return np.minimum(self.ks, self.candidates[:, None]).astype(np.float64)

    def kept(self, choice: Choice) -> float:
        """The share of the value that a choice keeps: a ratio of sums over requests."""
        return 1 - float(self.lost[np.arange(len(choice)), choice].mean())


Policy = Callable[[Float[np.ndarray, "R K"]], Choice]
"""From the scores of requests, as in `Curves`, to a k for each."""


def fit_uniform(curves: Curves, target: float) -> Policy:
    """The same k for all: the smallest that keeps the target."""
    enough = 1 - curves.lost.mean(axis=0) >= target
    place = int(enough.argmax())
    return lambda score: np.full(len(score), place)


def fit_threshold(curves: Curves, target: float) -> Policy:
    """Pass what the student values at least at a threshold, the largest that keeps the target."""

    def at(threshold: float) -> Policy:
        return lambda score: np.maximum((score >= threshold).sum(axis=1) - 1, 0)

    known = np.unique(curves.score)
    place = _last_true(
        len(known), lambda place: curves.kept(at(known[place])(curves.score)) >= target
    )
    return at(known[place])


def fit_learned(curves: Curves, target: float) -> Policy:
    """Choose k to minimize k + μ · the expected value lost, as a network predicts it.

    The network is fitted by Poisson regression, so its predictions are right in the mean over the
    requests that it is fitted to. The price μ of lost value is about the smallest that keeps the
    target, by out-of-fold predictions. A price for a budget over all requests: Jiang et al.,
    "DCAF", 2020, arXiv:2006.09684. Of more than 20,000 requests, the first 20,000 count.
    """
    curves = curves.first(_MOST_REQUESTS)
    features, scale = _features(curves.score)
    fold = np.random.default_rng(0).permutation(len(features)) % _FOLDS
    # The last network learns from all requests.
    weights = np.stack([*(fold != of for of in range(_FOLDS)), fold >= 0]).astype(np.float32)
    networks = _fit_networks(features, curves.lost.astype(np.float32), weights)
    out_of_fold = jax.device_get(_predict_each(networks, features))[fold, np.arange(len(features))]
    price = _least_price(curves, out_of_fold, curves.ks, target)
    whole = jax.tree.map(lambda leaf: leaf[-1], networks)

    def choose(score: Float[np.ndarray, "R K"]) -> Choice:
        found, _ = _features(score, scale)
        return _cheapest(curves.ks, np.asarray(_predict(whole, found)), price)

    return choose


def hindsight(curves: Curves, target: float) -> Choice:
    """The fewest candidates that keep the target, if the value lost at each k is known.

    It is the best choice among those that a price of lost value can give: no choice that keeps as
    much value passes fewer.
    """
    price = _least_price(curves, curves.lost, curves.scored, target)
    return _cheapest(curves.scored, curves.lost, price)


POLICIES: Mapping[str, Callable[[Curves, float], Policy]] = {
    "uniform": fit_uniform,
    "threshold": fit_threshold,
    "learned": fit_learned,
}
"""The ways to choose k, by `config.funnel.policies`."""

# The curves of which the values at the chosen k are summed.
_CHOSEN = ("scored", "value_captured", "true_value_captured", "covered_user_value")


def named(policies: Sequence[str]) -> tuple[str, ...]:
    """The policies to measure, in the order of `POLICIES`, and the bound if there are any."""
    return (*(name for name in POLICIES if name in policies), HINDSIGHT) if policies else ()


def sums(
    fitted: Sums, tested: Sums, ks: Sequence[int], policies: Sequence[str], target: float
) -> Sums:
    """The value that the policies of one ranker keep on each test request.

    Args:
      fitted: its curves on validation requests, [R, K], as `evaluate.Each` has them.
      tested: the same on test requests.
      ks: the k of both.
      policies: names of `POLICIES`.
      target: the share of the value to keep on the validation requests.

    Returns:
      `policy_<curve>/<policy>` -> that curve at the chosen k, [R], for the policies of `named`. All
      are NaN for a ranker with NaN in its curves, and if there is no value to keep.
    """
    validation, test = (_curves(of, ks) for of in (fitted, tested))
    requests = np.arange(len(test.candidates))
    known = all(np.isfinite(of).all() for curves in (validation, test) for of in curves)
    if not (known and validation.captured[:, -1].sum() > 0 and test.captured[:, -1].sum() > 0):
        nothing = np.full(len(requests), np.nan)
        return {f"policy_{of}/{name}": nothing for of in _CHOSEN for name in named(policies)}
    choices = {name: POLICIES[name](validation, target)(test.score) for name in policies}
    choices[HINDSIGHT] = hindsight(test, target)
    return {
        f"policy_{of}/{name}": np.asarray(tested[of])[requests, choices[name]]
        for of in _CHOSEN
        for name in named(policies)
    }


def _curves(curves: Sums, ks: Sequence[int]) -> Curves:
    score, captured = (np.asarray(curves[name], np.float64) for name in ("score", "value_captured"))
    return Curves(np.asarray(ks), score, captured, np.asarray(curves["scored"])[:, -1])


_FOLDS, _MOST_REQUESTS = 5, 20_000
_HIDDEN, _STEPS, _RATE, _DECAY = 32, 600, 1e-2, 1e-3  # of the networks


def _last_true(number: int, test: Callable[[int], bool]) -> int:
    """The last of 0..number - 1 that passes a test which, once false, stays false; 0 if none."""
    low, high = 0, number - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if test(middle) else (low, middle - 1)
    return low


def _least_price(
    curves: Curves, lost: Float[np.ndarray, "R K"], cost: Float[np.ndarray, "*R K"], target: float
) -> float:
    """About the smallest price of lost value with which `_cheapest` keeps the target."""
    prices = np.geomspace(1e9, 1.0, 1000)  # of the mean value of a request, in candidates

    def enough(place: int) -> bool:
        return curves.kept(_cheapest(cost, lost, prices[place])) >= target

    return float(prices[_last_true(len(prices), enough)])


def _cheapest(
    cost: Float[np.ndarray, "*R K"], lost: Float[np.ndarray, "R K"], price: float
) -> Choice:
    """The place of the k with the least cost + price · lost."""
    return (cost + price * lost).argmin(axis=1)


class _Scale(NamedTuple):
    """Rules by which scores become features: logarithms or not, means and deviations."""

    logs: bool
    mean: Float[np.ndarray, "F"]
    deviation: Float[np.ndarray, "F"]


def _features(
    score: Float[np.ndarray, "R K"], scale: _Scale | None = None
) -> tuple[Float[np.ndarray, "R F"], _Scale]:
    """Features of sorted scores, standardized: the scores, gaps, entropy and mass."""
    logs = scale.logs if scale else bool((score >= 0).all())
    level = np.log(np.maximum(score, 1e-9)) if logs else score
    gaps = level - level[:, :1]
    share = np.exp(gaps)
    share /= share.sum(axis=1, keepdims=True)
    entropy = -(share * np.log(np.maximum(share, 1e-30))).sum(axis=1, keepdims=True)
    mass = share[:, : score.shape[1] // 4].sum(axis=1, keepdims=True)
    found = np.concatenate([level, gaps, entropy, mass], axis=1)
    if scale is None:
        deviation = found.std(axis=0)
        scale = _Scale(logs, found.mean(axis=0), np.where(deviation < 1e-6, 1.0, deviation))
    standard = np.clip((found - scale.mean) / scale.deviation, -10, 10)
    return standard.astype(np.float32), scale


Network = dict[str, Float[Array, "..."]]


def _predict(network: Network, features: Any) -> Float[Array, "R K"]:
    """The expected value lost at each k."""
    hidden = jax.nn.tanh(features @ network["inner"] + network["offset"])
    return jnp.exp(hidden @ network["outer"] + network["level"])


_predict_each = jax.jit(jax.vmap(_predict, in_axes=(0, None)))


@jax.jit
def _fit_networks(
    features: Float[Array, "R F"], lost: Float[Array, "R K"], weights: Float[Array, "n R"]
) -> Network:
    """Fit n networks at once, each to requests with its own weights, by full-batch Adam."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(_RATE, _STEPS), weight_decay=_DECAY)

    def fit(weight: Float[Array, "R"]) -> Network:
        level = jnp.log(jnp.average(lost, axis=0, weights=weight) + 1e-6)
        network = {
            "inner": jax.random.normal(jax.random.key(0), (features.shape[1], _HIDDEN))
            / jnp.sqrt(features.shape[1]),
            "offset": jnp.zeros(_HIDDEN),
            "outer": jnp.zeros((_HIDDEN, lost.shape[1])),
            "level": level,
        }

        def loss(network: Network) -> Float[Array, ""]:
            predicted = _predict(network, features)
            deviance = predicted - lost * jnp.log(predicted)
            return jnp.average(
                deviance.mean(axis=1) / jnp.maximum(jnp.mean(lost), 1e-9), weights=weight
            )

        def step(carry: Any, _: None) -> tuple[Any, None]:
            network, state = carry
            updates, state = optimizer.update(jax.grad(loss)(network), state, network)
            return (optax.apply_updates(network, updates), state), None

        (network, _), _ = jax.lax.scan(step, (network, optimizer.init(network)), None, _STEPS)
        return network

    return jax.vmap(fit)(weights)
