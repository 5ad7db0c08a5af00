"""A sweep in rounds: Optuna asks for settings, by what earlier ones reached on validation.

The settings of a round train together, in cohorts that extend the sweep. Test is read once, after
the last round. `draws.json` has the draws so far: all else follows from them and from the cohorts,
so a search resumes at every moment, and grows by a larger `sweep.draws`.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.cohorts.plan import cohort_folders, read_plan
from kd_ranker.config import asking
from kd_ranker.config.drawing import Method, Overrides, Round
from kd_ranker.config.runs import methods_of, of_rounds, sweep_runs
from kd_ranker.config.schema import sweepable_by_name
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics.target import CRITERION
from kd_ranker.manifest import write_whole
from kd_ranker.pipeline.remote import Place, local_folder, owned
from kd_ranker.pipeline.sweeping import train_all
from kd_ranker.progress import Progress, Show
from kd_ranker.training.processes import on_first
from kd_ranker.training.workdir import read_json

FILE = "draws.json"


def train_search(config: ConfigDict, workdir: Place, show: Show, progress: Progress) -> None:
    """Train the students of a search round by round, and join their results.

    See `api.sweep`; the config is valid.
    """
    if config.launcher == "ray":
        workdir = local_folder("--workdir", workdir, "is shared by all that train cohorts")
    with owned(workdir) as folder:
        rounds = on_first(functools.partial(_read_rounds, folder, config))
        while (missing := config.sweep.draws - _draws_of_each_method(rounds)) > 0:
            if rounds:
                found = of_rounds(config, rounds)
                train_all(found, workdir, folder, progress, more_follow=True)
            draws = min(config.sweep.round, missing)
            rounds = on_first(functools.partial(_with_next_round, config, rounds, draws, folder))
            progress.show(f"round {len(rounds)}: {draws} settings of each method")
        if not train_all(of_rounds(config, rounds), workdir, folder, progress):
            show(f"the search in {workdir} is complete; there is nothing to do")


def _draws_of_each_method(rounds: Sequence[Round]) -> int:
    return sum(len(next(iter(of_methods.values()))) for of_methods in rounds)


def _with_next_round(
    config: ConfigDict, rounds: Sequence[Round], draws: int, workdir: Path
) -> list[Round]:
    """Ask for a round, and add it to those in the workdir."""
    rows = _validation(workdir) if rounds else pd.DataFrame()
    asked = {
        method.name: asking.ask(
            method,
            sweepable_by_name(),
            _trials(config, rounds, method, rows),
            draws,
            config.sweep.sampler,
            config.sweep.draw_seed,
        )
        for method in methods_of(config)
    }
    longer = [*rounds, asked]
    content = {"search": _search_of(config), "rounds": longer}
    write_whole(workdir / FILE, json.dumps(content, indent=2))
    return longer


def _validation(workdir: Path) -> pd.DataFrame:
    """Return the rows of all students so far on validation."""
    rows = results.read_joined(cohort_folders(workdir, read_plan(workdir)))
    return rows[(rows["role"] == "student") & (rows["split"] == "validation")]


def _trials(
    config: ConfigDict, rounds: Sequence[Round], method: Method, rows: pd.DataFrame
) -> list[asking.Trial]:
    """Return the earlier draws of a method, each with its mean criterion over repeats.

    It is that of the head that is best, as validation chooses heads, too.
    """
    trials = []
    for of_methods in rounds:
        for drawn in of_methods[method.name]:
            runs = sweep_runs(of_rounds(config, [{method.name: [drawn]}]))
            heads = rows[rows["run"].isin(list(runs))].groupby("serve")
            criterion = heads[CRITERION].mean(skipna=False).min()
            trials.append(asking.Trial(drawn, float(criterion)))
    return trials


def _search_of(config: ConfigDict) -> str:
    """Return a digest of what decides the draws, besides their number."""
    spaces = [[method.name, sorted(method.spaces.items())] for method in methods_of(config)]
    return manifest.digest([spaces, config.sweep.sampler, config.sweep.draw_seed])


def _read_rounds(workdir: Path, config: ConfigDict) -> list[Round]:
    """Return the rounds so far; none if the search has not begun."""
    path = workdir / FILE
    if not path.exists():
        return []
    content = read_json(path, "use another --workdir")
    if content.get("search") != _search_of(config):
        raise UserError(
            f"{workdir} holds a search with other methods, ranges, sweep.sampler or "
            "sweep.draw_seed; use another --workdir, or set them back"
        )
    return [
        {name: [_as_drawn(drawn) for drawn in draws] for name, draws in of_methods.items()}
        for of_methods in content["rounds"]
    ]


def _as_drawn(read: dict[str, Any]) -> Overrides:
    """Return a draw as it was before it was written: JSON has no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in read.items()}
