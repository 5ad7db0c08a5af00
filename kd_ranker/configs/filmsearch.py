"""Film search: real queries, labels by people, and a final ranker that reads full texts."""

from ml_collections import ConfigDict

from kd_ranker.config import defaults
from kd_ranker.config.defaults import feature, features
from kd_ranker.sources.filmsearch import (
    COSINE,
    FACTS,
    FUSION,
    LEXICAL,
    PASSED,
    RETRIEVED,
    STAGE_COLUMNS,
)


def get_config(variant: str = "") -> ConfigDict:
    """The default setting; give `--config.data.path`, or leave it empty to download.

    The early ranker may read all numbers of the final ranker, as each is there before it runs. In
    `:lexical` it lacks the cosine of the sentence vectors, and BM25 has passed the candidates.
    """
    defaults.check_variant(variant, "lexical")
    is_lexical = variant == "lexical"
    incumbent = "bm25" if is_lexical else FUSION
    config = defaults.get_config("filmsearch")
    config.tasks = ("wanted",)
    config.value_weights = (1.0,)
    config.data.title = "film search"
    config.data.columns = dict(incumbent=incumbent, stage=STAGE_COLUMNS[incumbent])
    if not is_lexical:
        config.data.columns.early_scores = f"bm25,{COSINE}"
    config.data.labels = dict(wanted="wanted")
    config.data.teacher = dict(wanted="final_score")
    config.data.features = (
        dict(
            words=feature("context", "bag", length=8, size=8000),
            trigrams=feature("context", "bag", length=32, size=8000),
            title=feature("item", "bag", length=6, size=8000),
            people=feature("item", "bag", length=3, size=8000),
            genres=feature("item", "bag", length=3),
            tags=feature("item", "bag", length=4, size=2000),
        )
        | features("item", "dense", *FACTS, "year")
        | features("candidate", "dense", *LEXICAL, *([] if is_lexical else [COSINE]))
    )
    config.funnel.update(retrieved=RETRIEVED, passed=PASSED, report_at=(10, 20, 50, 100, 200))
    config.teacher.update(source="logged", stage="passed")
    # Microseconds on one machine, by `scripts/bench.py film_search`: docs/filmsearch.md has more.
    config.costs.teacher.candidate = 2.2
    config.costs.teacher.request = 1850.0
    config.costs.student.candidate = 0.12
    config.costs.rivals = {
        "incumbent": 0.07,
        "rank fusion": 0.07,
        "trees on labels": 1.0,
        "trees on stages": 1.0,
        "trees on scores": 1.0,
    }
    config.student.name = "two_tower"
    config.batch.candidates = 100
    config.optimizer.learning_rate = config.optimizer.table_learning_rate = 1e-2
    return config
