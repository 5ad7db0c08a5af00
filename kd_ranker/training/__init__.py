"""The step, its mapping over devices, the loop, and the files of a run."""
