"""TREC runs and qrels: first stages, a final ranker's order, and graded labels."""

from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.config.defaults import features


def get_config(variant: str = "") -> ConfigDict:
    """Two runs, of a first stage and of a final ranker; give `--config.data.path`."""
    defaults.check_variant(variant)
    config = defaults.get_config("trec")
    config.data.grades = (2,)  # as TREC Deep Learning counts passages
    config.tasks = ("grade_2",)
    config.value_weights = (1.0,)
    config.data.runs = dict(first="first.run", final="final.run")
    config.data.final = "final"
    config.data.columns = dict(incumbent="first_rank")
    config.data.incumbent_signal = "rank"
    config.data.labels = dict(grade_2="grade_2")
    config.data.teacher = dict(grade_2="final_rank")
    config.data.teacher_signal = "rank"
    config.data.features = features("candidate", "dense", "first_score", "first_rank")
    config.funnel.update(retrieved=1000, passed=100, report_at=(10, 20, 50, 100))
    config.student.item_rows = config.teacher.item_rows = 1  # a document is in few lists
    config.teacher.update(source="logged", stage="passed")
    config.distill.loss = "softmax"  # takes an order
    config.batch.candidates = 64
    return config
