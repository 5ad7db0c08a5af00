"""What each ranker of film search costs per candidate, one query of 1,000 candidates at a time.

Needs the extra `filmsearch`, the raw files in `--data`, and a dataset that was made of them in
`--data-dir`. Embeddings and sentence vectors of films are ready before a query comes. The student
is served in parts, as `export` writes it. The final ranker pays for the vector of the query, whose
share is that of 1,000 candidates, for the cosines and for the trees. 64 vectors are computed at a
time. An encoder that reads the text of each candidate pays for a vector of a film.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd_ranker import configs
from kd_ranker.batch import Stage
from kd_ranker.batches import cutting
from kd_ranker.distillation.modes import MODES
from kd_ranker.pipeline.datasets import dataset_of
from kd_ranker.rivals import registry
from kd_ranker.rivals.candidates import Candidates
from kd_ranker.serving import check, programs
from kd_ranker.sources import filmsearch, sentences
from kd_ranker.sources.filmsearch import FEATURES
from kd_ranker.training import specs
from scripts.benchmarks import measuring

TRAINING, TEXTS = 2000, 64


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times all in turn; microseconds per candidate."""
    config = configs.filmsearch()
    config.data.path, config.data.dir = arguments.data, arguments.data_dir
    dataset, size = dataset_of(config), config.funnel.retrieved
    model, init = specs.student_model(config, dataset.spec)
    parameters, mode = jax.jit(lambda: init(jax.random.key(0), 0))(), MODES["aux"]
    batch = cutting.whole_batch(dataset.columns["test"], np.zeros(1, int), np.arange(size)[None])
    exported = programs.make_programs(
        programs.Servable(
            model, parameters, dataset.spec, dataset.items, mode.serve["teacher"], (1.0,)
        )
    )
    arrays = jax.device_put(programs.fields_of(batch) | exported.tables)
    parts = jax.jit(lambda given: check.rank(exported.programs, given)["value"])

    collection = filmsearch.read(Path(arguments.data))
    films, queries = filmsearch.vectors_of(collection, Path(arguments.data_dir) / "logs")
    retrieve = filmsearch.retriever(collection, lambda query, film: films[film] @ queries[query])
    found = [retrieve(query) for query in range(TRAINING)]
    trees, curve = filmsearch.fit_ranker(found, np.arange(TRAINING), 0)
    trees.set_params(n_jobs=1)
    film, features, _ = found[0]
    texts = filmsearch.texts_of(collection.films[:TEXTS])
    task = registry.Task(dataset, config.value_weights, config.funnel.shown, Stage.PASSED)
    rivals = {rival.name: rival.scorer for rival in registry.fit(task, ("trees",))}
    early_trees: Any = rivals["trees on labels: without item rates"]
    query = Candidates(dataset, "test", slice(0, 1))
    numbers = query.numbers(early_trees.rates)[:, : early_trees.model.num_feature()]
    bm25, cosine = features[:, FEATURES.index("bm25")], features[:, FEATURES.index("minilm")]
    sides = {
        "student": lambda: jax.block_until_ready(parts(arrays)),
        "BM25 and the features": lambda: retrieve(0),
        "a vector of a query": lambda: sentences.embed(collection.queries[:TEXTS]),
        "a vector of a film": lambda: sentences.embed(texts),
        "cosines": lambda: films[film] @ queries[0],
        "fusion of two scores": lambda: filmsearch.fused(bm25, cosine),
        "early ranker of trees": lambda: early_trees.model.predict(numbers, num_threads=1),
        "trees": lambda: curve.predict_proba(trees.predict(features)[:, None]),
    }
    shares = {"a vector of a query": TEXTS * size, "a vector of a film": TEXTS}
    milliseconds = measuring.interleaved(sides, turns=4)
    return {
        "microseconds per candidate": {
            name: 1e3 * of["median"] / shares.get(name, size) for name, of in milliseconds.items()
        },
        "number of trees": trees.best_iteration_,
        "ms": milliseconds,
    }
