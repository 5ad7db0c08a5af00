"""Workdirs of sweeps that never ran: the files of a real one, their numbers drawn from a seed."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.configs import cascade
from kd_ranker.evaluation import results
from kd_ranker.evaluation.evaluate import Each
from kd_ranker.evaluation.metrics import ReportAt

TASKS = ("watch", "like", "share")
SERVES = {"none": ("user",), "aux": ("user", "teacher", "blend"), "shared": ("user",)}
REPORT_AT = (10, 50, 100, 200, 400)
TARGETS = (0.95, 0.99)
SPLITS = ("validation", "test")
WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)
REFERENCES = ("oracle", "incumbent", "random", "show_rate")
TEACHER_FLOPS = 200.0
# The share of the shown items that the logged funnel passed, of every ranker at every k.
COVERAGE = 0.8
CURVES = ("survival", "value_captured", "true_value_captured")

OF_REQUESTS = tuple(
    f"cohorts/0/test/{name}" for name in (results.REQUESTS_FILE, results.REQUEST_CURVES_FILE)
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
    retrieved: int = 2000,
    requests: int = 20,
    without: Sequence[str] = (),
    changes: dict | None = None,
) -> Path:
    """Writes a sweep's workdir and returns it.

    Args:
      workdir: where.
      dataset: `config.data.name`.
      modes: of the members.
      weights: of the members that distil.
      seeds: of the members.
      gain: how much distillation can take off `passed_for_99`, as a share; negative adds to it.
      frozen: names of members whose loss stopped being finite at step 700.
      true_values: whether the dataset knows them.
      retrieved: candidates a request.
      requests: of the test split.
      without: names of files to leave out.
      changes: to the config, by dotted key.
    """
    config = cascade()
    config.data.name = dataset
    config.sweep.modes, config.sweep.weights, config.sweep.seeds = modes, weights, seeds
    config.funnel.retrieved = retrieved
    config.update_from_flattened_dict(changes or {})
    workdir.mkdir(parents=True, exist_ok=True)
    of_truth = [f"true_value_captured@{k}" for k in REPORT_AT]
    of_truth += ["true_value_for_95", "true_value_for_99"]
    unknown = {} if true_values else dict.fromkeys(of_truth, math.nan)
    columns = results.columns(TASKS, ReportAt(REPORT_AT, TARGETS))
    teacher, others = _teacher(dataset, retrieved) | unknown, _other_keys(config)
    rows, losses = {("teacher", "user"): teacher}, {}
    for seed, mode in itertools.product(seeds, modes):
        for weight in (0.0,) if mode == "none" else weights:
            member = f"{mode}-weight{weight}-seed{seed}"
            for serve in SERVES[mode]:
                row, _ = _student(dataset, mode, weight, serve, seed, gain, retrieved)
                row = others | row | unknown | {"member": member}
                rows[member, serve] = _frozen(row) if member in frozen else row
            losses[member] = _losses(mode, weight, seed)
    chosen = results.chosen(pd.DataFrame(list(rows.values())).reindex(columns=columns))
    tested = {("teacher", "user"): teacher | {"split": "test"}}
    tested |= {
        (name, "user"): _reference(dataset, name, retrieved) | unknown for name in REFERENCES
    }
    for name in REFERENCES:
        rows[name, "user"] = _reference(dataset, name, retrieved, "validation") | unknown
    curves, bins, each = [], [], {}
    for member, serve in [who for who in rows if who[1] in chosen.get(who[0], ())]:
        keys = (rows[member, serve][name] for name in ("mode", "distill_weight", "serve", "seed"))
        row, curve = _student(dataset, *keys, gain, retrieved, "test")
        tested[member, serve] = others | row | unknown | {"member": member}
        if not true_values:
            curve["true_value_captured"] = math.nan
        curves.append(curve.assign(member=member, serve=serve))
        bins.append(_bins(member, serve, tested[member, serve]["seed"]))
        each[member, serve] = _each(tested[member, serve], curve, requests)
    every = [*rows.values(), *tested.values()]
    savings = [_saving(row, every, retrieved) for row in every]
    every = [
        row | {"funnel_cost_saving": saving, "saving_over_none": saving}
        for row, saving in zip(every, savings, strict=True)
    ]
    files = {
        "config.json": config.to_json(indent=2, sort_keys=True),
        "environment.json": json.dumps(
            {
                "python": "3.11.7", "system": "Linux-6.1-x86_64", "devices": "2 × cpu",
                "packages": {"flax": "0.12.8", "jax": "0.10.2", "optax": "0.2.8"},
            }
        ),
        "results.csv": results.to_csv(every, columns),
        "cohorts/0/metrics.jsonl": _metrics(losses),
    }  # fmt: skip
    if curves:
        files["curves.csv"] = pd.concat(curves).to_csv(index=False)
        files["calibration.csv"] = pd.concat(bins).to_csv(index=False)
        ks = curves[0]["k"].to_numpy()
        whole = pd.DataFrame(1.0, ks, [*CURVES]).reset_index(names="k")
        each["teacher", "user"] = _each(tested["teacher", "user"], whole, requests)
        risen = pd.DataFrame(dict.fromkeys(CURVES, (ks / retrieved) ** 0.1)).assign(k=ks)
        each |= {
            (name, "user"): _each(tested[name, "user"], risen, requests) for name in REFERENCES
        }
        of_requests = results.request_files(results.Kept(ks, each), TASKS)
        files |= {f"cohorts/0/test/{name}": content for name, content in of_requests.items()}
    for name, content in files.items():
        if name not in without:
            path = workdir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return finish(workdir)


def finish(workdir: Path) -> Path:
    """Write the manifests of a sweep and of its cohorts' tests."""
    for folder in workdir.glob("cohorts/*/test"):
        manifest.write(folder, {})
    manifest.write(workdir, {}, [results.FILE] if (workdir / results.FILE).exists() else [])
    return workdir


def _other_keys(config: ConfigDict) -> dict:
    """The values of the keys that these students do not vary."""
    made_of = results.made_of(config)
    return {name: results.cell_of(made_of[name]) for name in results.OTHER_KEYS}


def change(workdir: Path, change_rows) -> Path:
    """Rewrites a `results.csv` with `change_rows(frame)`."""
    path = workdir / results.FILE
    frame = results.read_csv(path)
    change_rows(frame).to_csv(path, index=False)
    return finish(workdir)


def _teacher(dataset: str, retrieved: int) -> dict:
    return {
        "dataset": dataset, "split": "validation", "role": "teacher", "serve": "user", "seed": 0,
        "step": 1500, "member": "teacher", "passed_for_95": 9.0,
        "passed_for_99": 10.0, "scored_for_95": 9.0, "scored_for_99": 10.0,
        "candidates": float(retrieved), "flops_per_candidate": 150_000.0, "cost_ratio": 1.0,
        "alignment_ratio": math.nan,
        **{f"user_bce/{task}": 0.60 - 0.15 * i for i, task in enumerate(TASKS)},
        **{f"user_auc/{task}": 0.74 - 0.03 * i for i, task in enumerate(TASKS)},
        **{f"user_calibration/{task}": 1.02 for task in TASKS},
        **{f"teacher_bce/{task}": 0.50 - 0.12 * i for i, task in enumerate(TASKS)},
        **{f"teacher_kl/{task}": 0.0 for task in TASKS},
        **{f"survival@{k}": 1.0 for k in REPORT_AT},
        **{f"value_captured@{k}": 1.0 for k in REPORT_AT},
        **{f"true_value_captured@{k}": 1.0 for k in REPORT_AT},
        "true_value_for_95": 1.0, "true_value_for_99": 1.0,
    }  # fmt: skip


def _reference(dataset: str, name: str, retrieved: int, split: str = "test") -> dict:
    passed = {"oracle": 9.0, "random": 1900.0, "incumbent": 1500.0, "show_rate": 900.0}[name]
    return {
        "dataset": dataset, "split": split, "role": "reference", "member": name, "serve": "user",
        "seed": 0, "passed_for_99": passed, "scored_for_99": passed,
        "candidates": float(retrieved),
        **{f"survival@{k}": 0.5 for k in REPORT_AT},
        **{f"true_value_captured@{k}": 1.1 for k in REPORT_AT},
        **{f"covered_user_value@{k}": (k / retrieved) ** 0.1 for k in REPORT_AT},
        **{f"coverage@{k}": COVERAGE for k in REPORT_AT},
        "true_value_for_95": 1.0, "true_value_for_99": 1.0,
    }  # fmt: skip


def _each(row: dict, curve: pd.DataFrame, requests: int) -> Each:
    """What requests add up to the numbers of a row, each off by something of its own."""
    generator = np.random.default_rng([requests, *str(row["member"]).encode()])
    weight = generator.gamma(4, 0.25, requests)

    def spread(mean: float | np.ndarray) -> np.ndarray:
        """Sums whose ratio to those of the weights is the mean, one a request."""
        off = generator.normal(0, 0.05, requests)
        off -= np.average(off, weights=weight)
        return np.multiply.outer(weight * (1 + off), mean)

    def of_tasks(name: str) -> np.ndarray:
        return np.array([row.get(f"{name}/{task}", math.nan) for task in TASKS])

    per_task = np.repeat(weight[:, None], len(TASKS), axis=1)
    alone = {
        "user_bce": spread(of_tasks("user_bce")), "label_weight": per_task,
        "user_auc": spread(of_tasks("user_auc")), "user_auc_requests": per_task,
        "predicted": spread(of_tasks("user_calibration")), "observed": per_task,
        "teacher_bce": spread(of_tasks("teacher_bce")), "teacher_weight": per_task,
        "teacher_entropy": np.multiply.outer(
            weight, of_tasks("teacher_bce") - of_tasks("teacher_kl")
        ),
        "shown_user_bce": spread(of_tasks("user_bce")), "shown_weight": per_task,
        "shown_teacher_bce": spread(of_tasks("teacher_bce")),
        "shown_teacher_kl": spread(of_tasks("teacher_kl")),
        **{f"teacher_{name}{end}": weight for name in ("ndcg", "tau") for end in ("", "_requests")},
        **{f"top_{name}": np.nan * weight for name in ("promised", "true", "best")},
        "unseen_users": 0 * weight, "requests": weight, "unseen_items": 0 * weight,
        "candidates": weight * row["candidates"], "funnel_requests": weight,
    }  # fmt: skip
    curves = {name: spread(curve[name].to_numpy()) for name in CURVES}
    curves["scored"] = np.multiply.outer(weight, curve["k"].to_numpy())
    curves["shown_kept"] = curves["survival"]
    curves["covered_user_value"] = curves["value_captured"]
    curves["all_shown"] = np.multiply.outer(weight, np.ones(len(curve)))
    curves |= {
        "passed_shown": COVERAGE * curves["all_shown"],
        "ips_user_value": np.nan * curves["all_shown"],
    }
    tasks = np.ones(len(TASKS))
    curves |= {
        f"positives_{name}": np.multiply.outer(curves["survival"], tasks)
        for name in ("kept", "shown")
    }
    return Each(alone, curves)


def _student(
    dataset: str, mode: str, weight: float, serve: str, seed: int, gain: float, retrieved: int,
    split: str = "validation",
) -> tuple[dict, pd.DataFrame]:  # fmt: skip
    # What a seed does to all members on a split, and what it does to this one.
    common = np.random.default_rng([seed, len(split)])
    own = np.random.default_rng([seed, *f"{split}{mode}{weight}{serve}".encode()])
    shift = common.normal(0, 0.02)
    # How far the student follows the teacher, from 0 to 1.
    follows = weight / (weight + 1.0)
    strength = {"none": 0.0, "aux": 0.8, "shared": 1.0}[mode] * follows
    if serve == "teacher":
        strength = min(1.0, 1.2 * follows)
    strays = 0.006 * max(0.0, math.log10(weight / 2)) if weight > 2 else 0.0
    worse = {"teacher": 0.006, "blend": 0.002}.get(serve, 0.0) + strays

    passed = 450 * (1 - gain * strength * (1 - 20 * strays)) * (1 + shift + own.normal(0, 0.02))
    k = np.arange(1, retrieved + 1)
    # A curve that crosses 0.99 at `passed`.
    value = 1 - np.exp(-np.log(100.0) * (k / passed) ** 0.55)
    value /= value[-1]
    survival = np.minimum(1.0, 1 - np.exp(-1.52 * (k / (passed / 450 * 200)) ** 0.6))
    needed = {target: float(np.flatnonzero(value >= target / 100)[0] + 1) for target in (95, 99)}
    row = {
        "dataset": dataset, "split": split, "role": "student", "mode": mode, "serve": serve,
        "seed": seed, "data_seed": 0, "step": 1500,
        "distill_loss": None if mode == "none" else "bce",
        "distill_weight": weight, "temperature": math.nan if mode == "none" else 1.0,
        "learning_rate": 0.002, "user_loss": "bce", "unshown_weight": 0.0,
        "alignment_ratio": 0.2 - 0.02 * strength + own.normal(0, 0.004),
        **{f"passed_for_{target}": passes for target, passes in needed.items()},
        **{f"scored_for_{target}": passes for target, passes in needed.items()},
        # The curve of the true value ends at 1.02.
        **{f"true_value_for_{target}": (value[int(passes) - 1] + 0.02) / 1.02
           for target, passes in needed.items()},
        "candidates": float(retrieved),
        "flops_per_candidate": 900.0 if mode == "aux" else 800.0,
        "cost_ratio": (900.0 if mode == "aux" else 800.0) / 150_000.0,
    }  # fmt: skip
    for i, task in enumerate(TASKS):
        noise = own.normal(0, 0.0008)
        kl = 0.18 * (1 - 0.5 * strength) + 0.2 * shift + noise
        row |= {
            f"user_bce/{task}": 0.612 - 0.15 * i - 0.004 * strength + worse + noise,
            f"user_auc/{task}": 0.712 - 0.03 * i + 0.006 * strength - worse + noise,
            f"user_calibration/{task}": 1.0 + own.normal(0, 0.01) - 10 * worse,
            f"teacher_bce/{task}": 0.50 - 0.12 * i + kl,
            f"teacher_kl/{task}": kl,
        }
    for at in REPORT_AT:
        row[f"survival@{at}"] = float(survival[at - 1]) if at <= retrieved else math.nan
        row[f"value_captured@{at}"] = float(value[at - 1]) if at <= retrieved else math.nan
        row[f"true_value_captured@{at}"] = row[f"value_captured@{at}"] + 0.02
        row[f"covered_user_value@{at}"] = row[f"value_captured@{at}"]
        row[f"coverage@{at}"] = COVERAGE
    at = np.array(results.spaced_ks(retrieved, REPORT_AT))
    curve = pd.DataFrame(
        {
            "k": at,
            "survival": survival[at - 1],
            "value_captured": value[at - 1],
            "true_value_captured": value[at - 1] + 0.02,
        }
    )
    return row, curve


def _saving(row: dict, rows: list[dict], retrieved: int) -> float:
    def cost(student: dict) -> float:
        passed = student.get("passed_for_99", math.nan)
        return retrieved * student["flops_per_candidate"] + passed * 150_000.0

    undistilled = [
        other
        for other in rows
        if other.get("mode") == "none"
        and row.get("mode")
        and all(other[name] == row[name] for name in ("seed", "split"))
    ]
    return 1 - cost(row) / cost(undistilled[0]) if undistilled else math.nan


def _frozen(row: dict) -> dict:
    known = (
        "dataset",
        "split",
        "role",
        "mode",
        "serve",
        "seed",
        "data_seed",
        "distill_loss",
        "member",
    )
    known += ("distill_weight", "temperature", "learning_rate", "user_loss", "unshown_weight")
    known += ("flops_per_candidate", "cost_ratio")
    known += results.OTHER_KEYS
    return {name: row[name] for name in known} | {"step": 1500, "non_finite_step": 700}


def _bins(member: str, serve: str, seed: int) -> pd.DataFrame:
    generator = np.random.default_rng([seed, *f"{member}{serve}".encode()])
    factor = {"teacher": 1.3, "blend": 1.1}.get(serve, 1.0)
    lines = []
    for i, task in enumerate(TASKS):
        top = 0.8 - 0.3 * i
        for number, predicted in enumerate(np.linspace(0.03, top, 10)):
            weight = 4000.0 * math.exp(-number / 3)
            observed = predicted * factor + generator.normal(0, 0.4 / math.sqrt(weight))
            lines.append((task, number, weight, predicted, min(1.0, max(0.0, observed))))
    columns = ["task", "bin", "weight", "predicted", "observed"]
    return pd.DataFrame(lines, columns=columns).assign(member=member, serve=serve)


def _losses(mode: str, weight: float, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng([seed, *f"{mode}{weight}".encode()])
    steps = np.arange(50, 1501, 50)
    fall = np.exp(-steps / 300)
    user = 0.45 + 0.2 * fall + generator.normal(0, 0.004, len(steps))
    distill = 0.40 - 0.03 * weight / (1 + weight) + 0.25 * fall
    return {
        "user_loss": user,
        "distill_loss": 0 * user if mode == "none" else distill + generator.normal(0, 0.003, 30),
        "loss": user + (0 if mode == "none" else weight * distill),
    }


def _metrics(losses: dict[str, dict[str, np.ndarray]]) -> str:
    lines = []
    for place, step in enumerate(range(50, 1501, 50)):
        scalars = {
            f"{kind}/{member}": round(float(values[place]), 6)
            for member, kinds in losses.items()
            for kind, values in kinds.items()
        }
        lines.append(json.dumps({"step": step, **scalars}))
    # A run that was killed leaves its last line cut short.
    return "\n".join([*lines, lines[-1][:20]])


def write_rows(
    workdir: Path, rows: Sequence[dict], passed: int = 30, retrieved: int = 2000
) -> Path:
    """A sweep's workdir of one task whose `results.csv` has just these rows, by hand.

    A row says what matters, the rest has a default: `{"mode": "aux", "seed": 1, "kl": 0.2}`. It
    stands for both splits unless it says for which; `{"test": {"kl": 0.3}}` is what differs there.
    Short names: `kl`, `tau`, `survival`, `weight`, `passed`, `flops`, `alignment`, `true_value` and
    `true_value_for` (where 99% is kept), `coverage` and `covered` (the covered value of labels).
    Costs and candidates follow unless they are given.
    """
    short = {
        "kl": "teacher_kl/watch", "survival": f"survival@{passed}", "weight": "distill_weight",
        "passed": "passed_for_99", "flops": "flops_per_candidate", "alignment": "alignment_ratio",
        "true_value": f"true_value_captured@{passed}", "tau": "teacher_tau",
        "true_value_for": "true_value_for_99", "coverage": f"coverage@{passed}",
        "covered": f"covered_user_value@{passed}",
    }  # fmt: skip
    config = cascade()
    config.data.name, config.tasks = "d", ("watch",)
    config.funnel.retrieved, config.funnel.passed = retrieved, passed
    others, full = _other_keys(config), []
    on_splits = [
        {"split": split, **row, **(row.get("test", {}) if split == "test" else {})}
        for split in SPLITS
        for row in rows
        if row.get("split", split) == split
    ]
    for row in on_splits:
        mode = row.get("mode")
        default = {
            "dataset": "d", "role": "student", "serve": "user", "seed": 0, "data_seed": 0,
            "mode": mode, "step": 9,
            "distill_weight": 0.0 if mode == "none" else 1.0, "non_finite_step": None,
            "distill_loss": None if mode == "none" else "bce", "learning_rate": 0.002,
            "temperature": None if mode == "none" else 1.0, "user_bce/watch": 0.5,
            "user_loss": "bce" if mode else None, "unshown_weight": 0.0 if mode else None,
            "teacher_kl/watch": 0.1, "passed_for_99": 100.0, "flops_per_candidate": 10.0,
            "candidates": float(retrieved),
        }  # fmt: skip
        line = (
            (others if mode else dict.fromkeys(others))
            | default
            | {short.get(name, name): value for name, value in row.items() if name != "test"}
        )
        line["teacher_bce/watch"] = line["teacher_kl/watch"] + 0.4
        line.setdefault("scored_for_99", np.minimum(line["passed_for_99"], line["candidates"]))
        line.setdefault("cost_ratio", line["flops_per_candidate"] / TEACHER_FLOPS)
        line.setdefault("member", f"{mode}-weight{line['distill_weight']}-seed{line['seed']}")
        full.append(line)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json())
    pd.DataFrame(full).to_csv(workdir / results.FILE, index=False)
    return finish(workdir)


def teacher_row() -> dict:
    """The teacher's row for `write_rows`: 200 FLOPs a candidate."""
    return {"role": "teacher", "mode": None, "distill_loss": None, "kl": 0.0,
            "flops": TEACHER_FLOPS, "passed": 10.0, "temperature": None, "tau": 1.0,
            "user_auc/watch": 0.8, "member": "teacher"}  # fmt: skip


def reference_row(name: str, passed: float, **more: object) -> dict:
    """The row of a reference for `write_rows`, in every repeat of the students."""
    return {"role": "reference", "mode": None, "distill_loss": None, "weight": None,
            "temperature": None, "learning_rate": None, "flops": math.nan,
            "member": name, "passed": passed, **more}  # fmt: skip
