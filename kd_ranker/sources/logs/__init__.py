"""A user's own log in Parquet files as a source: `data.name = "parquet"`.

In the order in which a log goes through them: `layout` reads the config, `files` finds the log and
checks its columns, and `engines` opens DuckDB or Spark, on which all passes run: `typed` gives each
value its type, `grouped` makes requests of rows, `numbered` settles ids, `ordered` writes both in
their last order. `faults`, `varying`, `scan` and `leaks` count what the report says, `statistics`
adds up, `encode` turns a piece into requests as they are stored, and `source` has them work
together. `rejected`, `vocabulary` and `data_report` write the files next to the dataset, and
`findings` says what speaks against making one. `unseen` reads a log to be scored by a trained
ranker. `infer` writes a first config for a log, by the facts of `column_facts`.
"""
