"""Distil a final ranker into an early ranker, and measure what that saves in the funnel."""
