"""The built-in cascade: 2,000 retrieved, 200 passed, 10 shown, true probabilities known."""

from ml_collections import ConfigDict

from kd_ranker.config import defaults


def get_config(variant: str = "") -> ConfigDict:
    """Configure the default world, `:items`, where users differ less, or `:small`, a quick check.

    In `:items` a list of items that ignores the user ranks nearly as well as the final ranker.
    """
    defaults.check_variant(variant, "items", "small")
    config = defaults.get_config("cascade")
    # At 1, the item by itself explains no more than in public data: docs/cascade.md, "How
    # personal".
    config.data.taste = 0.0 if variant == "items" else 1.0
    config.data.test_requests = 2000
    for optimizer in (config.optimizer, config.teacher.optimizer):
        optimizer.update(learning_rate=1e-2, weight_decay=0.1, table_weight_decay=1.0)
    # An early ranker must learn by item id what the final ranker reads from costly features.
    config.optimizer.table_learning_rate = 6e-3
    config.train.steps = 1000
    config.teacher.train.steps = 600
    if variant == "small":
        config.data.update(num_users=50, num_items=300, train_requests=64)
        config.data.update(validation_requests=12, test_requests=12)
        config.funnel.update(retrieved=100, passed=30, report_at=(10, 30, 60))
        config.batch.update(requests=8, candidates=32)
        config.teacher.batch.requests = 16
        for train in (config.train, config.teacher.train):
            train.update(steps=20, log_every=5, checkpoint_every=10, eval_every=10, eval_limit=8)
    return config
