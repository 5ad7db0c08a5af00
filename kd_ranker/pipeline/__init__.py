"""The work of the entry points: prepare, train, sweep, measure, score, report."""
