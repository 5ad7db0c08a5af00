"""A user's own log in Parquet files as a source: `data.name = "parquet"`.

In the order in which a log goes through them: `layout` reads the config, `files` finds the log and
checks its columns, `scan` finds when each request was made, `plan` cuts the requests into buckets
in the order of time, `partition` brings the rows of each bucket together on disk, `group` makes
requests of a bucket's rows and says what is wrong with them, `statistics` adds up what training
requests hold, `encode` turns a bucket into `Request`s, `candidate_rows` keeps which row each of
their candidates was, `rejected` and `data_report` write what is told of the log, and `source` has
them work together. `write_back` writes a log back with the columns of a teacher that was trained on
its dataset. `guess` writes a first config for a log from a part of it.
"""
