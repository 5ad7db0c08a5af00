"""Checks of what students, and teachers, are to learn from, before anything long begins."""

from collections.abc import Collection, Iterable, Mapping

import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict

from kd_ranker.distillation.losses import LOSSES
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import Columns, Counts, slices
from kd_ranker.requests.records import Dataset
from kd_ranker.training import recipes

_STAGES_ARE_NONE = {"stage": "stages are an order"}


def check_students(
    members: Iterable[ConfigDict], orders: Mapping[str, str] = _STAGES_ARE_NONE
) -> None:
    """Checks what students learn from, as far as their configs tell.

    Args:
      members: the configs of the students to train.
      orders: signals that are no probabilities -> why not.

    Raises:
      UserError: a student has nothing to learn from, or a loss that takes probabilities where there
        is an order alone.
    """
    for member in members:
        distill, terms = member.distill, recipes.terms_of(member)
        weighs = distill.weight and any(distill.term_weights or (1,))
        if terms and not distill.user_weight and not weighs:
            key = "distill.term_weights" if distill.weight else "distill.weight"
            raise UserError(
                f"distill.user_weight=0 and {key}=0 leave a student of mode {distill.mode} nothing "
                "to learn from; raise one of them"
            )
        for loss, signal in terms:
            if LOSSES[loss].needs_probabilities and signal in orders:
                name = "distill.terms" if distill.terms else "distill.loss"
                others = sorted(name for name, of in LOSSES.items() if not of.needs_probabilities)
                choices = [*(f"{name}={other}" for other in others), "distill.mode=none"]
                raise UserError(
                    f"{name}={loss} needs the teacher's probabilities, and {orders[signal]}; "
                    f"choose one of: {', '.join(choices)}"
                )


def check_signals(config: ConfigDict, dataset: Dataset, members: Collection[ConfigDict]) -> None:
    """Checks that the dataset's log says what students learn from, on some training requests.

    Args:
      config: what the members have in common.
      dataset: the one that they learn from.
      members: the configs of the students to train.

    Raises:
      UserError: a loss takes probabilities where the log holds positions; or the log has no
        teacher, no stages or no candidate of a `teacher.stage`, and a student learns from them.
    """
    signals = {term.signal for member in members for term in recipes.terms_of(member)}
    counts = dataset.columns["train"].counts
    of_stage = {"shown": counts.shown, "passed": counts.passed - counts.shown}
    for member in members:
        stage = member.teacher.stage
        from_teacher = any(term.signal == "logged" for term in recipes.terms_of(member))
        if from_teacher and stage in of_stage and not of_stage[stage].any():
            raise UserError(
                f"teacher.stage={stage}: in the training requests of {config.data.name}, no "
                f"candidate has {stage} as its furthest stage; choose another one"
            )
    from_log = config.teacher.source == "logged" and "logged" in signals
    if from_log and dataset.spec.teacher_signal == "rank":
        check_students(members, {"logged": f"the log of {config.data.name} holds its positions"})
    known = _is_logged(dataset.columns["train"])
    if from_log and not known.any():
        raise UserError(
            f"the signal logged says nothing: no training request of {config.data.name} holds "
            "a proper number of its teacher; look at the columns and the version that data.* "
            "names, or choose distill.mode=none"
        )
    missing = [
        f"{task} the weight {weight:g}"
        for task, weight, there in zip(config.tasks, config.value_weights, known, strict=True)
        if weight and not there
    ]
    if config.teacher.source == "logged" and known.any() and missing:
        raise UserError(
            f"value_weights gives {', '.join(missing)}, and no training request of "
            f"{config.data.name} holds a proper number of the teacher for it, so the teacher's "
            "value is unknown everywhere; set that weight to 0, or leave the task out of tasks"
        )
    if "stage" in signals and not _came_differently_far(counts):
        raise UserError(
            f"the signal stage says nothing: all candidates of a request of {config.data.name} "
            "came equally far; choose teacher.signal=logged, or distill.mode=none"
        )


def check_labels(config: ConfigDict, dataset: Dataset) -> None:
    """Raises UserError for a split without any user label."""
    for split, columns in dataset.columns.items():
        shown, labels = columns.counts.shown, columns.labels
        weights = (labels.fields(of, shown[of])["label_weight"] for of in slices(shown))
        if not any((weight > 0).any() for weight in weights):
            raise UserError(
                f"no {split} request of {config.data.name} has a user label; give labels of a "
                "positive weight to shown candidates"
            )


def check_log(config: ConfigDict, dataset: Dataset) -> None:
    """Raises UserError for a teacher that is to learn from probabilities that no log holds."""
    spec, weight = dataset.spec, config.teacher.log_weight
    if weight and (not spec.teacher_version or spec.teacher_signal == "rank"):
        raise UserError(
            f"teacher.log_weight={weight:g} needs teacher probabilities, which the log of "
            f"{config.data.name} does not hold; leave it at 0"
        )


def _is_logged(columns: Columns) -> Bool[np.ndarray, "T"]:
    """True for tasks with a proper probability, in about 1,000 requests from all over the log."""
    some = np.arange(0, len(columns), max(1, len(columns) // 1000))
    scored = columns.candidates.fields(some, columns.counts.scored[some])
    return ~np.isnan(scored["teacher_probability"]).all(axis=0)


def _came_differently_far(counts: Counts) -> bool:
    reached = np.stack([counts.shown, counts.passed])
    return bool(((reached > 0) & (reached < counts.retrieved)).any())
