"""How the chosen students trained, from the metrics of their cohorts."""

import json

import pytest

from kd_ranker.reporting.study import read_studies
from kd_ranker.reporting.training_curves import GRADIENT_NORM, USER_LOSS, training_curves
from tests.reporting.sweeps import write_sweep

SEEDS = (0, 1)


def write_metrics(sweep, study, steps=(50, 100)):
    """Metrics of all runs in one cohort: a loss of 1000 · number of the run + step."""
    lines = []
    runs = sorted(study.rows["run"].unique())
    for step in steps:
        scalars = {"step": step}
        for number, run in enumerate(runs):
            scalars[f"user_loss/{run}"] = 1000 * number + step
            scalars[f"gradient_norm/dense/{run}"] = float(number)
        lines.append(json.dumps(scalars))
    (sweep / "cohorts" / "0" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 1']))
    return {run: number for number, run in enumerate(runs)}


def test_a_curve_is_the_mean_over_the_repeats_of_the_chosen_setting(tmp_path):
    sweep = write_sweep(tmp_path, seeds=SEEDS)
    (study,) = read_studies([sweep])
    numbers = write_metrics(sweep, study)

    curves = training_curves(study)

    assert list(dict.fromkeys(curves["method"])) == list(study.chosen)
    for method, setting in study.chosen.items():
        runs = study.rows.loc[study.rows["setting"] == setting, "run"].unique()
        assert len(runs) == len(SEEDS)
        mean = sum(numbers[run] for run in runs) / len(runs)
        curve = curves[curves["method"] == method].set_index("step")
        assert curve[USER_LOSS].to_dict() == pytest.approx(
            {step: 1000 * mean + step for step in (50, 100)}
        )
        assert curve[GRADIENT_NORM].unique() == pytest.approx([mean])


def test_a_sweep_without_metrics_has_no_curves(tmp_path):
    (study,) = read_studies([write_sweep(tmp_path)])

    assert training_curves(study).empty
