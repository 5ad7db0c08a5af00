"""Embedding tables whose update costs time in proportion to the rows that a batch touches.

lookup          the ids and rows that a batch needs of each table, and their embeddings
row_optimizers  SGD, Adagrad and Adam on the rows of a batch, with duplicate ids added up
cpu_rows        the same for a CPU in C++ (cpu_rows.cc), where there is a compiler
tpu_rows        the write of those rows on a TPU by a Pallas kernel, on request
row_sharding    the rows of a table spread over devices: who holds which, and how others read it
"""
