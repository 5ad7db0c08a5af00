"""How many to pass per request, in a sweep: fitted on validation, measured on test, reported."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from kd_ranker import api, manifest
from kd_ranker.batches.cutting import evaluation_batches
from kd_ranker.evaluation import results
from kd_ranker.evaluation.policy import FILE, named
from kd_ranker.pipeline.job import open_finished
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.study import read_studies
from kd_ranker.serving import check
from kd_ranker.serving.programs import fields_of
from tests.faults import fault_of
from tests.small import SWEEP

POLICIES = ("uniform", "threshold")


@pytest.fixture(scope="module")
def swept(world, tmp_path_factory):
    """The small sweep, measured again with policies."""
    workdir = tmp_path_factory.mktemp("policies") / "sweep"
    shutil.copytree(world.sweep(), workdir)
    config = world.config(**SWEEP, funnel__policies=POLICIES)
    api.sweep(config, workdir)
    return workdir


def test_measured_on_test_alone(swept):
    rows = results.read_csv(swept / results.FILE)
    for policy in named(POLICIES):
        known = rows[f"scored_by/{policy}"].notna()
        assert set(rows.loc[known, "split"]) == {"test"}
        assert set(rows.loc[known, "role"]) == {"student"}
    students = rows[(rows["role"] == "student") & (rows["split"] == "test")]
    assert (students["scored_by/hindsight"] <= students["scored_by/threshold"]).all()
    # One k for all saves nothing over one k for all, except where more candidates add no value.
    assert (students["saving_by/uniform"] <= 1e-6).all()


def test_sums_of_requests_give_the_measures(swept):
    (kept,) = (results.read_requests(folder) for folder in swept.glob("cohorts/*/test"))
    rows = results.read_csv(swept / results.FILE)
    rows = rows[(rows["split"] == "test") & (rows["role"] == "student")]
    for row in rows.to_dict("records"):
        sums = kept.each[row["member"], row["serve"]].sums
        for policy in named(POLICIES):
            scored = sums[f"policy_scored/{policy}"].mean()
            assert scored == pytest.approx(row[f"scored_by/{policy}"], rel=1e-5)


def test_an_export_answers_with_the_measured_k(swept, tmp_path):
    out = tmp_path / "out"
    api.export(swept, out, formats=("jax",), policy="threshold")
    described = json.loads((out / "export.json").read_text())
    assert described["policy"] == "threshold"
    assert described["programs"]["score"]["outputs"]["k"]["dtype"] == "int32"
    assert "`threshold` chooses it" in (out / "README.md").read_text()
    assert set(check.largest_differences(out, "jax")) >= {"k", "value"}
    dataset = open_finished(swept).dataset
    (of,) = evaluation_batches(dataset, "test", requests=12, candidates=100)
    fields = {name: np.asarray(array) for name, array in fields_of(of.batch).items()}
    programs = check.open_programs(out, "jax")
    answer = check.rank(programs, check.read_tables(out) | fields)
    (kept,) = (results.read_requests(folder) for folder in swept.glob("cohorts/*/test"))
    measured = kept.each[described["member"], described["serve"]].sums["policy_scored/threshold"]
    assert answer["k"].tolist() == measured.tolist()
    assert len({*measured}) > 1
    fields["candidate_mask"] = fields["candidate_mask"] & (np.arange(len(measured)) > 0)[:, None]
    padding = check.rank(programs, check.read_tables(out) | fields)
    assert padding["k"].tolist() == [0, *measured[1:]]


def test_a_policy_that_there_is_not_is_named_in_a_line(swept, world, tmp_path):
    def fault(workdir, **options):
        return fault_of(api.export, workdir, tmp_path / "out", **{"formats": ("jax",)} | options)

    assert "choose one of: learned, threshold, uniform" in fault(swept, policy="best")
    assert "leave --policy out" in fault(world.student("aux"), policy="threshold")
    assert "use --formats=jax" in fault(swept, policy="uniform", formats=("jax", "onnx"))
    member = open_finished(swept).member
    text = fault(swept, member=member, policy="learned")
    assert "has uniform, threshold by its probabilities" in text
    assert "funnel.policies" in text
    (test,) = swept.glob("cohorts/*/test")
    assert FILE in manifest.read(test, "")["files"]
    assert "has none by its probabilities" in fault(world.sweep(), policy="uniform")


def test_other_policies_are_measured_anew(swept, world, tmp_path):
    workdir = tmp_path / "sweep"
    shutil.copytree(swept, workdir)
    api.sweep(world.config(**SWEEP, funnel__policies=("threshold",)), workdir)
    (study,) = read_studies([workdir])
    estimates = Estimates(study)
    assert tuple(estimates.policies) == ("threshold", "hindsight")
    before, after = (results.read_csv(folder / results.FILE) for folder in (swept, workdir))
    column = "scored_by/threshold"
    pd.testing.assert_series_equal(before[column], after[column])
    for setting in study.tested["setting"].unique():
        for policy in estimates.policies:
            of = estimates.of(str(setting), f"scored_by/{policy}")
            assert of.low <= of.mean <= of.high
