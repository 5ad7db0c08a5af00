"""How the chosen students trained, by step: what `metrics.jsonl` of their cohorts says."""

from pathlib import Path

import pandas as pd

from kd_ranker.cohorts.plan import FOLDER
from kd_ranker.reporting.study import Study
from kd_ranker.training.loop import scalar_name
from kd_ranker.training.workdir import METRICS_FILE, read_metrics

USER_LOSS = "user_loss"
GRADIENT_NORM = "gradient_norm/dense"


def training_curves(study: Study) -> pd.DataFrame:
    """Return the loss and the norm of the gradient of each method's chosen setting by step.

    The columns are `method`, `setting`, `step`, `USER_LOSS` and `GRADIENT_NORM`, means over the
    setting's repeats at the steps that all of them have. Runs without metrics are left out.
    """
    metrics = [_metrics_of(Path(folder)) for folder in study.configs]
    curves = []
    for method, setting in study.chosen.items():
        runs = study.rows.loc[study.rows["setting"] == setting, ["source", "run"]]
        of_repeats = []
        for source, run in runs.drop_duplicates().itertuples(index=False):
            names = {scalar_name(name, run): name for name in (USER_LOSS, GRADIENT_NORM)}
            if names.keys() <= {*metrics[source].columns}:
                of_run = metrics[source][["step", *names]].rename(columns=names)
                of_repeats.append(of_run.dropna())
        if of_repeats:
            by_step = pd.concat(of_repeats).groupby("step", as_index=False)
            # A mean of other repeats would make the line jump.
            means = by_step.mean()[by_step.size()["size"] == len(of_repeats)]
            curves.append(means.assign(method=method, setting=setting))
    return pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()


def _metrics_of(folder: Path) -> pd.DataFrame:
    """Return the lines of a sweep's cohorts, or of a single run; a column has the name of a run."""
    paths = [*sorted(folder.glob(f"{FOLDER}/*/{METRICS_FILE}")), *folder.glob(METRICS_FILE)]
    return pd.DataFrame([scalars for path in paths for scalars in read_metrics(path)])
