"""Sources of requests, requests on disk, and batches."""
