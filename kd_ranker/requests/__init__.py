"""A request, and datasets of them on disk."""
