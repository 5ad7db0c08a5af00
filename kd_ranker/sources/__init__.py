"""Raw data to requests: the built-in cascade, public datasets, a user's own logs.

registry        the datasets that `config.data.name` can name
cascade         a simulated feed with known true probabilities
in_memory       requests of a program, written as a dataset
logs            a user's own log: tables and the columns that a config names
converted       the way from raw files to such a log, shared by the public datasets below
movielens, kuairand, recflow, filmsearch
                public datasets
ranking_files   TREC runs with qrels, and LETOR files
sentences       sentence embeddings, for `filmsearch`
"""
