"""Many students."""
