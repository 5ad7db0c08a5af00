"""Rankers of other architectures, which students have to beat.

    candidates   what a rival reads: candidates of requests as flat arrays
    fusion       scores that a log has before the final ranker: one, by rank, and as a sum
    trees        LambdaMART of LightGBM on labels, on stages, and on the final ranker's order
    ease         EASE, a linear model of users' histories
    registry     which of these apply to a dataset, and all of them fitted

Each has a few settings. Validation chooses among them, as it does for students.
"""
