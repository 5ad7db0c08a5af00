"""Logs of the user's own, as Parquet files."""
