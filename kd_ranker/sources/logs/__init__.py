"""A user's own log in Parquet files as a source: `data.name = "parquet"`.

In the order in which a log goes through them: `layout` reads the config, `files` finds the log and
checks its columns, `scan` finds the time of each request, `plan` cuts the requests into buckets in
the order of time, `partition` brings the rows of each bucket together on disk, `assemble` makes
requests of a bucket's rows and finds faults among them, `log_statistics` adds up training requests,
`encode` turns a bucket into `Request`s, `candidate_rows` keeps the row of each of their candidates,
`rejected` and `data_report` write down faults and figures of the log, and `source` has them work
together. `write_back` writes a log back with the columns of a teacher that was trained on
its dataset. `guess` writes a first config for a log from a part of it.
"""
