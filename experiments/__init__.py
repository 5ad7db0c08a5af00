"""The commands as modules, for `python -m experiments.NAME` in a clone; see `kd_ranker.main`."""
