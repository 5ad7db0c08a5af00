"""Distill a final ranker into an early ranker, and measure the savings in the funnel.

The names in `__all__` are stable; the rest of the package may change. For example:

    import kd_ranker as kd

    config = kd.configs.cascade("small")
    kd.prepare(config)
    teacher = kd.train_teacher(config, "runs/teacher")
    students = kd.sweep(config, "runs/sweep", teacher=teacher, weights=(0.3, 1, 3))
    kd.report(students)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_ranker import configs, debug
    from kd_ranker.api import (
        Dataset,
        Prepared,
        Report,
        Trained,
        export,
        infer,
        log_teacher,
        prepare,
        report,
        run,
        score,
        sweep,
        train,
        train_teacher,
    )
    from kd_ranker.batch import Category, FeatureSpec, Request
    from kd_ranker.batches import samplers
    from kd_ranker.distillation import losses, modes
    from kd_ranker.errors import UserError
    from kd_ranker.evaluation.live_test import requests_needed
    from kd_ranker.progress import Progress

__all__ = [
    "Category",
    "Dataset",
    "FeatureSpec",
    "Prepared",
    "Progress",
    "Report",
    "Request",
    "Trained",
    "UserError",
    "configs",
    "debug",
    "export",
    "infer",
    "log_teacher",
    "losses",
    "modes",
    "prepare",
    "report",
    "requests_needed",
    "run",
    "samplers",
    "score",
    "sweep",
    "train",
    "train_teacher",
]

# The modules of the names that are not in `api`; a module is a name itself.
_MODULES = {
    "Category": "kd_ranker.batch",
    "FeatureSpec": "kd_ranker.batch",
    "Progress": "kd_ranker.progress",
    "Request": "kd_ranker.batch",
    "UserError": "kd_ranker.errors",
    "configs": "kd_ranker.configs",
    "debug": "kd_ranker.debug",
    "losses": "kd_ranker.distillation.losses",
    "modes": "kd_ranker.distillation.modes",
    "requests_needed": "kd_ranker.evaluation.live_test",
    "samplers": "kd_ranker.batches.samplers",
}


def __getattr__(name: str) -> Any:
    """Load a name on first use: all of them would take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_MODULES.get(name, "kd_ranker.api"))
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, *globals()]
