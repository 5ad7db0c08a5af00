"""The entry points: flags in, one library call, and what it found as text."""

import sys

from kd_ranker.training import interruption

# Python says so while `python -m` looks for the entry point, before that imports all that it needs.
if sys.argv[0] == "-m":
    interruption.end_when_asked()
