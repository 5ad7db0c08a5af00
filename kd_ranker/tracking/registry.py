"""The trackers by the names that `config.tracker` may have."""

import importlib.util

from kd_ranker.errors import UserError
from kd_ranker.tracking.background import InBackground
from kd_ranker.tracking.mlflow import MLflow
from kd_ranker.tracking.tensorboard import TensorBoard
from kd_ranker.tracking.tracker import Tracker
from kd_ranker.tracking.wandb import WandB

TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}
"""By `config.tracker`. A program may add its own, see docs/extending.md."""


def check_installed(name: str) -> None:
    """Raise UserError if the package of a tracker is not installed, without importing it."""
    package = TRACKERS[name].package
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"tracker={name!r} needs the package {package}: install the extra `{package}`"
        )


def make_tracker(name: str) -> Tracker:
    """Make a tracker, with a thread of its own if it is one of those `in_background`."""
    tracker = TRACKERS[name]()
    return InBackground(name, tracker) if tracker.in_background else tracker
