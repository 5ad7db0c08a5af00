"""A first config for a log: what its columns seem to be, and why.

`sample` reads a bounded part of the log, `names` says what names of columns mean and `evidence`
what their values do; from both, `roles` guesses what each column is, `features` what a ranker may
read of the rest, and `funnel` how many candidates pass where; `first_config` has them work together
and writes the guesses as a config file.
"""
