"""A dataset of requests on disk, and its rows in memory.

request     a dataset before it is built (`Source`), and blocks of requests
row_files   the file of a split: one packed row per request, candidate and label
columns     these rows, read by request without a loop, and the counts by which batches are drawn
storage     writes and opens the folder of a dataset, and a teacher's scores beside it
records     an opened dataset, and its requests one by one, also for TFDS
lock        one process at a time in a folder; `templates`: files written from templates
"""
