"""Modes and losses: a student between user labels and the teacher's probabilities."""
