"""Tells how much of the cascade's regret is of what no feature shows.

A ranker that knows the true model, but has to guess the user's interests, the hidden part of the
items' quality, or both, from the features: by least squares, as it could without a row for each
user and item. Its regret is what a trained ranker can come to without learning ids.
"""

import sys
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from kd_ranker.main import Command, run_command
from kd_ranker.requests.request import Request, Source
from kd_ranker.sources import cascade

REQUESTS = 2000  # of the training split, to fit the guesses on
AN_HOUR = np.log1p(60) / 4  # as the feature of an event has its age


Matrix = Float[np.ndarray, "N W"]


def main(config: ConfigDict) -> None:
    """Prints the regret of each guess, and of the production ranker, on validation requests."""
    world = cascade.make_world(config.data)
    source = cascade.open_source(config.data, cascade.TASKS, config.funnel)
    quality_error = _quality_error(world)
    guess = _interests_from(world, source)
    sums: dict[str, Float[np.ndarray, "2"]] = {}
    for request in source.requests("validation"):
        truth, item = request.true_probability, request.item_id
        value = truth @ np.array(config.value_weights)
        best = np.sort(value)[-config.funnel.shown :].sum()
        off = guess(_of_user(world, request)[None])[0] - world.interests[request.user_id]
        errors = {
            "interests": np.outer(4 * world.topics[item] @ off, cascade.TERM_WEIGHTS[0]),
            "quality": np.outer(quality_error[item], cascade.TERM_WEIGHTS[1]),
        }
        errors["both"] = errors["interests"] + errors["quality"]
        logits = np.log(truth / (1 - truth))
        ranked = {name: cascade.sigmoid(logits + error) for name, error in errors.items()}
        for name, probability in (ranked | {"production": request.teacher_probability}).items():
            top = np.argsort(-(probability @ np.array(config.value_weights)))
            found = value[top[: config.funnel.shown]].sum()
            sums[name] = sums.get(name, np.zeros(2)) + np.array([found, best])
    for name, (found, best) in sums.items():
        print(f"{name:12} {1 - found / best:.4f}")


def _quality_error(world: cascade.World) -> Float[np.ndarray, "items"]:
    """The error of the qualities that the features of the items tell."""
    features = world.item_features[:, world.interests.shape[1] :]
    return _fitted(features, world.quality[:, None])(features)[:, 0] - world.quality


def _interests_from(world: cascade.World, source: Source) -> Callable[[Matrix], Matrix]:
    """The guess of interests from what `_of_user` sees, fitted on training requests."""
    train = [request for request, _ in zip(source.requests("train"), range(REQUESTS), strict=False)]
    seen = np.stack([_of_user(world, request) for request in train])
    return _fitted(seen, world.interests[[request.user_id for request in train]])


def _of_user(world: cascade.World, request: Request) -> Float[np.ndarray, "W"]:
    """The profile, and the mean topics of the events before and in the session."""
    topics, old = world.topics[request.history_id], request.history_features[:, 2] > AN_HOUR
    means = [topics[which].sum(axis=0) / max(which.sum(), 1) for which in (old, ~old)]
    profile = request.user_features[: topics.shape[1]]
    # An average of few events tells little.
    trust = old.sum() / (old.sum() + 6)
    return np.concatenate([profile, *means, trust * profile, trust * means[0]])


def _fitted(inputs: Matrix, targets: Matrix) -> Callable[[Matrix], Matrix]:
    """The linear function of the inputs that is closest to the targets."""

    def with_one(inputs: Matrix) -> Matrix:
        return np.c_[inputs, np.ones(len(inputs))]

    weights = np.linalg.lstsq(with_one(inputs), targets, rcond=None)[0]
    return lambda inputs: with_one(inputs) @ weights


if __name__ == "__main__":
    example = "--config=configs/cascade.py --config.data.history_length=50"
    command = Command(lambda api, config, _: main(config), {}, example, text=__doc__)
    run_command(command, "python scripts/cascade_regret.py", sys.argv[1:])
