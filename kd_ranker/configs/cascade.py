"""The built-in cascade: 2,000 retrieved, 200 passed, 10 shown, true probabilities known."""

from ml_collections import ConfigDict

from kd_ranker.config import defaults


def get_config(variant: str = "") -> ConfigDict:
    """Configure the default world, `:items`, where users differ less, or `:small`, a quick check.

    In `:items` a list of items that ignores the user ranks nearly as well as the final ranker.
    """
    defaults.check_variant(variant, "items", "small")
    config = defaults.get_config("cascade")
    # At 1, the item by itself explains no more than in public data: docs/concepts.md, "How
    # personal".
    config.data.taste = 0.0 if variant == "items" else 1.0
    config.data.test_requests = 2000
    for optimizer in (config.optimizer, config.teacher.optimizer):
        optimizer.learning_rate = 1e-2
        optimizer.weight_decay = 0.1
        optimizer.table_weight_decay = 1.0
    # An early ranker must learn by item id what the final ranker reads from costly features.
    config.optimizer.table_learning_rate = 6e-3
    config.train.steps = 1000
    config.teacher.train.steps = 600
    if variant == "small":
        _shrink(config)
    return config


def _shrink(config: ConfigDict) -> None:
    config.data.num_users = 50
    config.data.num_items = 300
    config.data.train_requests = 64
    config.data.validation_requests = config.data.test_requests = 12
    config.funnel.retrieved, config.funnel.passed = 100, 30
    config.funnel.report_at = (10, 30, 60)
    config.batch.requests, config.batch.candidates = 8, 32
    config.teacher.batch.requests = 16
    for train in (config.train, config.teacher.train):
        train.steps = 20
        train.log_every = 5
        train.checkpoint_every = train.eval_every = 10
        train.eval_limit = 8
