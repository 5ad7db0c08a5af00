"""The config of a run: its keys, their defaults and checks, and the runs of a sweep.

keys        the table of all keys; each is declared only here
schema      lookups over this table, digests of configs, and the page docs/config.md
defaults    the parts of a config file: every default, and features of a user's own log
checks      the faults of a config, found before anything long begins
runs        the list of a sweep's runs, and the config of each
"""
