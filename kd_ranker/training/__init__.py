"""The step, its mapping over devices, the loop and what it leaves on disk."""
