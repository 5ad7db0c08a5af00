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

TRAINING = 2000  # queries
TEXTS = 64


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times all in turn; microseconds per candidate."""
    config = configs.filmsearch()
    config.data.path, config.data.dir = arguments.data, arguments.data_dir
    dataset = dataset_of(config)
    size = config.funnel.retrieved
    model, init = specs.student_model(config, dataset.spec)
    parameters = jax.jit(lambda: init(jax.random.key(0), 0))()
    batch = cutting.whole_batch(dataset.columns["test"], np.zeros(1, int), np.arange(size)[None])
    exported = programs.make_programs(
        programs.Servable(
            model=model,
            parameters=parameters,
            spec=dataset.spec,
            items=dataset.items,
            probability=MODES["aux"].serve["teacher"],
            value_weights=(1.0,),
        )
    )
    arrays = jax.device_put(programs.fields_of(batch) | exported.tables)
    rank = jax.jit(lambda inputs: check.rank(exported.programs, inputs)["value"])

    collection = filmsearch.read(Path(arguments.data))
    vectors = filmsearch.sentence_vectors(collection, Path(arguments.data_dir) / "logs")
    retriever = filmsearch.Retriever(collection, vectors)
    retrieved = [retriever.retrieve(query) for query in range(TRAINING)]
    ranker = filmsearch.fit_ranker(retrieved, np.arange(TRAINING), 0)
    ranker.trees.set_params(n_jobs=1)
    film, features, _ = retrieved[0]
    texts = filmsearch.film_texts(collection.films[:TEXTS])
    task = registry.Task(dataset, config.value_weights, config.funnel.shown, Stage.PASSED)
    rivals = {rival.name: rival.scorer for rival in registry.fit(task, ("trees",))}
    early_trees: Any = rivals["trees on labels: without item rates"]
    query = Candidates(dataset, "test", slice(0, 1))
    numbers = query.numbers(early_trees.rates)[:, : early_trees.model.num_feature()]
    bm25 = features[:, FEATURES.index("bm25")]
    cosine = features[:, FEATURES.index("minilm")]
    sides = {
        "student": lambda: jax.block_until_ready(rank(arrays)),
        "BM25 and the features": lambda: retriever.retrieve(0),
        "a vector of a query": lambda: sentences.embed(collection.queries[:TEXTS]),
        "a vector of a film": lambda: sentences.embed(texts),
        "cosines": lambda: vectors.cosine(0, film),
        "fusion of two scores": lambda: filmsearch.fuse(bm25, cosine),
        "early ranker of trees": lambda: early_trees.model.predict(numbers, num_threads=1),
        "trees": lambda: ranker.probability(features),
    }
    shares = {"a vector of a query": TEXTS * size, "a vector of a film": TEXTS}
    milliseconds = measuring.interleaved(sides, turns=4)
    return {
        "microseconds per candidate": {
            name: 1e3 * times["median"] / shares.get(name, size)
            for name, times in milliseconds.items()
        },
        "number of trees": ranker.trees.best_iteration_,
        "ms": milliseconds,
    }
