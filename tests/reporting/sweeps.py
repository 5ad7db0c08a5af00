"""Workdirs of sweeps that never ran: the files of a real one, their numbers drawn from a seed."""

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import vl_convert
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.config.runs import sweep_runs
from kd_ranker.configs import cascade
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation import request_files, results, setting_names
from kd_ranker.evaluation.evaluate import PerRequest
from kd_ranker.reporting import figures
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.study import Study, read_studies
from tests.sweeps import needs_scores

TASKS = ("watch", "like", "share")
SERVES = {"none": ("user",), "aux": ("user", "teacher", "blend"), "shared": ("user",)}
REPORT_AT = (10, 50, 100, 200, 400)
SPLITS = ("validation", "test")
# About what each reference needs to pass for 99%.
BASELINES = {"oracle": 9.0, "incumbent": 1500.0, "random": 1900.0, "show_rate": 900.0}
RETRIEVED, REQUESTS, TEACHER_FLOPS = 2000, 20, 200.0
# The share of the shown items that the logged funnel passed, of every ranker at every k.
COVERAGE = 0.8
CURVES = ("survival", "value_captured", "true_value_captured")
OF_TEST = "cohorts/0/test"
OF_REQUESTS = tuple(
    f"{OF_TEST}/{name}" for name in (request_files.REQUESTS_FILE, request_files.REQUEST_CURVES_FILE)
)


def write_sweep(
    workdir: Path,
    dataset: str = "cascade",
    modes: Sequence[str] = ("none", "aux", "shared"),
    weights: Sequence[float] = (0.3, 1.0),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    gain: float = 0.45,
    frozen: Sequence[str] = (),
    true_values: bool = True,
    without: Sequence[str] = (),
    changes: dict | None = None,
) -> Path:
    """Write the workdir of a sweep of `TASKS`; return it.

    `gain` is how much distillation can take off `passed_for_99`, as a share; negative adds to it.
    The loss of the runs `frozen` stopped being finite. `without` are files to leave out, and
    `changes` are to the config, by dotted key.
    """
    config = cascade()
    config.data.name = dataset
    config.funnel.retrieved = RETRIEVED
    config.sweep.update({"modes": modes, "weights": weights, "seeds": seeds})
    config.update_from_flattened_dict(changes or {})
    perfect = _curve(10.0) ** 0
    teacher = teacher_row() | _measures(perfect, 0.6, 0.5, 0.0, 0.74)
    rows = [teacher | {"flops": 150_000.0, "cost_ratio": 1.0}]
    each = {("teacher", "user"): _each(rows[0], perfect)}
    for name, passed in BASELINES.items():
        rows.append(reference_row(name, passed) | _measures(_curve(passed), 0.6, 0.6, 0.1, 0.7))
        each[name, "user"] = _each(rows[-1], _curve(passed))
    runs = [
        (mode, weight, serve, seed)
        for seed, mode in itertools.product(seeds, modes)
        for weight in ((0.0,) if mode == "none" else weights)
        for serve in SERVES[mode]
    ]
    for run in runs:
        row, _ = _student("validation", gain, *run)
        if row["run"] in frozen:
            row["non_finite_step"] = 700
        rows.append(row)
    chosen = setting_names.chosen(_frame(rows, config))
    for run in runs:
        row, curve = _student("test", gain, *run)
        if row["serve"] in chosen.get(row["run"], ()):
            rows.append(row)
            each[row["run"], row["serve"]] = _each(row, curve)
    if not true_values:
        rows = [row | {name: math.nan for name in row if "true_value" in name} for row in rows]
    environment = {"python": "3.11.7", "packages": {"flax": "0.12.8", "jax": "0.10.2"}}
    files = {"environment.json": json.dumps(environment).encode()}
    of_requests = request_files.request_files(request_files.PerRequestByRanker(_ks(), each), TASKS)
    files |= {f"{OF_TEST}/{name}": content for name, content in of_requests.items()}
    (workdir / OF_TEST).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name not in without:
            (workdir / name).write_bytes(content)
    return _write(workdir, rows, config)


def finish(workdir: Path) -> Path:
    """Write the manifests of a sweep and of its cohorts' tests."""
    for folder in workdir.glob("cohorts/*/test"):
        manifest.write(folder, {})
    manifest.write(workdir, {}, [results.FILE] if (workdir / results.FILE).exists() else [])
    return workdir


def change(workdir: Path, change_rows: Callable[[pd.DataFrame], pd.DataFrame]) -> Path:
    """Rewrite a `results.csv` with `change_rows(frame)`."""
    path = workdir / results.FILE
    change_rows(results.read_csv(path)).to_csv(path, index=False)
    return finish(workdir)


@contextlib.contextmanager
def without_pictures(*, with_charts: bool = False) -> Iterator[None]:
    """Leave out a report's pictures, which take most of its time; `test_charts` draws them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "files", lambda _: dict.fromkeys(("svg", "pdf", "png"), b""))
        if not with_charts:
            patched.setattr(figures, "page_chart", lambda _: "")
            patched.setattr(figures, "page_image", lambda _: "")
            patched.setattr(vl_convert, "javascript_bundle", lambda _: "")
        yield


def study_of(workdir: Path, rows: Iterable[dict]) -> Study:
    """Return the study of a sweep of these rows, see `write_rows`."""
    (study,) = read_studies([write_rows(workdir, [*rows])])
    return study


def estimates_of(workdir: Path, **options: object) -> Estimates:
    """Return the estimates of a sweep of `write_sweep`."""
    (study,) = read_studies([write_sweep(workdir, **options)])  # type: ignore[arg-type]
    return Estimates(study)


def _other_keys(config: ConfigDict) -> dict:
    """The values of the keys that these students do not vary."""
    setting = setting_names.setting_of(config)
    values = {name: setting[name] for name in setting_names.OTHER_KEYS}
    return {
        name: "x".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def _ks() -> np.ndarray:
    return np.array(request_files.spaced_ks(RETRIEVED, REPORT_AT))


def _curve(passed: float) -> pd.DataFrame:
    """Curves at every k: the value captured crosses 99% near `passed`."""
    k = np.arange(1, RETRIEVED + 1)
    value = 1 - 100 ** -((k / passed) ** 0.55)
    value /= value[-1]
    survival = 1 - np.exp(-1.52 * (k / (passed / 450 * 200)) ** 0.6)
    curves = (np.minimum(1.0, survival), value, value + 0.02)
    return pd.DataFrame(dict(zip(CURVES, curves, strict=True)), index=k)


def _measures(
    curve: pd.DataFrame, user_bce: float, teacher_bce: float, kl: float, area: float
) -> dict:
    """The columns of a ranker with these curves, each task a little lower than the one before."""
    row = {}
    for target in (95, 99):
        passed = int((curve["value_captured"] >= target / 100).idxmax())
        users = curve["true_value_captured"][passed] / curve["true_value_captured"].iloc[-1]
        row[f"passed_for_{target}"] = float(passed)
        row[f"scored_for_{target}"] = float(passed)
        row[f"true_value_for_{target}"] = users
    for k in REPORT_AT:
        row |= {f"{name}@{k}": curve[name][k] for name in CURVES}
        row |= {f"covered_user_value@{k}": curve["value_captured"][k], f"coverage@{k}": COVERAGE}
    for i, task in enumerate(TASKS):
        row |= {
            f"user_bce/{task}": user_bce - 0.15 * i, f"user_auc/{task}": area - 0.03 * i,
            f"teacher_kl/{task}": kl, f"teacher_bce/{task}": teacher_bce - 0.12 * i,
        }  # fmt: skip
    return row


def _student(
    split: str, gain: float, mode: str, weight: float, serve: str, seed: int
) -> tuple[dict, pd.DataFrame]:
    """A student's row on a split, and its curves."""
    # The effects of a seed on all runs on a split, and on this one.
    shift = np.random.default_rng([seed, len(split)]).normal(0, 0.02)
    own = np.random.default_rng([seed, *f"{split}{mode}{weight}{serve}".encode()])
    # How far the student follows the teacher, from 0 to 1.
    strength = {"none": 0.0, "aux": 0.8, "shared": 1.0}[mode] * weight / (weight + 1)
    if serve == "teacher":
        strength *= 1.5
    worse = {"teacher": 0.006, "blend": 0.002}.get(serve, 0.0)
    curve = _curve(450 * (1 - gain * strength) * (1 + shift + own.normal(0, 0.02)))
    noise = own.normal(0, 0.0008)
    kl = 0.18 * (1 - 0.5 * strength) + 0.2 * shift + noise
    bce, area = 0.612 - 0.004 * strength + worse, 0.712 + 0.006 * strength - worse
    flops = 900.0 if mode == "aux" else 800.0
    return _measures(curve, bce + noise, 0.5 + kl, kl, area + noise) | {
        "split": split, "mode": mode, "serve": serve, "seed": seed, "weight": weight,
        "run": f"{mode}-weight{weight}-seed{seed}", "flops": flops,
        "cost_ratio": flops / 150_000, "alignment": 0.2 - 0.02 * strength + own.normal(0, 0.004),
    }, curve  # fmt: skip


def _each(row: dict, curve: pd.DataFrame) -> PerRequest:
    """Sums of requests that give about the main numbers of a row and its curves."""
    generator = np.random.default_rng([*str(row["run"]).encode()])
    weight = generator.gamma(4, 0.25, REQUESTS)

    def spread(mean: float | np.ndarray) -> np.ndarray:
        """Sums whose ratio to those of the weights is the mean, one per request."""
        off = generator.normal(0, 0.05, REQUESTS)
        off -= np.average(off, weights=weight)
        return np.multiply.outer(weight * (1 + off), mean)

    user_bce, teacher_bce, kl = (
        spread(np.array([row[f"{name}/{task}"] for task in TASKS]))
        for name in ("user_bce", "teacher_bce", "teacher_kl")
    )
    per_task = np.repeat(weight[:, None], len(TASKS), axis=1)
    single = {
        "user_bce": user_bce, "label_weight": per_task, "teacher_bce": teacher_bce,
        "teacher_weight": per_task, "teacher_entropy": teacher_bce - kl, "requests": weight,
        "funnel_requests": weight, "candidates": weight * RETRIEVED,
    }  # fmt: skip
    curves = {name: spread(curve.loc[_ks(), name].to_numpy()) for name in CURVES}
    positives = np.repeat(curves["survival"][..., None], len(TASKS), axis=-1)
    every = np.multiply.outer(weight, _ks())
    return PerRequest(single, curves | {"scored": every, "positives_kept": positives})


def write_runs(workdir: Path, config: ConfigDict) -> Path:
    """The workdir of the sweep of a config: its own runs, with numbers drawn from a seed.

    Students with the final ranker's scores need about a quarter fewer candidates. The references
    are those that any dataset has, and an incumbent.
    """
    rows = [teacher_row() | _numbers(config, 10.0, 1.0)]
    for name, passed in BASELINES.items():
        rows.append(reference_row(name, passed) | _numbers(config, passed, 0.9))
    for name, run in sweep_runs(config).items():
        setting = setting_names.setting_of(run)
        learns = setting["distill_loss"] is not None
        draw = np.random.default_rng([*name.encode()])
        for split, serve in itertools.product(SPLITS, MODES[run.distill.mode].serve):
            passed = round(draw.normal(750.0 if learns else 1000.0, 20.0))
            rows.append(
                {**setting, "split": split, "serve": serve, "run": name, "flops": 10.0}
                | _numbers(config, passed, float(draw.normal(0.95, 0.001)))
            )
    return _write(workdir, rows, config)


def _numbers(config: ConfigDict, passed: float, users: float) -> dict:
    k = config.funnel.passed
    area = {f"user_auc/{task}": 0.7 for task in config.tasks}
    return area | {
        "passed_for_99": passed, "true_value_for_99": users, f"true_value_captured@{k}": users,
    }  # fmt: skip


def write_rows(
    workdir: Path, rows: Sequence[dict], retrieved: int = RETRIEVED, title: str = ""
) -> Path:
    """A sweep's workdir of one task whose `results.csv` has just these rows, by hand.

    A row says what matters, the rest has a default: `{"mode": "aux", "seed": 1, "kl": 0.2}`. It
    stands for both splits unless it says for which; `{"test": {"kl": 0.3}}` is what differs there.
    Short names: `kl`, `tau`, `survival`, `weight`, `passed`, `flops`, `alignment`, `true_value` and
    `true_value_for` (where 99% is kept), `coverage` and `covered` (the covered value of labels).
    Costs and candidates follow unless they are given.
    """
    config = cascade()
    config.data.name, config.tasks = "d", ("watch",)
    config.funnel.retrieved, config.funnel.passed = retrieved, 30
    config.data.title = title
    return _write(workdir, rows, config)


def _write(workdir: Path, rows: Sequence[dict], config: ConfigDict) -> Path:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json(indent=2, sort_keys=True))
    _frame(rows, config).to_csv(workdir / results.FILE, index=False)
    return finish(workdir)


def _frame(rows: Sequence[dict], config: ConfigDict) -> pd.DataFrame:
    """The `results.csv` of `write_rows`."""
    passed = config.funnel.passed
    others = _other_keys(config)
    full_rows = []
    short = {
        "kl": "teacher_kl/watch", "survival": f"survival@{passed}", "weight": "distill_weight",
        "passed": "passed_for_99", "flops": "flops_per_candidate", "alignment": "alignment_ratio",
        "true_value": f"true_value_captured@{passed}", "tau": "teacher_tau",
        "true_value_for": "true_value_for_99", "coverage": f"coverage@{passed}",
        "covered": f"covered_user_value@{passed}",
    }  # fmt: skip
    for row in _rows_on_splits(rows):
        mode = row.get("mode")
        distilled = None if mode == "none" else "bce"
        default = {
            "dataset": config.data.name, "role": "student", "serve": "user", "seed": 0,
            "data_seed": 0, "mode": mode, "step": 9, "distill_weight": 1.0 if distilled else 0.0,
            "non_finite_step": None, "distill_loss": distilled, "learning_rate": 0.002,
            "temperature": 1.0 if distilled else None, "user_bce/watch": 0.5,
            "user_loss": "bce" if mode else None, "unshown_weight": 0.0 if mode else None,
            "teacher_kl/watch": 0.1, "passed_for_99": 100.0, "flops_per_candidate": 10.0,
            "candidates": float(config.funnel.retrieved),
        }  # fmt: skip
        line = (
            (others if mode else dict.fromkeys(others))
            | default
            | {short.get(name, name): value for name, value in row.items() if name != "test"}
        )
        line.setdefault("needs_scores", needs_scores(line["role"], line["distill_loss"]))
        line.setdefault("teacher_bce/watch", line["teacher_kl/watch"] + 0.4)
        line.setdefault("scored_for_99", np.minimum(line["passed_for_99"], line["candidates"]))
        line.setdefault("cost_ratio", line["flops_per_candidate"] / TEACHER_FLOPS)
        line.setdefault("run", f"{mode}-weight{line['distill_weight']}-seed{line['seed']}")
        full_rows.append(line)
    return pd.DataFrame(full_rows)


def _rows_on_splits(rows: Sequence[dict]) -> Iterator[dict]:
    """The rows on validation, and then those on the test with what differs there."""
    for split in SPLITS:
        for row in rows:
            if row.get("split", split) != split:
                continue
            on_test = row.get("test", {}) if split == "test" else {}
            yield {"split": split, **row, **on_test}


def teacher_row() -> dict:
    """The teacher's row for `write_rows`: 200 FLOPs a candidate."""
    return {"role": "teacher", "mode": None, "distill_loss": None, "kl": 0.0,
            "flops": TEACHER_FLOPS, "passed": 10.0, "temperature": None, "tau": 1.0,
            "user_auc/watch": 0.8, "run": "teacher"}  # fmt: skip


def reference_row(name: str, passed: float, **more: object) -> dict:
    """The row of a reference for `write_rows`, in every repeat of the students."""
    return {"role": "reference", "mode": None, "distill_loss": None, "weight": None,
            "temperature": None, "learning_rate": None, "flops": math.nan,
            "run": name, "passed": passed, **more}  # fmt: skip
