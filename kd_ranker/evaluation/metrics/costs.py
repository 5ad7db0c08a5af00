"""Compute and savings: `results` and `saving` fill these columns in."""

from kd_ranker.evaluation.metrics.metric import Metric
from kd_ranker.evaluation.metrics.target import SCORED

METRICS = (
    Metric(
        name="flops_per_candidate",
        formula="FLOPs of the model as compiled for a CPU, wherever it runs, on a request of N "
        "retrieved, over N; heads that `serve` does not read are not served, and not counted",
        better="lower",
        title="FLOPs",
    ),
    Metric(
        name="cost_ratio",
        formula="`flops_per_candidate` of the student over the teacher's",
        better="lower",
    ),
    Metric(
        name="funnel_cost_saving",
        formula="1 − cost / cost of the best ranker that needs no scores of the final ranker, in "
        f"the same repeat, where cost = `candidates` · student FLOPs + `{SCORED}` · teacher "
        "FLOPs, or in the unit of `costs`. The best ranker is chosen on validation: of the student "
        "that passes fewest, the lists, the rivals and the incumbent, the one with the cheapest "
        "funnel. Filled in for a whole sweep",
        better="higher",
        title="saving",
        digits=3,
    ),
    Metric(
        name="saving_over_none",
        formula="the same against the best setting of plain mode `none`",
        better="higher",
        digits=3,
    ),
    Metric(
        name="saving_over_incumbent",
        formula="the same against the early ranker that filled the log, at a cost of 0 for that "
        "ranker; empty where the log does not name it",
        better="higher",
        title="saving over the incumbent",
        digits=3,
    ),
)
