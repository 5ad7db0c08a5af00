"""KuaiRand: a short-video feed's log, tested on videos that were shown at random."""

from ml_collections import ConfigDict

from kd_ranker.config import defaults


def get_config(variant: str = "") -> ConfigDict:
    """`:pure` (the default), `:1k` or `:27k`; give `--config.data.path`, the unpacked archive."""
    defaults.check_variant(variant, "pure", "1k", "27k")
    config = defaults.get_config(f"kuairand_{variant or 'pure'}")
    config.data.session_minutes = 30  # the pause that ends a session
    # Random impressions are few: a user has about three a day.
    config.data.random_session_minutes = 720
    config.data.impressions_per_request = 10
    config.data.negatives = 90  # candidates that were not shown
    config.data.test = "random"  # or standard: videos that the app's policies chose
    # The first days of the validation and of the test, in Beijing: a week, and the ten days after.
    config.data.validation_from = "2022-04-22"
    config.data.test_from = "2022-04-29"
    config.data.train_requests = 200_000  # 0 takes all
    config.data.validation_requests = 5_000
    config.data.test_requests = 10_000
    config.data.max_users = 0  # number of users to keep; 0 keeps all
    config.data.author_rows = 8192  # number of category ids that authors are hashed into
    config.data.music_rows = 8192
    if variant in ("1k", "27k"):
        config.data.author_rows = config.data.music_rows = 1 << 20
        # Most of the millions of videos occur once or twice.
        for model in (config.student, config.teacher):
            model.item_rows = 1 << 20
    config.funnel.retrieved = 100
    config.funnel.passed = 30
    config.funnel.report_at = (10, 20, 30, 50)
    config.batch.requests = 64
    config.batch.candidates = 48
    config.teacher.batch.requests = 128
    config.train.steps = 3000
    config.teacher.train.steps = 3000
    return config
