"""A user's own log as a source: `data.name = "parquet"`. A file imports only those above it here.

* `sql` quotes names and texts; `times` reads times that are texts.
* `layout` reads the config; `columns` checks the columns of the log by it.
* `files` lists the files of the log and reads their schemas; `pages` checks their checksums.
* `query` fills in the SQL in `templates/`; `database` runs it in DuckDB, `spark_engine` in Spark.
* `encode` orders requests and reads them in blocks. `vocabulary` makes the ids and scales of a
  dataset (`Encoding`), and keeps them next to it. `tables` opens a log in an engine by all of this.
* `written_after` finds columns that no model may read. `data_report` counts, `findings` names the
  faults of a log as a whole, `verdict` refuses a log for them.
* `extend` checks and reports on the new files of a log that grows. `source` connects all steps to
  a `Source`. `unseen` reads a log to score. `infer` writes a first config.
"""
