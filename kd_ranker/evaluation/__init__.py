"""How good rankers are: agreement with labels and the teacher, the funnel's yield, its cost.

evaluate      one pass over the requests that sums what all rankers need; `ranked` is their input
metrics/      the metrics: one table of formulas, `registry`, from sums to columns
agreement     AUC, calibration, cross entropy, NDCG and tau of a batch; `funnel`: curves over k
baselines     rankers without a model: today's, lists of items, random, the oracle
whole         the requests that the final ranker scored whole, and bounds where there are none
halving       the settings that are behind during training, and stop
saving        costs, choices on validation, and what they save; `setting_names`: settings by name
results       results.csv and the tables beside it; `request_files`: the terms of each request
live_test     how many requests an A/B test or an interleaved test needs
"""
