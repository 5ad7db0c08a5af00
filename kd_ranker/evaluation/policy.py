"""The number of candidates that the student passes, chosen per request from its sorted scores.

A request passes few candidates where the student is sure, and many elsewhere. Policies are fitted
on validation requests, so that all keep the same share of the final value there, and measured on
test requests.

Axes: `R` requests, `K` values of k, increasing; the last is all that was retrieved; `F` features.
"""

import bisect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int

from kd_ranker.evaluation.metrics import HINDSIGHT, TARGET, Sums
from kd_ranker.evaluation.results import Who

Score = Float[np.ndarray | Array, "R K"]
"""The student's value of its k-th candidate at each k, or of its last one."""

Choice = Int[np.ndarray | Array, "R"]
"""The place in `ks` of each request's k."""

Numbers = Mapping[str, Any]  # a number or an array by name

_FOLDS = 5


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


def curves_of(sums: Sums, ks: Sequence[int]) -> Curves:
    """The curves of one ranker, from those of `evaluate.Each` at the values `ks`."""
    names = "score", "value_captured", "scored"
    return Curves(np.asarray(ks), *(np.asarray(sums[name], np.float64) for name in names))


class Policy(NamedTuple):
    """A fitted rule of `POLICIES` that chooses k for each request.

    The scores are an array of NumPy or of JAX, and so is the choice.
    """

    name: str
    numbers: Numbers  # with the values `ks` to choose among

    def choose(self, score: Score) -> Choice:
        """Choose the place of each request's k."""
        return POLICIES[self.name].choose(score, self.numbers)

    def passed(self, value: Float[Array, "R N"], mask: Bool[Array, "R N"]) -> Int[Array, "R"]:
        """The number of candidates to pass of each request: from 1 to all, or 0 of none.

        Args:
          value: the student's value of each candidate, in any order.
          mask: False on padding.
        """
        candidates, ks = mask.sum(axis=1), jnp.asarray(self.numbers["ks"])
        ordered = -jnp.sort(jnp.where(mask, -value, jnp.inf), axis=1)
        at = jnp.minimum(ks, jnp.maximum(candidates, 1)[:, None]) - 1
        score = jnp.take_along_axis(ordered, at, axis=1, mode="clip")
        return jnp.minimum(ks[self.choose(score)], candidates)


class Rule(NamedTuple):
    """A way to choose k: `fit` finds numbers that keep a share of the value over all requests."""

    fit: Callable[[Curves, float], Numbers]
    choose: Callable[[Score, Numbers], Choice]


def _fit_uniform(curves: Curves, target: float) -> Numbers:
    """The same k for all: the smallest that keeps the target, at `place` in `ks`."""
    return {"place": int((1 - curves.lost.mean(axis=0) >= target).argmax())}


def _choose_uniform(score: Score, numbers: Numbers) -> Choice:
    return score.__array_namespace__().full(score.shape[0], int(numbers["place"]))


def _fit_threshold(curves: Curves, target: float) -> Numbers:
    """The largest threshold that keeps the target; passed are candidates that reach it."""
    known = np.unique(curves.score)

    def enough(place: int) -> bool:
        choice = _choose_threshold(curves.score, {"threshold": known[place]})
        return curves.kept(choice) >= target

    return {"threshold": float(known[_last_true(len(known), enough)])}


def _choose_threshold(score: Score, numbers: Numbers) -> Choice:
    reached = (score >= numbers["threshold"]).sum(axis=1)
    return score.__array_namespace__().maximum(reached - 1, 0)


def _fit_learned(curves: Curves, target: float) -> Numbers:
    """The least k + price · the expected value lost at k, as a network predicts it.

    The network is fitted by Poisson regression to the first 20,000 requests. The price is about the
    smallest that keeps the target, by out-of-fold predictions. A price for a budget over all
    requests: Jiang et al., "DCAF", 2020, arXiv:2006.09684.
    """
    # Imported here: few runs fit a policy, and the import takes a second.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.neural_network import MLPRegressor

    curves = Curves(curves.ks, *(of[:20_000] for of in curves[1:]))
    features = np.asarray(_features(curves.score))
    deviation = features.std(axis=0)
    scale = {"mean": features.mean(axis=0), "deviation": np.where(deviation < 1e-6, 1, deviation)}
    standard, lost = _standard(features, scale), curves.lost
    unit = lost.mean() or 1.0
    network = MLPRegressor(
        hidden_layer_sizes=(32,),
        activation="tanh",
        loss="poisson",
        learning_rate_init=1e-2,
        alpha=1e-2,
        max_iter=100,
        random_state=0,
    )
    out_of_fold = lost
    with warnings.catch_warnings():
        # The number of passes is fixed.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if len(lost) >= _FOLDS:
            folds = KFold(_FOLDS, shuffle=True, random_state=0)
            out_of_fold = unit * cross_val_predict(network, standard, lost / unit, cv=folds)
        network.fit(standard, lost / unit)
    (inner, outer), (offset, level) = network.coefs_, network.intercepts_
    layers = {"inner": inner, "offset": offset, "outer": outer, "level": level + np.log(unit)}
    return {"price": _least_price(curves, out_of_fold, curves.ks, target), **scale, **layers}


def _choose_learned(score: Score, numbers: Numbers) -> Choice:
    xp = score.__array_namespace__()
    hidden = xp.tanh(_standard(_features(score), numbers) @ numbers["inner"] + numbers["offset"])
    lost = xp.exp(hidden @ numbers["outer"] + numbers["level"])
    return _cheapest(numbers["ks"], lost, numbers["price"])


POLICIES: Mapping[str, Rule] = {
    "uniform": Rule(_fit_uniform, _choose_uniform),
    "threshold": Rule(_fit_threshold, _choose_threshold),
    "learned": Rule(_fit_learned, _choose_learned),
}
"""The ways to choose k, by `config.funnel.policies`."""


def fit(name: str, curves: Curves, target: float = TARGET) -> Policy:
    """Fit a rule of `POLICIES` so that it keeps a share of the value over all requests."""
    return Policy(name, {"ks": curves.ks, **POLICIES[name].fit(curves, target)})


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


def sums(
    fitted: Mapping[str, Policy], tested: Sums, ks: Sequence[int], policies: Sequence[str]
) -> Sums:
    """The value that fitted policies, and the bound, keep on each test request of one ranker.

    `tested` [R, K] are its curves of `evaluate.Each` at the values `ks`. A ranker with NaN in its
    curves of validation, or without value there, has no fitted policies.

    Returns:
      `policy_<curve>/<policy>` -> that curve at the chosen k, [R], for the policies of `named`. All
      are NaN for a ranker without fitted policies or with NaN in its curves, and if there is no
      value to keep.
    """
    test = curves_of(tested, ks)
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

    It is a list of objects, each with the name of a policy and its numbers.
    """
    listed = [
        {"member": member, "serve": serve, "policy": name, **of.numbers}
        for (member, serve), policies in fitted.items()
        for name, of in policies.items()
    ]
    return json.dumps(listed, default=lambda array: array.tolist())


def from_json(text: str) -> dict[Who, dict[str, Policy]]:
    """The inverse of `to_json`."""
    fitted: dict[Who, dict[str, Policy]] = {}
    for of in json.loads(text):
        who, name = (of.pop("member"), of.pop("serve")), of.pop("policy")
        numbers = {key: np.asarray(value) for key, value in of.items()}
        fitted.setdefault(who, {})[name] = Policy(name, numbers)
    return fitted


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


def _cheapest(cost: Any, lost: Float[np.ndarray | Array, "R K"], price: float) -> Choice:
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
    features: Float[np.ndarray | Array, "R F"], scale: Numbers
) -> Float[np.ndarray | Array, "R F"]:
    """Standardized features within ±10."""
    standard = (features - scale["mean"]) / scale["deviation"]
    return features.__array_namespace__().clip(standard, -10, 10)
