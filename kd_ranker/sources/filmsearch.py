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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pooch
import pyarrow as pa
import scipy.sparse
from jaxtyping import Float, Float32, Int, Int64, Shaped
from ml_collections import ConfigDict
from scipy.sparse.csgraph import connected_components

from kd_ranker.errors import UserError
from kd_ranker.progress import counted
from kd_ranker.sources import sentences
from kd_ranker.sources.converted import Converter, fetch, find_raw, write_rows
from kd_ranker.sources.logs.layout import STAGES

RETRIEVED = 1000
PASSED = 100
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

COSINE = "minilm"
FUSION = "fusion"
LEXICAL = tuple(name for name in FEATURES if name not in (*FACTS, "year", COSINE))
"""The features of a candidate that the retrieval by words knows."""

FUSION_CONSTANT = 60  # k0 of the fusion that passes candidates
STAGE_COLUMNS = {"bm25": "stage_bm25", FUSION: "stage"}
"""The column of the candidates' stages, by the early ranker that passed them."""

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


class SentenceVectors(NamedTuple):
    """The sentence embeddings of films and queries, of length 1."""

    films: Float32[np.ndarray, "films 384"]
    queries: Float32[np.ndarray, "queries 384"]

    def cosine(self, query: int, film: Int64[np.ndarray, "n"]) -> Float32[np.ndarray, "n"]:
        """Return the similarity of a query to some films."""
        return self.films[film] @ self.queries[query]


class FinalRanker(NamedTuple):
    """LambdaMART, and the logistic curve from its score to a probability."""

    trees: Any  # a `lightgbm.LGBMRanker`
    curve: Any  # a `sklearn.linear_model.LogisticRegression`

    def probability(self, features: Float32[np.ndarray, "n features"]) -> Float[np.ndarray, "n"]:
        """Return the probability that a person wants each film."""
        score = self.trees.predict(features)
        probability: Float[np.ndarray, "n"] = self.curve.predict_proba(score[:, None])[:, 1]
        return probability


def split_words(text: str | None) -> list[str]:
    """Return the words of a text, in lower case.

    >>> split_words("Fast & Furious 6")
    ['fast', 'furious', '6']
    """
    return re.findall(r"\w+", (text or "").lower())


def distinct_trigrams(words: Sequence[str]) -> list[str]:
    """Return the different runs of three characters in words with their ends marked, in order.

    >>> distinct_trigrams(["up", "up"])
    ['^up', 'up$']
    """
    trigrams: dict[str, None] = {}  # in place of a set, for its order
    for word in words:
        marked = f"^{word}$"
        for start in range(len(marked) - 2):
            trigrams[marked[start : start + 3]] = None
    return list(trigrams)


def read(folder: Path) -> Collection:
    """Read the two files; a label of a film that the corpus lacks is left out."""
    corpus, judgments = (folder / name for name in FILES)
    films = pd.read_json(corpus, lines=True, dtype={"id": np.int64})
    films["year"] = films["year"].astype("Int64")
    number_of_film = {film: number for number, film in enumerate(films["id"])}
    # Texts hold unbalanced quotation marks.
    judged = pd.read_csv(judgments, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False)
    queries = []
    labels = []
    for _, rows in judged.groupby("query_id", sort=False):
        queries.append(str(rows["query"].iloc[0]))
        grades = {}
        for film, grade in zip(rows["doc_id"], rows["grade"], strict=True):
            if film in number_of_film:
                grades[number_of_film[film]] = grade
        labels.append(grades)
    return Collection(films, queries, labels)


class Retriever:
    """The retrieval by BM25 over each of `FIELDS`."""

    def __init__(self, collection: Collection, vectors: SentenceVectors) -> None:
        """Index the films."""
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._collection = collection
        self._vectors = vectors
        self._facts = _film_facts(collection.films)
        self._indices = []
        for texts in _field_texts(collection.films):
            index = bm25s.BM25(k1=1.2, b=0.75)
            index.index([split_words(text) for text in texts], show_progress=False)
            self._indices.append(index)

    def retrieve(self, query: int) -> Candidates:
        """Return the first `RETRIEVED` films of a query; of equal scores, the most popular."""
        words = split_words(self._collection.queries[query])
        scores = np.stack(
            [index.get_scores_from_ids(index.get_tokens_ids(words)) for index in self._indices]
        )
        title = scores[0]
        total = _TITLE_WEIGHT * title + scores[1:].sum(axis=0)
        title_share = title / max(title.max(), 1e-6)
        popularity = self._facts[:, 0]
        film = np.lexsort((-popularity, -total))[:RETRIEVED].copy()  # not a view of all films

        columns = [*scores, total, title_share, *self._facts.T]
        features = [column[film] for column in columns]
        features.append(self._vectors.cosine(query, film))
        labels = self._collection.labels[query]
        return Candidates(
            film=film,
            features=np.stack(features, axis=1).astype(np.float32),
            label=np.array([labels.get(number, -1) for number in film.tolist()]),
        )


def _film_facts(films: pd.DataFrame) -> Float32[np.ndarray, "films facts"]:
    """Return popularity, votes, rating, budget and year; 0 where unknown.

    Popularity, votes and budget are logarithms.
    """
    facts = films[[*FACTS, "year"]].fillna(0).astype(np.float64)
    facts[["popularity", "votes", "budget"]] = np.log1p(facts[["popularity", "votes", "budget"]])
    return facts.to_numpy(np.float32)


def _field_texts(films: pd.DataFrame) -> list[pd.Series]:
    """Return the texts of all films in each of `FIELDS`."""
    director = films["director"].astype("string").fillna("")
    texts = films.assign(
        people=films["actors"].str.join(" ") + " " + director,
        characters=films["characters"].str.join(" "),
        tags=(films["tags"] + films["genres"]).str.join(" "),
    )
    return [texts[field].astype("string").fillna("") for field in FIELDS]


class QuerySplits(NamedTuple):
    """The group and the split of each query; no group is in two splits."""

    group: Int[np.ndarray, "queries"]
    split: list[str]  # one of `SPLITS` for each query


def split_queries(
    collection: Collection, candidates: Sequence[Candidates], seed: int
) -> QuerySplits:
    """Split the queries, with the candidates of each, so that near duplicates stay together."""
    best = {}
    for query, retrieved in enumerate(candidates):
        if retrieved.label.max() > 0:
            best[query] = int(retrieved.film[retrieved.label.argmax()])
    group = group_queries(collection, best)
    return QuerySplits(group, split_groups(group, seed))


def group_queries(collection: Collection, best: Mapping[int, int]) -> Int[np.ndarray, "queries"]:
    """Number the groups of queries that must not be separated.

    Two queries share a group if the same film is the best one wanted for both, or if their words
    are nearly the same. Of the films wanted for a query, `best` has the one that BM25 puts first.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    num_queries = len(collection.queries)
    vectorizer = CountVectorizer(analyzer=split_words, binary=True)
    has_word = vectorizer.fit_transform(collection.queries)
    num_words = np.asarray(has_word.sum(axis=1)).ravel()
    # Near duplicates: the words that two queries share, against those of either.
    shared = (has_word @ has_word.T).tocoo()
    either = num_words[shared.row] + num_words[shared.col] - shared.data
    is_near = shared.data >= SAME_QUERY * either

    # The nodes of the graph are the queries, and then the films.
    query, film = np.array(list(best.items())).T
    row = np.concatenate([shared.row[is_near], query])
    column = np.concatenate([shared.col[is_near], num_queries + film])
    num_nodes = num_queries + len(collection.films)
    edges = scipy.sparse.coo_matrix((np.ones(len(row)), (row, column)), (num_nodes, num_nodes))
    _, component = connected_components(edges, directed=False)
    groups: Int[np.ndarray, "queries"] = component[:num_queries]
    return groups


def split_groups(groups: Int[np.ndarray, "queries"], seed: int) -> list[str]:
    """Return the split of each query, with whole groups, in about the shares of `SPLITS`.

    Groups with more than 1% of the queries are for training: one of them in a split of the
    evaluation would outweigh the others there.
    """
    _, group, size = np.unique(groups, return_inverse=True, return_counts=True)
    split = np.full(len(size), "train", dtype=object)
    is_large = size > LARGE * len(groups)
    shares = dict(SPLITS)
    shares["train"] -= size[is_large].sum() / len(groups)
    # The other groups follow each other in random order, and so do the splits: a group is in the
    # split that has its middle query.
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~is_large))
    middle = (np.cumsum(size[order]) - size[order] / 2) / size[order].sum()
    ends = np.cumsum(list(shares.values()))[:-1] / sum(shares.values())
    names = np.array(list(shares), dtype=object)
    split[order] = names[np.searchsorted(ends, middle, side="right")]
    return list(split[group])


def fit_ranker(
    queries: Sequence[Candidates], groups: Int[np.ndarray, "queries"], seed: int
) -> FinalRanker:
    """Train a final ranker; a fifth of the queries, in whole groups, stops it and calibrates it.

    For the order, 30 random films without a label count as not wanted. For the calibration, only
    labeled films count.
    """
    import lightgbm
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(seed)
    place_of_group = generator.permutation(groups.max() + 1)[groups]
    order = np.argsort(place_of_group, kind="stable")
    features = []
    labels = []
    for query in order:
        candidates = queries[query]
        unknown = np.flatnonzero(candidates.label < 0)
        extra = generator.choice(unknown, min(_NEGATIVES, len(unknown)), replace=False)
        rows = np.concatenate([np.flatnonzero(candidates.label >= 0), extra])
        features.append(candidates.features[rows])
        labels.append(candidates.label[rows])
    sizes = [len(label) for label in labels]
    # The first query of the group that the fifth starts in.
    places = place_of_group[order]
    first_held = int(np.searchsorted(places, places[len(queries) * 4 // 5]))
    stop = sum(sizes[:first_held])

    inputs = np.concatenate(features)
    label = np.concatenate(labels)
    wanted = np.maximum(label, 0)
    trees = lightgbm.LGBMRanker(
        n_estimators=300, num_leaves=31, learning_rate=0.1, min_child_samples=50, verbose=-1,
        early_stopping_round=20, random_state=seed, deterministic=True, force_row_wise=True,
        n_jobs=_THREADS,
    )  # fmt: skip
    trees.fit(
        inputs[:stop],
        wanted[:stop],
        group=sizes[:first_held],
        eval_X=inputs[stop:],
        eval_y=wanted[stop:],
        eval_group=[sizes[first_held:]],
        eval_at=[10],
    )
    labeled = stop + np.flatnonzero(label[stop:] >= 0)
    score = np.asarray(trees.predict(inputs[labeled]))
    curve = LogisticRegression().fit(score[:, None], label[labeled])
    return FinalRanker(trees, curve)


def write(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per query that the final ranker has not learned from."""
    for package in ("bm25s", "lightgbm", "sklearn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"film search needs the package {package}: pip install 'kd_ranker[filmsearch]'"
            )
    collection = read(files[0].parent)
    retriever = Retriever(collection, sentence_vectors(collection, Path(data.dir) / "logs"))
    queries = range(len(collection.queries))
    candidates = [
        retriever.retrieve(query) for query in counted(queries, "retrieve", unit="request")
    ]
    groups, splits = split_queries(collection, candidates, int(data.seed))
    learned = [query for query in queries if splits[query] == RANKER]
    ranker = fit_ranker([candidates[query] for query in learned], groups[learned], int(data.seed))
    write_rows(folder / "log.parquet", _rows(collection, candidates, splits, ranker))


def sentence_vectors(collection: Collection, folder: Path) -> SentenceVectors:
    """Return the sentence vectors, stored in `folder`: they take most of the time."""
    path = folder / f"filmsearch-vectors-{sentences.VERSION}.npz"
    if not path.exists():
        films = sentences.embed(film_texts(collection.films), "embed films")
        queries = sentences.embed(collection.queries, "embed queries")
        part = path.with_suffix(".part.npz")
        np.savez(part, films=films, queries=queries)
        part.rename(path)
    stored = np.load(path)
    return SentenceVectors(stored["films"], stored["queries"])


def film_texts(films: pd.DataFrame) -> list[str]:
    """Return the text of each film that is embedded."""
    texts = []
    rows: Iterable[Any] = films.itertuples()
    for film in rows:
        genres = ", ".join(film.genres)
        actors = ", ".join(film.actors[:4])
        texts.append(f"{film.title} ({film.year}). {film.overview} {genres}. {actors}")
    return texts


def _rows(
    collection: Collection,
    candidates: Sequence[Candidates],
    splits: Sequence[str],
    ranker: FinalRanker,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the log; labeled films count as shown, since people have seen them."""
    films = collection.films
    film_id = films["id"].to_numpy()
    bags = {
        "title": _word_lists(films["title"].map(split_words)),
        "people": _word_lists(films["actors"].str[:3]),
        "genres": _word_lists(films["genres"].map(lambda names: [name.lower() for name in names])),
        "tags": _word_lists(films["tags"]),
    }
    queries = [query for query, split in enumerate(splits) if split != RANKER]
    for query in counted(queries, "write the log", unit="request"):
        film, features, label = candidates[query]
        words = split_words(collection.queries[query])
        columns = dict(zip(FEATURES, features.T, strict=True))
        columns[FUSION] = fuse(columns["bm25"], columns[COSINE])
        stages = {
            stage: pa.array(stage_names(columns[ranker_name], label))
            for ranker_name, stage in STAGE_COLUMNS.items()
        }
        yield {
            "request": query,
            "time": _TIME + query,
            "split": splits[query],
            "words": words,
            "trigrams": distinct_trigrams(words),
            "item": film_id[film],
            **stages,
            "wanted": np.where(label >= 0, label, np.nan).astype(np.float32),
            "final_score": ranker.probability(features).astype(np.float32),
            **columns,
            **{name: bag.take(pa.array(film)) for name, bag in bags.items()},
        }


def _word_lists(words: pd.Series) -> pa.Array:
    return pa.array(words.tolist(), pa.list_(pa.string()))


def fuse(
    bm25: Float32[np.ndarray, "n"], cosine: Float32[np.ndarray, "n"]
) -> Float32[np.ndarray, "n"]:
    """Fuse two scores by rank: Σ of 1 / (60 + place), the first place being 1."""
    total = np.zeros(len(bm25))
    for score in (bm25, cosine):
        place = 1 + np.argsort(np.argsort(-score, kind="stable"))
        total += 1 / (FUSION_CONSTANT + place)
    return total.astype(np.float32)


def stage_names(
    score: Float32[np.ndarray, "n"], label: Int[np.ndarray, "n"]
) -> Shaped[np.ndarray, "n"]:
    """Return the stage of each film: the first 100 by a score are passed, labeled ones shown."""
    retrieved, passed, shown = STAGES
    place = np.argsort(np.argsort(-score, kind="stable"))
    unlabeled = np.where(place < PASSED, passed, retrieved)
    return np.where(label >= 0, shown, unlabeled)


def find_files(data: ConfigDict) -> list[Path]:
    """Find the two files, or fetch them if `data.path` is empty; only the published are taken."""
    if not data.path:
        return [fetch(_URL + name, sha256, data.dir) for name, sha256 in FILES.items()]
    paths = find_raw(data, FILES, f"the files of {_URL}")
    for path in paths:
        if pooch.file_hash(path) != FILES[path.name]:
            raise UserError(f"{path} is not the published file; fetch it from {_URL}{path.name}")
    return paths


CONVERTER = Converter((), find_files, write, version=2)
