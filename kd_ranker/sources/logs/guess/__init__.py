"""A first config for a log: what its columns seem to be, and why.

`sample` reads a bounded part of the log, `names` judges columns by their names and `evidence` by
their values; from both, `roles` guesses the role of each column, `feature_guesses` the features
among the rest, and `funnel_sizes` how many candidates pass where; `first_config` has them work
together and writes the guesses as a config file.
"""
