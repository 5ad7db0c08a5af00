"""A user's own log as a source: `data.name = "parquet"`.

`layout` reads the config, and `files` finds the log and checks its columns. `database` opens it in
DuckDB, `spark_engine` in Spark. Both run `templates/log.sql`, which makes requests of it, and
`templates/report.sql`, which counts for the report; `query` fills these in. `encode` writes
requests and candidates in their final order, and turns a piece of them into requests as they are
stored. `source` connects the steps. `data_report` and `findings` report on the log. `vocabulary`
makes the ids and scales of a dataset (`Encoding`) and writes them next to it. By these, `source`
also reads the new files of a log that grows, and a log to score. `infer` writes a first config.
"""
