"""Trackers: where a run's scalars, config and results go, apart from the files of its workdir."""
