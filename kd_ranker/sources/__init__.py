"""Raw data to requests: the built-in cascade, public datasets, a user's own logs."""
