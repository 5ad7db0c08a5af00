"""Trained rankers at work: logs that they score, and programs and tables for a server."""
