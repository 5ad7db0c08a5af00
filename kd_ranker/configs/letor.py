"""LETOR (SVMRank) files: a query's documents as numeric features with graded labels."""

from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.config.defaults import feature

# Variant -> features of a document, and the highest grade.
_SETS = {"mq2008": (46, 2), "mslr": (136, 4), "istella": (220, 4)}
_SCORED = "_scores"


def get_config(variant: str = "") -> ConfigDict:
    """`:mq2008` (the default), `:mslr` or `:istella`; give `--config.data.path`.

    A teacher is trained here. With `:mq2008_scores` and the like, it is the ranker that wrote
    `train.scores`, `vali.scores` and `test.scores`.
    """
    defaults.check_variant(variant, *_SETS, *(f"{name}{_SCORED}" for name in _SETS))
    config = defaults.get_config("letor")
    number, highest = _SETS[variant.removesuffix(_SCORED) or "mq2008"]
    config.data.num_features = number
    config.data.grades = tuple(range(1, highest + 1))
    config.tasks = tuple(f"grade_{least}" for least in config.data.grades)
    # The sum of these over the labels that hold is 2 ** grade - 1, the gain of nDCG.
    config.value_weights = tuple(2.0 ** (least - 1) for least in config.data.grades)
    config.data.labels = {task: task for task in config.tasks}
    config.data.features = dict(features=feature("candidate", "dense"))
    config.data.features.features.length = config.data.get_ref("num_features")
    config.funnel.update(retrieved=1500, passed=100, report_at=(10, 20, 50, 100))
    config.student.item_rows = config.teacher.item_rows = 1  # documents occur once
    config.distill.loss = "softmax"  # takes an order
    if variant.endswith(_SCORED):
        config.data.scores = "{split}.scores"
        config.data.teacher = dict.fromkeys(config.tasks, "final_rank")
        config.data.teacher_signal = "rank"
        config.teacher.source = "logged"
    config.batch.candidates = 64
    return config
