"""The number of candidates that the student passes, chosen per request from its sorted scores.

A request passes few candidates where the student is sure, and many elsewhere. Policies are fitted
on validation requests, so that all keep the same share of the final value there, and measured on
test requests.

Axes: `R` requests, `K` values of k, increasing; the last is all that was retrieved; `F` features.
"""

import bisect
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float64, Int

from kd_ranker.evaluation.metrics import HINDSIGHT, TARGET, Sums
from kd_ranker.evaluation.results import Who

Score = Float[np.ndarray | Array, "R K"]
"""The student's value of its k-th candidate at each k, or of its last one."""

Choice = Int[np.ndarray | Array, "R"]
"""The place in `ks` of each request's k."""


class Curves(NamedTuple):
    """The value captured at each k by one student, per request."""

    ks: Int[np.ndarray, "K"]  # to choose among
    score: Float[np.ndarray, "R K"]  # see `Score`
    captured: Float[np.ndarray, "R K"]  # teacher value of the items shown, never decreasing
    scored: Float[np.ndarray, "R K"]  # candidates of the teacher: k, at most those of the request

    @property
    def lost(self) -> Float64[np.ndarray, "R K"]:
        """The value lost at each k, against passing all, over the mean value of a request."""
        total = self.captured[:, -1:].astype(np.float64)
        return np.maximum(total - self.captured, 0) / total.mean()

    @property
    def have_value(self) -> bool:
        """True if all numbers are finite, and there is value to keep."""
        return all(np.isfinite(of).all() for of in self) and self.captured[:, -1].sum() > 0

    def kept(self, choice: Choice) -> float:
        """The share of the value that a choice keeps: a ratio of sums over requests."""
        return 1 - float(self.lost[np.arange(len(choice)), choice].mean())


@dataclasses.dataclass(frozen=True)
class Policy:
    """A rule that chooses k for each request from the student's sorted scores.

    The scores are an array of NumPy or of JAX, and so is the choice.
    """

    name: ClassVar[str]
    ks: Int[np.ndarray, "K"]

    @classmethod
    def fit(cls, curves: Curves, target: float) -> Self:
        """Fit a rule that keeps this share of the value over all requests."""
        raise NotImplementedError

    def choose(self, score: Score) -> Choice:
        """Choose the place of each request's k."""
        raise NotImplementedError

    def passed(self, value: Float[Array, "R N"], mask: Bool[Array, "R N"]) -> Int[Array, "R"]:
        """The number of candidates to pass of each request: from 1 to all, or 0 of none.

        Args:
          value: the student's value of each candidate, in any order.
          mask: False on padding.
        """
        candidates = mask.sum(axis=1)
        ordered = -jnp.sort(jnp.where(mask, -value, jnp.inf), axis=1)
        at = jnp.minimum(self.ks, jnp.maximum(candidates, 1)[:, None]) - 1
        score = jnp.take_along_axis(ordered, at, axis=1, mode="clip")
        return jnp.minimum(jnp.asarray(self.ks)[self.choose(score)], candidates)


@dataclasses.dataclass(frozen=True)
class Uniform(Policy):
    """The same k for all: the smallest that keeps the target, at `place` in `ks`."""

    name: ClassVar[str] = "uniform"
    place: int

    @classmethod
    def fit(cls, curves: Curves, target: float) -> Self:
        """See `Policy`."""
        enough = 1 - curves.lost.mean(axis=0) >= target
        return cls(curves.ks, int(enough.argmax()))

    def choose(self, score: Score) -> Choice:
        """See `Policy`."""
        return score.__array_namespace__().full(score.shape[0], self.place)


@dataclasses.dataclass(frozen=True)
class Threshold(Policy):
    """The largest k at which all candidates reach the largest threshold that keeps the target."""

    name: ClassVar[str] = "threshold"
    threshold: float

    @classmethod
    def fit(cls, curves: Curves, target: float) -> Self:
        """See `Policy`."""
        known = np.unique(curves.score)

        def enough(place: int) -> bool:
            return curves.kept(cls(curves.ks, known[place]).choose(curves.score)) >= target

        return cls(curves.ks, float(known[_last_true(len(known), enough)]))

    def choose(self, score: Score) -> Choice:
        """See `Policy`."""
        reached = (score >= self.threshold).sum(axis=1)
        return score.__array_namespace__().maximum(reached - 1, 0)


@dataclasses.dataclass(frozen=True)
class Learned(Policy):
    """The least k + price · the expected value lost at k, as a network predicts it.

    The network is fitted by Poisson regression, so its predictions are right in the mean over the
    requests that it is fitted to. The price is about the smallest that keeps the target, by
    out-of-fold predictions. A price for a budget over all requests: Jiang et al., "DCAF", 2020,
    arXiv:2006.09684. Of more than 20,000 requests, the first 20,000 count.
    """

    name: ClassVar[str] = "learned"
    price: float  # in candidates per mean value of a request
    mean: Float[np.ndarray, "F"]
    deviation: Float[np.ndarray, "F"]
    network: Mapping[str, Float[np.ndarray, "..."]]

    @classmethod
    def fit(cls, curves: Curves, target: float) -> Self:
        """See `Policy`."""
        curves = Curves(curves.ks, *(of[:_MOST_REQUESTS] for of in curves[1:]))
        features = np.asarray(_features(curves.score))
        deviation = features.std(axis=0)
        scale = features.mean(axis=0), np.where(deviation < 1e-6, 1.0, deviation)
        standard = _standard(features, *scale)
        fold = np.random.default_rng(0).permutation(len(features)) % _FOLDS
        # The last network learns from all requests.
        weights = np.stack([*(fold != of for of in range(_FOLDS)), fold >= 0]).astype(np.float32)
        networks = _fit_networks(standard, curves.lost.astype(np.float32), weights)
        predicted = jax.device_get(_predict_each(networks, standard))
        out_of_fold = predicted[fold, np.arange(len(features))]
        price = _least_price(curves, out_of_fold, curves.ks, target)
        whole = {name: np.asarray(of[-1]) for name, of in networks.items()}
        return cls(curves.ks, price, *scale, whole)

    def choose(self, score: Score) -> Choice:
        """See `Policy`."""
        standard = _standard(_features(score), self.mean, self.deviation)
        network = {name: jnp.asarray(of) for name, of in self.network.items()}
        lost = score.__array_namespace__().asarray(_predict(network, standard))
        return _cheapest(self.ks, lost, self.price)


POLICIES: Mapping[str, type[Policy]] = {of.name: of for of in (Uniform, Threshold, Learned)}
"""The ways to choose k, by `config.funnel.policies`."""


def hindsight(curves: Curves, target: float) -> Choice:
    """The fewest candidates that keep the target, if the value lost at each k is known.

    It is the best choice among those that a price of lost value can give: no choice that keeps as
    much value passes fewer.
    """
    price = _least_price(curves, curves.lost, curves.scored, target)
    return _cheapest(curves.scored, curves.lost, price)


FILE = "policies.json"
"""The fitted policies of the members that are measured on test, next to their results."""

# The sums add the values of these curves at the chosen k.
_CHOSEN = ("scored", "value_captured", "true_value_captured", "covered_user_value")


def named(policies: Sequence[str]) -> tuple[str, ...]:
    """The policies to measure, in the order of `POLICIES`, and the bound if there are any."""
    return (*(name for name in POLICIES if name in policies), HINDSIGHT) if policies else ()


def fit(curves: Sums, ks: Sequence[int], policies: Sequence[str]) -> dict[str, Policy]:
    """Fit policies to the validation requests of one ranker, so that each keeps `TARGET`.

    `curves` [R, K] are those of `evaluate.Each` at the values `ks`. There are no policies for a
    ranker with NaN in its curves, or without value to keep.
    """
    known = _curves(curves, ks)
    return {name: POLICIES[name].fit(known, TARGET) for name in policies if known.have_value}


def sums(
    fitted: Mapping[str, Policy], tested: Sums, ks: Sequence[int], policies: Sequence[str]
) -> Sums:
    """The value that fitted policies, and the bound, keep on each test request of one ranker.

    `tested` [R, K] are its curves of `evaluate.Each` at the values `ks`.

    Returns:
      `policy_<curve>/<policy>` -> that curve at the chosen k, [R], for the policies of `named`. All
      are NaN for a ranker without fitted policies or with NaN in its curves, and if there is no
      value to keep.
    """
    test = _curves(tested, ks)
    requests = np.arange(len(test.scored))
    choices: dict[str, Choice] = {}
    if fitted and test.have_value:
        choices = {name: fitted[name].choose(test.score) for name in policies}
        choices[HINDSIGHT] = hindsight(test, TARGET)
    nothing = np.full(len(requests), np.nan)
    return {
        f"policy_{of}/{name}": np.asarray(tested[of])[requests, choices[name]]
        if choices
        else nothing
        for of in _CHOSEN
        for name in named(policies)
    }


def to_json(fitted: Mapping[Who, Mapping[str, Policy]]) -> str:
    """Return the text of `FILE`, with the policies by member and serve name.

    It is a list of objects, each with the name of a policy and its attributes.
    """
    listed = [
        {"member": member, "serve": serve, "policy": name, **dataclasses.asdict(of)}
        for (member, serve), policies in fitted.items()
        for name, of in policies.items()
    ]
    return json.dumps(listed, default=lambda array: array.tolist())


def from_json(text: str) -> dict[Who, dict[str, Policy]]:
    """The inverse of `to_json`."""
    fitted: dict[Who, dict[str, Policy]] = {}
    for of in json.loads(text, object_hook=_with_arrays):
        who, name = (of.pop("member"), of.pop("serve")), of.pop("policy")
        fitted.setdefault(who, {})[name] = POLICIES[name](**of)
    return fitted


def _with_arrays(of: dict[str, Any]) -> dict[str, Any]:
    return {
        name: np.asarray(value) if isinstance(value, list) else value for name, value in of.items()
    }


def _curves(curves: Sums, ks: Sequence[int]) -> Curves:
    names = "score", "value_captured", "scored"
    return Curves(np.asarray(ks), *(np.asarray(curves[name], np.float64) for name in names))


_FOLDS, _MOST_REQUESTS = 5, 20_000
_HIDDEN, _STEPS, _RATE, _DECAY = 32, 600, 1e-2, 1e-3  # of the networks


def _last_true(number: int, test: Callable[[int], bool]) -> int:
    """The last of 0..number - 1 that passes a test which, once false, stays false; 0 if none."""
    return max(bisect.bisect_left(range(number), True, key=lambda at: not test(at)) - 1, 0)


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


def _features(score: Score) -> Float[np.ndarray | Array, "R F"]:
    """Features of sorted scores, which are at least 0: logarithms, gaps, entropy and mass."""
    xp = score.__array_namespace__()
    level = xp.log(xp.maximum(score, 1e-9))
    gaps = level - level[:, :1]
    share = xp.exp(gaps)
    share /= share.sum(axis=1, keepdims=True)
    entropy = -(share * xp.log(xp.maximum(share, 1e-30))).sum(axis=1, keepdims=True)
    mass = share[:, : score.shape[1] // 4].sum(axis=1, keepdims=True)
    return xp.concatenate([level, gaps, entropy, mass], axis=1)


def _standard(
    features: Float[np.ndarray | Array, "R F"],
    mean: Float[np.ndarray, "F"],
    deviation: Float[np.ndarray, "F"],
) -> Float[np.ndarray | Array, "R F"]:
    """Standardized features as float32, within ±10."""
    standard = (features - mean) / deviation
    return features.__array_namespace__().clip(standard, -10, 10).astype(np.float32)


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
