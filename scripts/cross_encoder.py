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
from collections.abc import Iterator, Mapping, Sequence
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
from kd_ranker.sources.filmsearch import FEATURES, RANKER, Candidates, Collection

TOKENS, QUERY_TOKENS = 32, 12
QUERIES_A_STEP, FILMS_A_QUERY = 2, 24
LEARNING_RATE, WARM_UP = 5e-5, 0.1
SCORED, CANDIDATES = 200, 500
OTHERS = 3000  # training queries of the trees that an early ranker could be
BLENDS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_SCORED_AT_A_TIME = 256

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
        self.films = [_ids(tokenizer, text) for text in filmsearch.texts_of(collection.films)]
        self.first = tokenizer.token_to_id("[CLS]")
        self.end = tokenizer.token_to_id("[SEP]")

    def pairs(self, query: int, films: Sequence[int]) -> Pairs:
        """Return [CLS] query [SEP] film [SEP] for each film, cut to `TOKENS` tokens."""
        tokens = np.zeros((len(films), TOKENS), np.int32)
        segments = np.zeros_like(tokens)
        mask = np.zeros(tokens.shape, bool)
        head = [self.first, *self.queries[query][:QUERY_TOKENS], self.end]
        for row, film in enumerate(films):
            both = [*head, *self.films[film]]
            text = [*both[: TOKENS - 1], self.end]
            tokens[row, : len(text)] = text
            segments[row, len(head) : len(text)] = 1
            mask[row, : len(text)] = True
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
    states = sentences.token_states(parameters["encoder"], *pairs)

    def mean(chosen: Bool[Array, "pairs tokens"]) -> Float[Array, "pairs 384"]:
        total = jnp.sum(states * chosen[..., None], axis=1)
        return total / jnp.maximum(jnp.sum(chosen, axis=1, keepdims=True), 1)

    query = mean(pairs.mask & (pairs.segments == 0))
    film = mean(pairs.mask & (pairs.segments == 1))
    cosine = jnp.sum(query * film, axis=1) / (
        jnp.linalg.norm(query, axis=1) * jnp.linalg.norm(film, axis=1) + 1e-6
    )
    inputs = jnp.concatenate([states[:, 0], mean(pairs.mask), cosine[:, None]], axis=1)
    return inputs @ parameters["head"] + parameters["bias"]


def loss(
    parameters: Parameters, pairs: Pairs, label: Float[Array, "Q F"], known: Bool[Array, "Q F"]
) -> Float[Array, ""]:
    """Return softmax cross-entropy over each query's films, and cross-entropy of each label."""
    scores = score(parameters, pairs).reshape(label.shape)
    log_share = jax.nn.log_softmax(jnp.where(known, scores, -1e9), axis=1)
    positives = jnp.sum(label, axis=1)
    listwise = -jnp.sum(label * log_share, axis=1) / jnp.maximum(positives, 1)
    pointwise = optax.sigmoid_binary_cross_entropy(scores, label)
    return jnp.mean(listwise) + jnp.sum(pointwise * known) / jnp.sum(known)


def training_steps(
    texts: Texts, labels: Sequence[dict[int, int]], queries: Sequence[int]
) -> Iterator[tuple[Pairs, np.ndarray, np.ndarray]]:
    """Yield one epoch of batches, in an order drawn with seed 0."""
    generator = np.random.default_rng(0)
    order = generator.permutation([of for of in queries if 1 in labels[of].values()])
    for start in range(0, len(order) - QUERIES_A_STEP + 1, QUERIES_A_STEP):
        parts = []
        label = np.zeros((QUERIES_A_STEP, FILMS_A_QUERY), np.float32)
        known = np.zeros(label.shape, bool)
        for row, query in enumerate(order[start : start + QUERIES_A_STEP]):
            films = generator.permutation(list(labels[query]))[:FILMS_A_QUERY].tolist()
            known[row, : len(films)] = True
            label[row, : len(films)] = [labels[query][film] for film in films]
            padded = films + [films[0]] * (FILMS_A_QUERY - len(films))
            parts.append(texts.pairs(query, padded))
        yield Pairs(*map(np.concatenate, zip(*parts, strict=True))), label, known


def trained(
    path: Path, texts: Texts, labels: Sequence[dict[int, int]], queries: Sequence[int]
) -> Parameters:
    """Return the fine-tuned weights, from the workdir if they are there."""
    weights, _ = sentences.pretrained()
    parameters = new_parameters(weights)
    leaves, tree = jax.tree.flatten(parameters)
    if path.exists():
        stored = load_file(path)
        return jax.tree.unflatten(tree, [stored[str(place)] for place in range(len(leaves))])
    batches = list(training_steps(texts, labels, queries))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, int(WARM_UP * len(batches)), len(batches)
    )
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters: Parameters, state: Any, *batch: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(parameters, *batch)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    began, losses = time.process_time(), []
    for batch in tqdm(batches, desc="train", mininterval=10):
        parameters, state, value = step(parameters, state, *batch)
        losses.append(float(value))
    seconds = time.process_time() - began
    print(
        f"trained {len(batches)} steps of {QUERIES_A_STEP * FILMS_A_QUERY} pairs in "
        f"{seconds:,.0f} CPU seconds; mean loss of the first and last tenth: "
        f"{np.mean(losses[: len(losses) // 10]):.3f}, {np.mean(losses[-len(losses) // 10 :]):.3f}"
    )
    leaves = jax.tree.leaves(parameters)
    part = path.with_suffix(".part")
    save_file({str(place): np.asarray(leaf) for place, leaf in enumerate(leaves)}, part)
    part.rename(path)
    return parameters


def scores_of(
    path: Path,
    parameters: Parameters,
    texts: Texts,
    films: Mapping[int, Int[np.ndarray, "n"]],
) -> dict[int, Float32[np.ndarray, "n"]]:
    """Return the scores of the films of each query; a file keeps those of each query.

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
    found = {}
    for query in tqdm(films, desc="score", mininterval=10):
        file = folder / f"{query}.npy"
        if not file.exists():
            number = len(films[query])
            whole = -(-number // _SCORED_AT_A_TIME) * _SCORED_AT_A_TIME
            pairs = texts.pairs(query, np.resize(films[query], whole).tolist())
            parts = [
                np.asarray(compiled(parameters, Pairs(*(part[start : start + _SCORED_AT_A_TIME]
                                                        for part in pairs))))
                for start in range(0, whole, _SCORED_AT_A_TIME)
            ]  # fmt: skip
            part = file.with_suffix(".part.npy")
            np.save(part, np.concatenate(parts)[:number])
            part.rename(file)
        found[query] = np.load(file)
    return found


def ndcg(score: Float[np.ndarray, "n"], label: Int[np.ndarray, "n"]) -> float:
    """Return nDCG@10 of the labeled films; NaN without one that is wanted."""
    labeled = label >= 0
    gain = label[labeled][np.argsort(-score[labeled], kind="stable")][:10]
    ideal = -np.sort(-label[labeled])[:10]
    discount = 1 / np.log2(2 + np.arange(10))
    best = float(ideal @ discount[: len(ideal)])
    return float(gain @ discount[: len(gain)]) / best if best else float("nan")


def value_curve(
    early: Float[np.ndarray, "n"], value: Float[np.ndarray, "n"], shown: int
) -> Float[np.ndarray, "n"]:
    """Return the summed value of the best `shown` of the first k candidates, for k = 1 … n."""
    ordered = value[np.argsort(-early, kind="stable")]
    kept: list[float] = []
    curve = np.empty(len(ordered))
    for place, one in enumerate(ordered):
        kept = sorted([*kept, one], reverse=True)[:shown]
        curve[place] = sum(kept)
    return curve


def passed_for_99(curves: Float[np.ndarray, "queries n"]) -> int:
    """Return the smallest k that keeps 99% of the value over all queries."""
    total = curves.sum(axis=0)
    return int(np.argmax(total >= 0.99 * total[-1])) + 1


def draws(queries: int) -> Int[np.ndarray, "1000 queries"]:
    """Return places of queries, drawn with replacement."""
    return np.random.default_rng(0).integers(0, queries, (1000, queries))


def main() -> None:
    """Trains what is missing, scores, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the raw files")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--vectors", type=Path, help="the folder of the sentence vectors' file")
    flags = parser.parse_args()
    flags.workdir.mkdir(parents=True, exist_ok=True)
    seed = int(get_config().data.seed)
    collection = filmsearch.read(flags.data)
    films, queries = filmsearch.vectors_of(collection, flags.vectors or flags.workdir)
    retrieve = filmsearch.retriever(collection, lambda query, film: films[film] @ queries[query])
    candidates = [
        retrieve(query)
        for query in tqdm(range(len(collection.queries)), "retrieve", mininterval=10)
    ]
    best = {
        query: int(found.film[found.label.argmax()])
        for query, found in enumerate(candidates)
        if found.label.max() > 0
    }
    groups = filmsearch.groups_of(collection, best)
    splits = np.array(filmsearch.splits_of(groups, seed))
    learns = np.flatnonzero(splits == RANKER)
    trees, _ = filmsearch.fit_ranker([candidates[of] for of in learns], groups[learns], seed)
    others = np.random.default_rng(0).permutation(np.flatnonzero(splits == "train"))[:OTHERS]
    early, _ = filmsearch.fit_ranker([candidates[of] for of in others], groups[others], seed)
    texts = Texts(collection, sentences.pretrained()[1])
    encoder = trained(flags.workdir / "encoder.safetensors", texts, collection.labels, learns)

    chosen = {
        split: np.random.default_rng(0).permutation(np.flatnonzero(splits == split))[:SCORED]
        for split in ("validation", "test")
    }
    first = {
        int(query): candidates[query].film[:CANDIDATES] for of in chosen.values() for query in of
    }
    by_encoder = scores_of(flags.workdir / "scores", encoder, texts, first)
    of_queries = {
        query: Scored.of(candidates[query], by_encoder[query], trees, early) for query in first
    }
    report(
        [of_queries[int(query)] for query in chosen["validation"]],
        [of_queries[int(query)] for query in chosen["test"]],
        shown=int(get_config().funnel.shown),
    )


class Scored(NamedTuple):
    """The first candidates of a query by BM25, with the scores of all rankers."""

    features: Float32[np.ndarray, "n F"]
    label: Int[np.ndarray, "n"]
    bm25: Float[np.ndarray, "n"]
    cosine: Float[np.ndarray, "n"]
    trees: Float[np.ndarray, "n"]
    early_trees: Float[np.ndarray, "n"]  # trained on other queries
    encoder: Float[np.ndarray, "n"]

    @classmethod
    def of(cls, found: Candidates, encoder: np.ndarray, trees: Any, early_trees: Any) -> "Scored":
        """Join the scores of one query."""
        features = found.features[:CANDIDATES]
        columns = dict(zip(FEATURES, features.T, strict=True))
        return cls(
            features,
            found.label[:CANDIDATES],
            columns["bm25"],
            columns["minilm"],
            np.asarray(trees.predict(features)),
            np.asarray(early_trees.predict(features)),
            encoder,
        )

    def orders(self, blend: float) -> dict[str, Float[np.ndarray, "n"]]:
        """Return the numbers that each ranker sorts by."""
        return {
            "BM25": self.bm25,
            "cosine": self.cosine,
            "fusion, k0 60": filmsearch.fused(self.bm25, self.cosine),
            "trees on labels": self.early_trees,
            "LambdaMART": self.trees,
            "encoder": self.encoder,
            "LambdaMART + encoder": self.trees + blend * self.encoder,
        }


def report(validation: Sequence[Scored], test: Sequence[Scored], shown: int) -> None:
    """Print both tables."""
    means = [
        np.nanmean([ndcg(of.orders(blend)["LambdaMART + encoder"], of.label) for of in validation])
        for blend in BLENDS
    ]
    blend = BLENDS[int(np.argmax(means))]
    print(f"\nweight of the encoder, chosen on {len(validation)} validation queries: {blend}\n")
    orders = [of.orders(blend) for of in test]
    names = list(orders[0])
    quality = np.array(
        [
            [ndcg(order[name], of.label) for name in names]
            for of, order in zip(test, orders, strict=True)
        ]
    )
    quality = quality[~np.isnan(quality).any(axis=1)]
    gap = quality - quality[:, [names.index("LambdaMART")]]
    half = 1.96 * gap.std(axis=0, ddof=1) / len(gap) ** 0.5
    print(f"| ranker | nDCG@10, {len(quality)} test queries | minus LambdaMART |\n|---|---|---|")
    for name, mean, difference, width in zip(
        names, quality.mean(0), gap.mean(0), half, strict=True
    ):
        print(f"| {name} | {mean:.3f} | {difference:+.3f} ± {width:.3f} |")
    finals = ("LambdaMART", "encoder", "LambdaMART + encoder")
    early = [*names[:5], "trees on its order"]
    tables: dict[str, dict[str, list[str]]] = {
        title: {name: [] for name in early}
        for title in ("for 99% of", "for people's 99% under", "kept of")
    }
    at = draws(len(test))
    for final in finals:
        learned = _trees_on_order(validation, [of.orders(blend)[final] for of in validation], shown)
        values = _calibrated(final, validation, test, blend)
        learned_scores = [np.asarray(learned.predict(of.features)) for of in test]
        by_people = [ndcg(score, of.label) for score, of in zip(learned_scores, test, strict=True)]
        print(f"\nnDCG@10 of trees on the order of {final}: {np.nanmean(by_people):.3f}")
        for name in early:
            scores = learned_scores if name == early[-1] else [order[name] for order in orders]
            curves = np.array([*map(value_curve, scores, values, [shown] * len(test))])
            of_people = np.array([
                people_curve(score, value, of.label)
                for score, value, of in zip(scores, values, test, strict=True)
            ])  # fmt: skip
            of_people = of_people[~np.isnan(of_people).any(axis=1)]
            survivals = [*map(survival, scores, values, [shown] * len(test))]
            cells = (
                _needed(curves, at),
                _needed(of_people, draws(len(of_people))),
                f"{np.mean(survivals):.1%}",
            )
            for table, cell in zip(tables.values(), cells, strict=True):
                table[name].append(cell)
    for title, table in tables.items():
        print(f"\n| early ranker | {' | '.join(f'{title} {name}' for name in finals)} |")
        print("|---" * (len(finals) + 1) + "|")
        for name, row in table.items():
            print(f"| {name} | {' | '.join(row)} |")


def _needed(curves: Float[np.ndarray, "queries n"], at: Int[np.ndarray, "1000 queries"]) -> str:
    """The smallest k that keeps 99%, with its interval over the draws `at`."""
    low, high = np.quantile([passed_for_99(curves[places]) for places in at], [0.025, 0.975])
    return f"{passed_for_99(curves)} ({low:.0f} to {high:.0f})"


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
    discount = 1 / np.log2(2 + np.arange(10))
    ideal = -np.sort(-label[order])[:10]
    best = float(ideal @ discount[: len(ideal)])
    curve = np.full(len(early), np.nan)
    if best == 0:
        return curve
    # The list changes only where a film with a label joins.
    changes = np.sort(place[order])
    curve[: changes[0]] = 0.0
    for start, end in zip(changes, [*changes[1:], len(early)], strict=True):
        gain = label[order[place[order] <= start]][:10]
        curve[start:end] = float(gain @ discount[: len(gain)]) / best
    return curve


def survival(early: Float[np.ndarray, "n"], value: Float[np.ndarray, "n"], shown: int) -> float:
    """Return the share of the `shown` candidates of most value among the first tenth."""
    passed = np.argsort(-early, kind="stable")[: len(early) // 10]
    top = np.argsort(-value, kind="stable")[:shown]
    return float(np.isin(top, passed).mean())


def _trees_on_order(
    queries: Sequence[Scored], score: Sequence[Float[np.ndarray, "n"]], shown: int
) -> Any:
    """Return small trees that learned the order of a final ranker from all candidates."""
    numbers = np.concatenate([of.features for of in queries])
    place = np.concatenate([np.argsort(np.argsort(-of, kind="stable")) for of in score])
    data = tree_rivals.TreeData(
        numbers=numbers,
        sizes=np.array([len(of) for of in score]),
        stage=np.zeros(len(numbers), int),
        user_value=np.zeros(len(numbers)),
        final_place=place.astype(float),
        draw=np.zeros(len(numbers)),
    )
    no_rates = np.zeros((1, 0), np.float32)
    return tree_rivals.fit(data, "scores", no_rates, shown, with_rates=False).model


def _calibrated(
    final: str, validation: Sequence[Scored], test: Sequence[Scored], blend: float
) -> list[Float[np.ndarray, "n"]]:
    """Return the probability that a person wants each film of the test, by a logistic curve."""
    score = np.concatenate([of.orders(blend)[final] for of in validation])
    label = np.concatenate([of.label for of in validation])
    curve = LogisticRegression().fit(score[label >= 0, None], label[label >= 0])
    slope, start = float(curve.coef_[0, 0]), float(curve.intercept_[0])
    return [expit(slope * of.orders(blend)[final] + start) for of in test]


if __name__ == "__main__":
    main()
