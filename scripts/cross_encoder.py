"""Fine-tune a cross-encoder for film search, and see which early rankers it leaves room for.

    python scripts/cross_encoder.py --data=/data/msrd --workdir=runs/cross_encoder

A cross-encoder reads query and film as one text, and costs milliseconds a film. This one is
MiniLM-L6 with one more layer on the state of [CLS], the mean state, and the cosine of the two
segments' mean states. It learns from people's labels of the queries that the final ranker of
`sources/filmsearch.py` learns from, one epoch, by a list loss and a cross-entropy. "Trees on
labels" are LambdaMART on training queries of the log, without any score of a final ranker.

Then it scores the first 500 candidates of some validation and test queries. Two final rankers come
of it: the encoder, and the sum of it and LambdaMART with a weight that validation chooses. Both are
calibrated to people's labels on validation. Four Markdown tables are printed: nDCG@10 of each
ranker by people's labels, with the paired difference to LambdaMART; and for each early and final
ranker, the candidates to pass for 99% of the final ranker's value; those for 99% of nDCG@10, by
people's labels, of the list that it makes of the passed; and the share of its own top that survives
if a tenth is passed. "Trees on its order" learn from the scores of the validation queries. Brackets
are 95% intervals over queries.

Trained weights and scores are kept in the workdir, and a run that was stopped while it scored goes
on there. Take another workdir for other data.
"""

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int
from safetensors.numpy import load_file, save_file
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from kd_ranker.configs.filmsearch import get_config
from kd_ranker.rivals import trees as tree_rivals
from kd_ranker.sources import filmsearch, sentences
from kd_ranker.sources.filmsearch import FEATURES, RANKER, Candidates, Collection, FinalRanker

TOKENS = 32  # of a pair
QUERY_TOKENS = 12
QUERIES_PER_STEP = 2
FILMS_PER_QUERY = 24  # in a step
LEARNING_RATE = 5e-5
WARM_UP = 0.1  # of the steps
SCORED = 200  # queries of each split
CANDIDATES = 500  # of a query
EARLY_QUERIES = 3000  # training queries of the trees that an early ranker could be
BLENDS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_BATCH = 256  # pairs that are scored at a time

# Rankers, as the tables name them.
BM25 = "BM25"
COSINE = "cosine"
FUSION = "fusion, k0 60"
ON_LABELS = "trees on labels"
LAMBDAMART = "LambdaMART"
ENCODER = "encoder"
BLENDED = "LambdaMART + encoder"
ON_ORDER = "trees on its order"
EARLY_RANKERS = (BM25, COSINE, FUSION, ON_LABELS, LAMBDAMART)
FINAL_RANKERS = (LAMBDAMART, ENCODER, BLENDED)

Parameters = dict[str, Any]


class Pairs(NamedTuple):
    """Texts of a query and a film, as tokens."""

    tokens: Int[np.ndarray, "pairs tokens"]
    mask: Bool[np.ndarray, "pairs tokens"]
    segments: Int[np.ndarray, "pairs tokens"]


class Texts:
    """The tokens of queries and films, without those at the ends."""

    def __init__(self, collection: Collection, tokenizer: Any) -> None:
        self.queries = [_ids(tokenizer, text) for text in collection.queries]
        self.films = [_ids(tokenizer, text) for text in filmsearch.film_texts(collection.films)]
        self.first = tokenizer.token_to_id("[CLS]")
        self.end = tokenizer.token_to_id("[SEP]")

    def pairs(self, query: int, films: Sequence[int]) -> Pairs:
        """Return [CLS] query [SEP] film [SEP] for each film, cut to `TOKENS` tokens."""
        tokens = np.zeros((len(films), TOKENS), np.int32)
        segments = np.zeros_like(tokens)
        mask = np.zeros(tokens.shape, bool)
        head = [self.first, *self.queries[query][:QUERY_TOKENS], self.end]
        for row, film in enumerate(films):
            pair = [*head, *self.films[film]]
            pair = [*pair[: TOKENS - 1], self.end]
            tokens[row, : len(pair)] = pair
            segments[row, len(head) : len(pair)] = 1
            mask[row, : len(pair)] = True
        return Pairs(tokens, mask, segments)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def new_parameters(weights: Mapping[str, Array]) -> Parameters:
    """Return the encoder's weights, and a head that starts as the cosine of both segments."""
    head = np.zeros(2 * sentences.WIDTH + 1, np.float32)
    head[-1] = 5.0
    # The pooler and the list of positions are not used.
    unused = ("pooler", "embeddings.position_ids")
    encoder = {name: value for name, value in weights.items() if not name.startswith(unused)}
    return {"encoder": encoder, "head": jnp.asarray(head), "bias": jnp.zeros(())}


def score(parameters: Parameters, pairs: Pairs) -> Float[Array, "pairs"]:
    """Return the score of each pair; higher is better."""
    states = sentences.token_states(parameters["encoder"], *map(jnp.asarray, pairs))

    def mean(chosen: Bool[Array, "pairs tokens"]) -> Float[Array, "pairs 384"]:
        total = jnp.sum(states * chosen[..., None], axis=1)
        return total / jnp.maximum(jnp.sum(chosen, axis=1, keepdims=True), 1)

    query = mean(pairs.mask & (pairs.segments == 0))
    film = mean(pairs.mask & (pairs.segments == 1))
    cosine = jnp.sum(query * film, axis=1) / (
        jnp.linalg.norm(query, axis=1) * jnp.linalg.norm(film, axis=1) + 1e-6
    )
    inputs = jnp.concatenate([states[:, 0], mean(jnp.asarray(pairs.mask)), cosine[:, None]], axis=1)
    return inputs @ parameters["head"] + parameters["bias"]


class Batch(NamedTuple):
    """The films of some queries, for a training step."""

    pairs: Pairs  # of all films of the first query, then of the second one, ...
    label: Float32[np.ndarray, "queries films"]  # 1 if a person wanted the film
    is_labeled: Bool[np.ndarray, "queries films"]  # False on padding


def loss(parameters: Parameters, batch: Batch) -> Float[Array, ""]:
    """Return softmax cross-entropy over each query's films, and cross-entropy of each label."""
    label = batch.label
    scores = score(parameters, batch.pairs).reshape(label.shape)
    log_share = jax.nn.log_softmax(jnp.where(batch.is_labeled, scores, -1e9), axis=1)
    positives = jnp.sum(label, axis=1)
    listwise = -jnp.sum(label * log_share, axis=1) / jnp.maximum(positives, 1)
    pointwise = optax.sigmoid_binary_cross_entropy(scores, label)
    pointwise = jnp.sum(pointwise * batch.is_labeled) / jnp.sum(batch.is_labeled)
    return jnp.mean(listwise) + pointwise


def training_batches(
    texts: Texts, labels: Sequence[dict[int, int]], queries: Sequence[int]
) -> Iterator[Batch]:
    """Yield one epoch of batches, in an order drawn with seed 0."""
    generator = np.random.default_rng(0)
    with_positive = [query for query in queries if 1 in labels[query].values()]
    order = generator.permutation(with_positive)
    for start in range(0, len(order) - QUERIES_PER_STEP + 1, QUERIES_PER_STEP):
        parts = []
        label = np.zeros((QUERIES_PER_STEP, FILMS_PER_QUERY), np.float32)
        is_labeled = np.zeros(label.shape, bool)
        for row, query in enumerate(order[start : start + QUERIES_PER_STEP]):
            films = generator.permutation(list(labels[query]))[:FILMS_PER_QUERY].tolist()
            label[row, : len(films)] = [labels[query][film] for film in films]
            is_labeled[row, : len(films)] = True
            padding = [films[0]] * (FILMS_PER_QUERY - len(films))
            parts.append(texts.pairs(query, films + padding))
        pairs = Pairs(
            tokens=np.concatenate([part.tokens for part in parts]),
            mask=np.concatenate([part.mask for part in parts]),
            segments=np.concatenate([part.segments for part in parts]),
        )
        yield Batch(pairs, label, is_labeled)


def fine_tune(batches: Sequence[Batch]) -> Parameters:
    """Train the pretrained encoder and a new head, one step per batch."""
    pretrained, _ = sentences.pretrained()
    parameters = new_parameters(pretrained)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, int(WARM_UP * len(batches)), len(batches)
    )
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    state = optimizer.init(parameters)

    @jax.jit
    def step(
        parameters: Parameters, state: optax.OptState, batch: Batch
    ) -> tuple[Parameters, optax.OptState, Float[Array, ""]]:
        value, gradient = jax.value_and_grad(loss)(parameters, batch)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    began = time.process_time()
    losses = []
    for batch in tqdm(batches, desc="train", mininterval=10):
        parameters, state, value = step(parameters, state, batch)
        losses.append(float(value))
    seconds = time.process_time() - began
    first = losses[: len(losses) // 10]
    last = losses[-len(losses) // 10 :]
    print(
        f"trained {len(batches)} steps of {QUERIES_PER_STEP * FILMS_PER_QUERY} pairs in "
        f"{seconds:,.0f} CPU seconds; mean loss of the first and last tenth: "
        f"{np.mean(first):.3f}, {np.mean(last):.3f}"
    )
    return parameters


def save_parameters(path: Path, parameters: Parameters) -> None:
    """Write the fine-tuned weights, numbered in the order of their leaves."""
    leaves = jax.tree.leaves(parameters)
    part = path.with_suffix(".part")
    save_file({str(index): np.asarray(leaf) for index, leaf in enumerate(leaves)}, part)
    part.rename(path)


def load_parameters(path: Path) -> Parameters:
    """Read weights that `save_parameters` has written."""
    pretrained, _ = sentences.pretrained()
    structure = jax.tree.structure(new_parameters(pretrained))
    stored = load_file(path)
    return jax.tree.unflatten(structure, [stored[str(index)] for index in range(len(stored))])


def score_films(
    path: Path,
    parameters: Parameters,
    texts: Texts,
    films: Mapping[int, Int[np.ndarray, "n"]],
) -> dict[int, Float32[np.ndarray, "n"]]:
    """Return the scores of the films of each query, and store them in a file per query.

    Files of other weights, texts or candidates are not read: the folder is named by their digest.
    """
    compiled = jax.jit(score)
    digest = hashlib.sha256(repr((texts.queries, texts.films)).encode())
    for query in films:
        digest.update(repr((query, films[query].tolist())).encode())
    for leaf in jax.tree.leaves(parameters):
        digest.update(np.asarray(leaf).tobytes())
    folder = path / digest.hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    scores = {}
    for query in tqdm(films, desc="score", mininterval=10):
        file = folder / f"{query}.npy"
        if not file.exists():
            part = file.with_suffix(".part.npy")
            np.save(part, _score_query(compiled, parameters, texts, query, films[query]))
            part.rename(file)
        scores[query] = np.load(file)
    return scores


def _score_query(
    compiled: Callable[[Parameters, Pairs], Array],
    parameters: Parameters,
    texts: Texts,
    query: int,
    films: Int[np.ndarray, "n"],
) -> Float32[np.ndarray, "n"]:
    """Score the films of a query in batches of equal size, so that one program is compiled."""
    num_batches = -(-len(films) // _BATCH)
    # The last batch repeats films.
    padded = np.resize(films, num_batches * _BATCH)
    scores = [
        np.asarray(compiled(parameters, texts.pairs(query, batch.tolist())))
        for batch in np.split(padded, num_batches)
    ]
    return np.concatenate(scores)[: len(films)]


class Query(NamedTuple):
    """The first candidates of a query by BM25."""

    features: Float32[np.ndarray, "n F"]
    label: Int[np.ndarray, "n"]
    scores: dict[str, Float[np.ndarray, "n"]]  # by the ranker; `BLENDED` is not among them

    def score(self, ranker: str, blend: float) -> Float[np.ndarray, "n"]:
        """Return the numbers that a ranker sorts by; `blend` is the encoder's weight in a sum."""
        if ranker == BLENDED:
            return self.scores[LAMBDAMART] + blend * self.scores[ENCODER]
        return self.scores[ranker]


def score_query(
    candidates: Candidates,
    encoder_score: Float32[np.ndarray, "n"],
    trees: FinalRanker,
    early_trees: FinalRanker,
) -> Query:
    """Score the first candidates of a query by all rankers; `early_trees` saw other queries."""
    features = candidates.features[:CANDIDATES]
    columns = dict(zip(FEATURES, features.T, strict=True))
    bm25 = columns["bm25"]
    cosine = columns[filmsearch.COSINE]
    scores = {
        BM25: bm25,
        COSINE: cosine,
        FUSION: filmsearch.fuse(bm25, cosine),
        ON_LABELS: np.asarray(early_trees.trees.predict(features)),
        LAMBDAMART: np.asarray(trees.trees.predict(features)),
        ENCODER: encoder_score,
    }
    return Query(features, candidates.label[:CANDIDATES], scores)


def ndcg(score: Float[np.ndarray, "n"], label: Int[np.ndarray, "n"]) -> float:
    """Return nDCG@10 of the labeled films; NaN without one that is wanted."""
    is_labeled = label >= 0
    order = np.argsort(-score[is_labeled], kind="stable")
    best = _dcg(-np.sort(-label[is_labeled]))
    return _dcg(label[is_labeled][order]) / best if best else float("nan")


def _dcg(label: Int[np.ndarray, "n"]) -> float:
    """Return DCG@10 of the labels in an order."""
    gain = label[:10]
    discount = 1 / np.log2(2 + np.arange(len(gain)))
    return float(gain @ discount)


def value_curve(
    early: Float[np.ndarray, "n"], value: Float[np.ndarray, "n"], shown: int
) -> Float[np.ndarray, "n"]:
    """Return the summed value of the best `shown` of the first k candidates, for k = 1 … n."""
    ordered = value[np.argsort(-early, kind="stable")]
    best: list[float] = []
    curve = np.empty(len(ordered))
    for place, candidate_value in enumerate(ordered):
        best = sorted([*best, candidate_value], reverse=True)[:shown]
        curve[place] = sum(best)
    return curve


def people_curve(
    early: Float[np.ndarray, "n"], value: Float[np.ndarray, "n"], label: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "n"]:
    """Return nDCG@10 by labels of the list that a final ranker makes of the first k, for each k.

    Films without a label are left out of the list. The ideal list is that of all films. NaN without
    one that is wanted.
    """
    place = np.argsort(np.argsort(-early, kind="stable"))
    order = np.argsort(-value, kind="stable")
    order = order[label[order] >= 0]
    best = _dcg(-np.sort(-label[order]))
    curve = np.full(len(early), np.nan)
    if best == 0:
        return curve
    # The list changes only where a film with a label joins.
    changes = np.sort(place[order])
    curve[: changes[0]] = 0.0
    for start, end in zip(changes, [*changes[1:], len(early)], strict=True):
        has_joined = place[order] <= start
        curve[start:end] = _dcg(label[order[has_joined]]) / best
    return curve


def survival(early: Float[np.ndarray, "n"], value: Float[np.ndarray, "n"], shown: int) -> float:
    """Return the share of the `shown` candidates of most value among the first tenth."""
    passed = np.argsort(-early, kind="stable")[: len(early) // 10]
    top = np.argsort(-value, kind="stable")[:shown]
    return float(np.isin(top, passed).mean())


def passed_for_99(curves: Float[np.ndarray, "queries n"]) -> int:
    """Return the smallest k that keeps 99% of the value over all queries."""
    total = curves.sum(axis=0)
    return int(np.argmax(total >= 0.99 * total[-1])) + 1


def _with_interval(curves: Float[np.ndarray, "queries n"]) -> str:
    """Return `passed_for_99` as text, with its interval over queries drawn with replacement."""
    draws = np.random.default_rng(0).integers(0, len(curves), (1000, len(curves)))
    low, high = np.quantile([passed_for_99(curves[queries]) for queries in draws], [0.025, 0.975])
    return f"{passed_for_99(curves)} ({low:.0f} to {high:.0f})"


def report(validation: Sequence[Query], test: Sequence[Query], shown: int) -> None:
    """Print the four tables."""
    blend = _best_blend(validation)
    print(f"\nweight of the encoder, chosen on {len(validation)} validation queries: {blend}\n")
    _report_quality(test, blend)

    cells = {}
    for final in FINAL_RANKERS:
        learned = _trees_on_order(final, validation, blend, shown)
        learned_scores = [np.asarray(learned.predict(query.features)) for query in test]
        quality = [
            ndcg(score, query.label) for query, score in zip(test, learned_scores, strict=True)
        ]
        print(f"\nnDCG@10 of trees on the order of {final}: {np.nanmean(quality):.3f}")
        values = _probabilities(final, validation, test, blend)
        for early in EARLY_RANKERS:
            scores = [query.score(early, blend) for query in test]
            cells[early, final] = _measure(scores, values, test, shown)
        cells[ON_ORDER, final] = _measure(learned_scores, values, test, shown)

    _print_table("for 99% of", {pair: cell.for_value for pair, cell in cells.items()})
    _print_table("for people's 99% under", {pair: cell.for_people for pair, cell in cells.items()})
    _print_table("kept of", {pair: cell.survival for pair, cell in cells.items()})


def _best_blend(queries: Sequence[Query]) -> float:
    """Return the weight of the encoder with the highest mean nDCG@10."""
    means = []
    for blend in BLENDS:
        quality = [ndcg(query.score(BLENDED, blend), query.label) for query in queries]
        means.append(np.nanmean(quality))
    return BLENDS[int(np.argmax(means))]


def _report_quality(queries: Sequence[Query], blend: float) -> None:
    """Print nDCG@10 of each ranker, with the paired difference to LambdaMART."""
    names = [*EARLY_RANKERS, ENCODER, BLENDED]
    quality = np.empty((len(queries), len(names)))
    for row, query in enumerate(queries):
        quality[row] = [ndcg(query.score(name, blend), query.label) for name in names]
    quality = quality[~np.isnan(quality).any(axis=1)]
    mean = quality.mean(axis=0)
    gap = quality - quality[:, [names.index(LAMBDAMART)]]
    mean_gap = gap.mean(axis=0)
    half_width = 1.96 * gap.std(axis=0, ddof=1) / len(gap) ** 0.5
    print(f"| ranker | nDCG@10, {len(quality)} test queries | minus LambdaMART |\n|---|---|---|")
    for index, name in enumerate(names):
        difference = f"{mean_gap[index]:+.3f} ± {half_width[index]:.3f}"
        print(f"| {name} | {mean[index]:.3f} | {difference} |")


class Cells(NamedTuple):
    """What an early ranker leaves room for under a final one: a cell in each of three tables."""

    for_value: str  # candidates to pass for 99% of the final ranker's value
    for_people: str  # for 99% of nDCG@10 by labels
    survival: str  # of the final ranker's own top, if a tenth is passed


def _measure(
    scores: Sequence[Float[np.ndarray, "n"]],
    values: Sequence[Float[np.ndarray, "n"]],
    queries: Sequence[Query],
    shown: int,
) -> Cells:
    """Measure an early ranker's scores of each query under a final ranker's values."""
    value_curves = []
    people_curves = []
    survivals = []
    for score, value, query in zip(scores, values, queries, strict=True):
        value_curves.append(value_curve(score, value, shown))
        people_curves.append(people_curve(score, value, query.label))
        survivals.append(survival(score, value, shown))
    by_people = np.array(people_curves)
    by_people = by_people[~np.isnan(by_people).any(axis=1)]
    return Cells(
        for_value=_with_interval(np.array(value_curves)),
        for_people=_with_interval(by_people),
        survival=f"{np.mean(survivals):.1%}",
    )


def _print_table(title: str, cells: Mapping[tuple[str, str], str]) -> None:
    """Print a table of early rankers by final rankers."""
    header = " | ".join(f"{title} {final}" for final in FINAL_RANKERS)
    print(f"\n| early ranker | {header} |")
    print("|---" * (len(FINAL_RANKERS) + 1) + "|")
    for early in (*EARLY_RANKERS, ON_ORDER):
        row = " | ".join(cells[early, final] for final in FINAL_RANKERS)
        print(f"| {early} | {row} |")


def _trees_on_order(final: str, queries: Sequence[Query], blend: float, shown: int) -> Any:
    """Return small trees that learned the order of a final ranker from all candidates."""
    numbers = np.concatenate([query.features for query in queries])
    places = []
    for query in queries:
        order = np.argsort(-query.score(final, blend), kind="stable")
        places.append(np.argsort(order))
    data = tree_rivals.TreeData(
        numbers=numbers,
        sizes=np.array([len(query.features) for query in queries]),
        stage=np.zeros(len(numbers), int),
        user_value=np.zeros(len(numbers)),
        final_place=np.concatenate(places).astype(float),
        draw=np.zeros(len(numbers)),
    )
    no_rates = np.zeros((1, 0), np.float32)
    return tree_rivals.fit(data, "scores", no_rates, shown, with_rates=False).model


def _probabilities(
    final: str, validation: Sequence[Query], test: Sequence[Query], blend: float
) -> list[Float[np.ndarray, "n"]]:
    """Return the probability that a person wants each film of the test, by a logistic curve."""
    score = np.concatenate([query.score(final, blend) for query in validation])
    label = np.concatenate([query.label for query in validation])
    is_labeled = label >= 0
    curve = LogisticRegression().fit(score[is_labeled, None], label[is_labeled])
    slope = float(curve.coef_[0, 0])
    intercept = float(curve.intercept_[0])
    return [expit(slope * query.score(final, blend) + intercept) for query in test]


def main() -> None:
    """Train what is missing, score, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the raw files")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--vectors", type=Path, help="the folder of the sentence vectors' file")
    flags = parser.parse_args()
    flags.workdir.mkdir(parents=True, exist_ok=True)
    config = get_config()
    seed = int(config.data.seed)

    collection = filmsearch.read(flags.data)
    vectors = filmsearch.sentence_vectors(collection, flags.vectors or flags.workdir)
    retriever = filmsearch.Retriever(collection, vectors)
    candidates = [
        retriever.retrieve(query)
        for query in tqdm(range(len(collection.queries)), "retrieve", mininterval=10)
    ]
    query_splits = filmsearch.split_queries(collection, candidates, seed)
    groups = query_splits.group
    splits = np.array(query_splits.split)

    def draw_queries(split: str, most: int) -> list[int]:
        queries = np.flatnonzero(splits == split)
        return list(np.random.default_rng(0).permutation(queries)[:most].tolist())

    learned = np.flatnonzero(splits == RANKER).tolist()
    trees = filmsearch.fit_ranker([candidates[query] for query in learned], groups[learned], seed)
    early = draw_queries("train", EARLY_QUERIES)
    early_trees = filmsearch.fit_ranker([candidates[query] for query in early], groups[early], seed)
    _, tokenizer = sentences.pretrained()
    texts = Texts(collection, tokenizer)
    weights = flags.workdir / "encoder.safetensors"
    if not weights.exists():
        batches = list(training_batches(texts, collection.labels, learned))
        save_parameters(weights, fine_tune(batches))
    encoder = load_parameters(weights)

    validation = draw_queries("validation", SCORED)
    test = draw_queries("test", SCORED)
    films = {query: candidates[query].film[:CANDIDATES] for query in (*validation, *test)}
    encoder_scores = score_films(flags.workdir / "scores", encoder, texts, films)
    queries = {
        query: score_query(candidates[query], encoder_scores[query], trees, early_trees)
        for query in films
    }
    report(
        validation=[queries[query] for query in validation],
        test=[queries[query] for query in test],
        shown=int(config.funnel.shown),
    )


if __name__ == "__main__":
    main()
