"""One entry a metric: what derives from it, and that nothing else has to be touched."""

import itertools
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from kd_ranker.evaluation import metrics, results, totals
from kd_ranker.evaluation.metrics import METRICS, Metric, ReportAt, Sums, ratio
from kd_ranker.evaluation.ranked import Ranked
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.study import read_studies
from kd_ranker.report.tables import comparison, main_table, summary_table
from tests.evaluation.cases import TASKS, VALUE_WEIGHTS, random_case
from tests.report import sweeps


def top_item(ranked: Ranked) -> Sums:
    teacher_value = jnp.where(ranked.mask, ranked.teacher_value, -jnp.inf)
    favourite = jnp.argmax(teacher_value, axis=1)[:, None]
    before = ranked.value > jnp.take_along_axis(ranked.value, favourite, axis=1)
    place = 1 + (before & ranked.mask).sum(axis=1)
    return {"top_item": 1 / place, "top_item_requests": jnp.ones(len(place))}


def liked_kept(ranked: Ranked) -> Sums:
    by_student = jnp.argsort(-ranked.value, axis=1)[..., None]
    positive = ranked.batch.user_label * (ranked.label_weight > 0)[..., None]
    return {"kept": jnp.take_along_axis(positive, by_student, axis=1).cumsum(axis=1)}


RECIPROCAL_RANK = Metric(
    name="top_item_mrr",
    formula="1 / the place of the teacher's favourite in the student's order, a mean over requests",
    title="MRR",
    digits=3,
    better="higher",
    sums=(top_item,),
    ends=lambda sums, _: ratio(sums["top_item"], sums["top_item_requests"]),
    main=(5, "each"),
    summary="each",
)
KEPT_RATE = Metric(
    name="kept_rate",
    formula="the share of the positive labels that the student's top k keeps",
    title="kept rate",
    digits=3,
    better="higher",
    per=("k", "task"),
    sums=(liked_kept,),
    ends=lambda sums, _: ratio(sums["kept"], sums["kept"][-1]),
    main=(5, "first"),
)


@pytest.fixture
def registered():
    with mock.patch.dict(METRICS, {new.name: new for new in (RECIPROCAL_RANK, KEPT_RATE)}):
        yield


@pytest.mark.usefixtures("registered")
def test_a_metric_that_is_put_into_the_table_is_measured():
    case = random_case()
    row = case.row([1, 10])
    value = case.student @ np.asarray(VALUE_WEIGHTS)
    favourites = (case.teacher @ np.asarray(VALUE_WEIGHTS)).argmax(axis=1)
    places = [(-of).argsort().argsort()[top] + 1 for of, top in zip(value, favourites, strict=True)]
    assert row["top_item_mrr"] == pytest.approx(np.mean([1 / place for place in places]))
    positive = case.label * (case.label_weight > 0)[..., None]
    for k, (index, task) in itertools.product((1, 10), enumerate(TASKS)):
        kept = np.take_along_axis(positive[..., index], (-value).argsort(axis=1)[:, :k], axis=1)
        share = kept.sum() / positive[..., index].sum()
        assert row[f"kept_rate@{k}/{task}"] == pytest.approx(share, rel=1e-5)
        curve = totals.curves(case.sums(), TASKS)[f"kept_rate/{task}"]
        assert curve[k - 1] == pytest.approx(share, rel=1e-5)


@pytest.mark.usefixtures("registered")
def test_a_metric_that_is_put_into_the_table_is_in_every_file_and_table(tmp_path):
    columns = results.columns(TASKS, ReportAt(ks=(10, 50)))
    expected = ["top_item_mrr", *(f"kept_rate@{k}/{task}" for k in (10, 50) for task in TASKS)]
    assert columns[-7:] == [*expected, "non_finite_step", "member"]
    assert results.curves_columns(TASKS)[-2:] == ["kept_rate/watch", "kept_rate/like"]

    def measured(frame):
        follows = frame["mode"].map({"none": 0.2, "shared": 0.6}).fillna(1.0)
        luck = 0.01 * frame["seed"]
        return frame.assign(**{"top_item_mrr": follows + luck, "kept_rate@200/watch": follows})

    workdir = sweeps.write_sweep(
        tmp_path, modes=("none", "shared"), weights=(1.0,), seeds=(0, 1), without=sweeps.OF_REQUESTS
    )
    sweeps.change(workdir, measured)
    (study,) = read_studies([workdir])
    estimates = Estimates(study)
    numbers = comparison(study, estimates)
    of_mrr = numbers[numbers["measure"] == "top_item_mrr"].set_index("setting")
    assert of_mrr["best"].to_dict() == {"none": False, "shared, weight 1": True}
    assert of_mrr.loc["shared, weight 1", "difference"] == pytest.approx(0.4)
    table = main_table(study, estimates, numbers)
    assert {"MRR", "kept rate@200 watch"} <= set(table.cells)
    assert list(table.cells.loc[table.cells["mode"] == "none", "MRR"]) == ["0.205 ± 0.064"]
    text = summary_table(results.read_csv(workdir / results.FILE), 200)
    assert "MRR" in text.splitlines()[0]
    assert "0.205±0.005" in text


def test_a_sum_is_computed_once_however_many_metrics_use_it():
    calls = []

    def once(ranked: Ranked) -> Sums:
        calls.append(1)
        return {"once": ranked.mask.sum(axis=1)}

    more = {
        name: RECIPROCAL_RANK._replace(name=name, sums=(once,), ends=lambda sums, _: sums["once"])
        for name in ("one", "other")
    }
    with mock.patch.dict(METRICS, more):
        row = random_case().row([1])
    assert row["one"] == row["other"] > 0
    # The program of the student, and that of the teacher.
    assert len(calls) == 2


def test_two_sums_of_one_name_are_refused():
    clash = RECIPROCAL_RANK._replace(sums=(lambda ranked: {"user_bce": ranked.mask.sum(axis=1)},))
    with (
        mock.patch.dict(METRICS, {clash.name: clash}),
        pytest.raises(ValueError, match="two sums of the metrics are named user_bce"),
    ):
        random_case().sums()


def test_what_stands_in_the_main_table_is_compared():
    assert all(metric.compared for metric in METRICS.values() if metric.main)


def test_directions():
    directions = {
        "user_bce/watch": "lower", "teacher_bce": "lower", "teacher_kl/like": "lower",
        "passed_for_99": "lower", "passed_for_99.5": "lower", "cost_ratio": "lower",
        "user_auc/watch": "higher",
        "survival@200": "higher", "value_captured@50": "higher", "funnel_cost_saving": "higher",
        "user_calibration/watch": "one", "alignment_ratio": None,
    }  # fmt: skip
    assert {column: metrics.metric_of(column).better for column in directions} == directions
    assert metrics.metric_of("distill_weight") is None


def test_the_main_tables_columns_and_titles():
    titles = [metrics.title_of(column) for column in metrics.main_columns(("a", "b"), 200)]
    assert titles == [
        "passed for 99%", "saving", "cost ratio", "survival@200", "value@200", "true value@200",
        "hit rate@200 a", "end-to-end hit rate@200 a", "teacher KL", "alignment ratio", "AUC a",
        "AUC b", "user BCE a", "user BCE b",
    ]  # fmt: skip


def test_the_terminals_columns_and_titles():
    columns = metrics.summary_columns(("a", "b"), 200)
    assert [metrics.title_of(column, short=True) for column in columns] == [
        "AUC a", "AUC b", "calib. a", "KL a", "alignment", "survival@200", "value@200",
        "true value@200", "hits@200 a", "end hits@200 a", "passed for 99%", "regret",
        "cost ratio", "saving",
    ]  # fmt: skip
