"""The entry points: flags in, one library call, and what it found as text."""
