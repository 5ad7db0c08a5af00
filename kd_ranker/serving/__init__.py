"""Trained rankers at work: logs that they score."""
