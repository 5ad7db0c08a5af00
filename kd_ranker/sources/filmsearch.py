"""Film search as a log: queries that people typed, their labels, and a final ranker trained here.

The Movie Search Ranking Dataset (Metarank Labs, CC BY 4.0), as Elastic adapted it: 9,750 films, and
16,279 queries with 24 labeled films each. BM25 (Robertson and Zaragoza, 2009) retrieves the first
1,000 films of a query. An early ranker passes 100 of them: BM25, or its fusion by rank with the
cosine of sentence embeddings (Cormack, Clarke and Büttcher, 2009); the log has the stages of both.
LambdaMART (Burges, 2010) over BM25 by field, facts of a film, and that cosine orders them. It
learns from queries that are not in the log. `docs/filmsearch.md` describes columns and limits.
"""

import csv
import importlib.util
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pooch
import pyarrow as pa
import scipy.sparse
from jaxtyping import Float32, Int, Int64, Shaped
from ml_collections import ConfigDict
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from kd_ranker.errors import UserError
from kd_ranker.sources import sentences
from kd_ranker.sources.converted import Converter, fetch, find_raw, write_rows
from kd_ranker.sources.logs.layout import STAGES

RETRIEVED, PASSED = 1000, 100
RANKER = "ranker"
SPLITS = {RANKER: 0.2, "train": 0.5, "validation": 0.15, "test": 0.15}
"""The share of the queries in each split; the final ranker learns from the first one only."""

# Two queries are near duplicates if their words have at least this Jaccard similarity.
SAME_QUERY = 0.75
LARGE = 0.01  # of all queries: larger groups are for training
FIELDS = ("title", "overview", "people", "characters", "tags", "year")
FACTS = ("popularity", "votes", "rating", "budget")  # of a film; year is one of them too
FEATURES = (*(f"bm25_{name}" for name in FIELDS), "bm25", "title_share", *FACTS, "year", "minilm")
"""The columns that the final ranker reads."""

COSINE, FUSION = "minilm", "fusion"
LEXICAL = tuple(name for name in FEATURES if name not in (*FACTS, "year", COSINE))
"""Those of a candidate that the retrieval by words knows."""

FUSION_CONSTANT = 60  # k0 of the fusion that passes candidates
STAGE_OF = {"bm25": "stage_bm25", FUSION: "stage"}
"""By the early ranker that passed the candidates, the column of their stages."""

_TIME = 1_600_000_000  # seconds; the queries have no time, and a log needs one
_THREADS = 2  # of LightGBM
_TITLE_WEIGHT = 3.0  # of BM25 on titles in the sum over fields
_URL = (
    "https://raw.githubusercontent.com/elastic/elasticsearch-labs/main/notebooks/search/"
    "sample_data/learning-to-rank/"
)
FILES = {
    "movies-corpus.jsonl.gz": "e7dbd5a64fd4ec15d9224795eda8d833fa12da871620ea661a36cca6eefabb00",
    "movies-judgments.tsv.gz": "38f64a511f48192fb2eeea02b54ca0420876a611072e57c1ab773adddc84ce3e",
}
_NEGATIVES = 30  # films without a label, per query, that the final ranker takes as not wanted


class Collection(NamedTuple):
    """The raw data, with films and queries as numbers."""

    films: pd.DataFrame  # one row per film
    queries: list[str]
    labels: list[dict[int, int]]  # of each query, film -> 1 if a person wanted it, 0 if not


class Candidates(NamedTuple):
    """The retrieved films of a query, the best first by BM25."""

    film: Int64[np.ndarray, "n"]
    features: Float32[np.ndarray, "n features"]  # the columns `FEATURES`
    label: Int[np.ndarray, "n"]  # 1 if a person wanted the film, 0 if not, -1 without a label


def words_of(text: str | None) -> list[str]:
    """The words of a text, in lower case.

    >>> words_of("Fast & Furious 6")
    ['fast', 'furious', '6']
    """
    return re.findall(r"\w+", (text or "").lower())


def trigrams_of(words: Sequence[str]) -> list[str]:
    """The different runs of three characters in words with their ends marked, in order.

    >>> trigrams_of(["up", "up"])
    ['^up', 'up$']
    """
    marked = (f"^{word}$" for word in words)
    return [*dict.fromkeys(word[i : i + 3] for word in marked for i in range(len(word) - 2))]


def read(folder: Path) -> Collection:
    """Read the two files; a label of a film that the corpus lacks is left out."""
    corpus, judgments = (folder / name for name in FILES)
    films = pd.read_json(corpus, lines=True, dtype={"id": np.int64})
    films["year"] = films["year"].astype("Int64")
    number = {film: place for place, film in enumerate(films["id"])}
    # Texts hold unbalanced quotation marks.
    judged = pd.read_csv(judgments, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False)
    queries, labels = [], []
    for _, of_query in judged.groupby("query_id", sort=False):
        queries.append(str(of_query["query"].iloc[0]))
        pairs = zip(of_query["doc_id"], of_query["grade"], strict=True)
        labels.append({number[film]: grade for film, grade in pairs if film in number})
    return Collection(films, queries, labels)


def retriever(
    collection: Collection,
    cosine: Callable[[int, Int64[np.ndarray, "n"]], Float32[np.ndarray, "n"]],
) -> Callable[[int], Candidates]:
    """Build the retrieval by BM25; `cosine` is the sentence similarity of a query to films."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    # Logarithms of popularity, votes and budget, rating and year as they are; 0 if unknown.
    known = collection.films[[*FACTS, "year"]].fillna(0).astype(np.float64)
    known[["popularity", "votes", "budget"]] = np.log1p(known[["popularity", "votes", "budget"]])
    facts = known.to_numpy(np.float32)
    films = collection.films
    director = films["director"].astype("string").fillna("")
    films = films.assign(
        people=films["actors"].str.join(" ") + " " + director,
        characters=films["characters"].str.join(" "),
        tags=(films["tags"] + films["genres"]).str.join(" "),
    )
    indices = [bm25s.BM25(k1=1.2, b=0.75) for _ in FIELDS]
    for index, field in zip(indices, FIELDS, strict=True):
        texts = films[field].astype("string").fillna("")
        index.index([words_of(text) for text in texts], show_progress=False)

    def retrieve(query: int) -> Candidates:
        words = words_of(collection.queries[query])
        scores = np.stack(
            [index.get_scores_from_ids(index.get_tokens_ids(words)) for index in indices]
        )
        total = _TITLE_WEIGHT * scores[0] + scores[1:].sum(axis=0)
        film = np.lexsort((-facts[:, 0], -total))[:RETRIEVED].copy()  # not a view of all films
        title_share = scores[0] / max(scores[0].max(), 1e-6)
        columns = [of[film] for of in (*scores, total, title_share, *facts.T)]
        features = np.stack([*columns, cosine(query, film)], axis=1).astype(np.float32)
        labels = collection.labels[query]
        return Candidates(film, features, np.array([labels.get(of, -1) for of in film.tolist()]))

    return retrieve


def groups_of(collection: Collection, best: Mapping[int, int]) -> Int[np.ndarray, "queries"]:
    """Number the groups of queries that must not be separated.

    Two queries share a group if the same film is the best one wanted for both, or if their words
    are nearly the same. Of the films wanted for a query, `best` has the one that BM25 puts first.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    number = len(collection.queries)
    has = CountVectorizer(analyzer=words_of, binary=True).fit_transform(collection.queries)
    shared = (has @ has.T).tocoo()
    size = np.asarray(has.sum(axis=1)).ravel()
    near = shared.data >= SAME_QUERY * (size[shared.row] + size[shared.col] - shared.data)
    query, film = np.array([*best.items()]).T
    ends = (np.r_[shared.row[near], query], np.r_[shared.col[near], number + film])
    nodes = number + len(collection.films)
    edges = scipy.sparse.coo_matrix((np.ones(len(ends[0])), ends), (nodes, nodes))
    return connected_components(edges, directed=False)[1][:number]


def splits_of(groups: Int[np.ndarray, "queries"], seed: int) -> list[str]:
    """The split of each query, with whole groups, in about the shares of `SPLITS`.

    Groups with more than 1% of the queries are for training: one of them in a split of the
    evaluation would outweigh the others there.
    """
    _, of_query, size = np.unique(groups, return_inverse=True, return_counts=True)
    shares, split = dict(SPLITS), np.full(len(size), "train", dtype=object)
    large = size > LARGE * len(groups)
    shares["train"] -= size[large].sum() / len(groups)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~large))
    middle = (np.cumsum(size[order]) - size[order] / 2) / size[order].sum()
    ends = np.cumsum([*shares.values()])[:-1] / sum(shares.values())
    split[order] = np.array([*shares], object)[np.searchsorted(ends, middle, side="right")]
    return list(split[of_query])


def fit_ranker(
    queries: Sequence[Candidates], groups: Int[np.ndarray, "queries"], seed: int
) -> tuple[Any, Any]:
    """Train a final ranker; a fifth of the queries, in whole groups, stops it and calibrates it.

    For the order, 30 random films without a label count as not wanted. For the calibration, only
    labeled films count.

    Returns:
      LambdaMART, and the logistic curve from its score to a probability.
    """
    import lightgbm
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(seed)
    place_of_group = generator.permutation(groups.max() + 1)[groups]
    order = np.argsort(place_of_group, kind="stable")
    kept: list[tuple[Any, Any]] = []
    for _, features, label in (queries[place] for place in order):
        unknown = np.flatnonzero(label < 0)
        extra = generator.choice(unknown, min(_NEGATIVES, len(unknown)), replace=False)
        rows = np.concatenate([np.flatnonzero(label >= 0), extra])
        kept.append((features[rows], label[rows]))
    ordered = place_of_group[order]
    cut = int(np.searchsorted(ordered, ordered[len(queries) * 4 // 5]))

    inputs, labels = (np.concatenate(of) for of in zip(*kept, strict=True))
    sizes = [len(label) for _, label in kept]
    stop, wanted = sum(sizes[:cut]), np.maximum(labels, 0)
    trees = lightgbm.LGBMRanker(
        n_estimators=300, num_leaves=31, learning_rate=0.1, min_child_samples=50, verbose=-1,
        early_stopping_round=20, random_state=seed, deterministic=True, force_row_wise=True,
        n_jobs=_THREADS,
    )  # fmt: skip
    held = dict(eval_X=inputs[stop:], eval_y=wanted[stop:], eval_group=[sizes[cut:]], eval_at=[10])
    trees.fit(inputs[:stop], wanted[:stop], group=sizes[:cut], **held)
    known = stop + np.flatnonzero(labels[stop:] >= 0)
    score = np.asarray(trees.predict(inputs[known]))
    return trees, LogisticRegression().fit(score[:, None], labels[known])


def write(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per query that the final ranker has not learned from."""
    if not all(map(importlib.util.find_spec, ("bm25s", "lightgbm", "sklearn"))):
        raise UserError("film search needs: pip install 'kd_ranker[filmsearch]'")
    collection = read(files[0].parent)
    films, queries = vectors_of(collection, Path(data.dir) / "logs")
    retrieve = retriever(collection, lambda query, film: films[film] @ queries[query])
    numbers = tqdm(range(len(collection.queries)), desc="retrieve", disable=None, leave=False)
    candidates = [retrieve(query) for query in numbers]
    best = {
        query: int(found.film[found.label.argmax()])
        for query, found in enumerate(candidates)
        if found.label.max() > 0
    }
    groups = groups_of(collection, best)
    splits = splits_of(groups, int(data.seed))
    learns = [query for query, split in enumerate(splits) if split == RANKER]
    ranker = fit_ranker([candidates[of] for of in learns], groups[learns], int(data.seed))
    write_rows(folder / "log.parquet", _rows(collection, candidates, splits, ranker))


def vectors_of(
    collection: Collection, folder: Path
) -> tuple[Float32[np.ndarray, "films 384"], Float32[np.ndarray, "queries 384"]]:
    """The sentence vectors of films and queries, kept in `folder`: they take most of the time."""
    path = folder / f"filmsearch-vectors-{sentences.VERSION}.npz"
    if not path.exists():
        films = sentences.embed(texts_of(collection.films), "embed films")
        queries = sentences.embed(collection.queries, "embed queries")
        part = path.with_suffix(".part.npz")
        np.savez(part, films=films, queries=queries)
        part.rename(path)
    stored = np.load(path)
    return stored["films"], stored["queries"]


def texts_of(films: pd.DataFrame) -> list[str]:
    """The text of each film that is embedded."""
    rows: Iterable[Any] = films.itertuples()
    return [
        f"{film.title} ({film.year}). {film.overview} {', '.join(film.genres)}. "
        f"{', '.join(film.actors[:4])}"
        for film in rows
    ]


def _rows(
    collection: Collection,
    candidates: Sequence[Candidates],
    splits: Sequence[str],
    ranker: tuple[Any, Any],
) -> Iterator[dict[str, Any]]:
    """The rows of the log; labeled films count as shown, since people have seen them."""
    films = collection.films
    bags = dict(title=films["title"].map(words_of), people=films["actors"].str[:3])
    bags["genres"] = films["genres"].map(lambda names: [name.lower() for name in names])
    bags["tags"] = films["tags"]
    of_film = {name: pa.array(bag.tolist(), pa.list_(pa.string())) for name, bag in bags.items()}
    numbers = [query for query, split in enumerate(splits) if split != RANKER]
    trees, curve = ranker
    for query in tqdm(numbers, desc="write the log", disable=None, leave=False):
        film, features, label = candidates[query]
        words = words_of(collection.queries[query])
        column = dict(zip(FEATURES, features.T, strict=True))
        column[FUSION] = fused(column["bm25"], column[COSINE])
        early = {of: column[of] for of in STAGE_OF}
        yield {
            "request": query, "time": _TIME + query, "split": splits[query],
            "words": words, "trigrams": trigrams_of(words),
            "item": films["id"].to_numpy()[film],
            **{STAGE_OF[of]: pa.array(stages_of(score, label)) for of, score in early.items()},
            "wanted": np.where(label >= 0, label, np.nan).astype(np.float32),
            "final_score": curve.predict_proba(trees.predict(features)[:, None])[:, 1].astype("f4"),
            **{name: column[name] for name in (*FEATURES, FUSION)},
            **{name: bag.take(pa.array(film)) for name, bag in of_film.items()},
        }  # fmt: skip


def fused(
    bm25: Float32[np.ndarray, "n"], cosine: Float32[np.ndarray, "n"]
) -> Float32[np.ndarray, "n"]:
    """Fuse two scores by rank: Σ of 1 / (60 + place), the first place being 1."""
    total = np.zeros(len(bm25))
    for score in (bm25, cosine):
        place = 1 + np.argsort(np.argsort(-score, kind="stable"))
        total += 1 / (FUSION_CONSTANT + place)
    return total.astype(np.float32)


def stages_of(
    score: Float32[np.ndarray, "n"], label: Int[np.ndarray, "n"]
) -> Shaped[np.ndarray, "n"]:
    """The stage of each film in words: the first 100 by a score are passed, labeled ones shown."""
    place = np.argsort(np.argsort(-score, kind="stable"))
    return np.array(STAGES)[np.where(label >= 0, 2, place < PASSED)]


def find_files(data: ConfigDict) -> list[Path]:
    """The two files, fetched if `data.path` is empty; others than the published are refused."""
    if not data.path:
        return [fetch(_URL + name, sha256, data.dir) for name, sha256 in FILES.items()]
    paths = find_raw(data, FILES, f"the files of {_URL}")
    for path in paths:
        if pooch.file_hash(path) != FILES[path.name]:
            raise UserError(f"{path} is not the published file; fetch it from {_URL}{path.name}")
    return paths


CONVERTER = Converter((), find_files, write, version=2)
