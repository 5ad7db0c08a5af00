"""Film search as a log: retrieval, splits, labels and stages, against restatements by hand."""

import gzip
import itertools
import json
import math
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd_ranker.configs import filmsearch as config_of
from kd_ranker.errors import UserError
from kd_ranker.sources import filmsearch, sentences
from kd_ranker.sources.filmsearch import FEATURES, FIELDS, split_words

pytest.importorskip("bm25s")
pytest.importorskip("lightgbm")

NOUNS = ("wolf", "river", "ghost", "train", "piano", "desert", "moon", "king")
QUERIES = 120


def film(number: int, generator: np.random.Generator) -> dict:
    title, overview, tags = (generator.choice(NOUNS, n).tolist() for n in (2, 6, 2))
    return {
        "id": str(100 + 7 * number), "title": " ".join(title), "overview": " ".join(overview),
        "tags": tags, "genres": ["Drama"], "director": None, "actors": [f"Ann {title[0]}", "Bo Li"],
        "characters": ["The King"], "year": 1990 + number % 5, "votes": number, "rating": 6.5,
        "popularity": float(number), "budget": None if number % 3 else 10, "url": "",
    }  # fmt: skip


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """60 films, and 120 queries with labels of 12 films each; words in the title are wanted."""
    folder = tmp_path_factory.mktemp("raw")
    generator = np.random.default_rng(0)
    films = [film(number, generator) for number in range(60)]
    lines = ["query_id\tquery\tdoc_id\tgrade"]
    for number in range(QUERIES):
        query = f'{generator.choice(NOUNS)} {generator.choice(NOUNS)} {number % 40}" film'
        for place in generator.choice(60, 12, replace=False):
            wanted = int(bool({*query.split()} & {*films[place]["title"].split()}))
            lines.append(f"q{number}\t{query}\t{films[place]['id']}\t{wanted}")
    lines.append("q0\tnot in the corpus\t5\t1")
    texts = ["\n".join(map(json.dumps, films)) + "\n", "\n".join(lines) + "\n"]
    for name, text in zip(filmsearch.FILES, texts, strict=True):
        (folder / name).write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.fixture(scope="module")
def collection(raw):
    """What was read; it has no label of a film that is not in the corpus."""
    read = filmsearch.read(raw)
    assert [len(labels) for labels in read.labels] == [12] * QUERIES
    return read


def vectors(texts, title=""):
    return np.stack([np.random.default_rng(len(text)).normal(size=384) for text in texts])


@pytest.fixture(scope="module")
def rows(raw, tmp_path_factory):
    """The rows of the log."""
    folder = tmp_path_factory.mktemp("log")
    config = config_of()
    config.data.dir = str(folder / "data")
    (folder / "data" / "logs").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentences, "embed", vectors)
        patch.setattr(filmsearch, "RETRIEVED", 20)
        patch.setattr(filmsearch, "PASSED", 5)
        patch.setattr(filmsearch, "LARGE", 0.2)
        filmsearch.write(config.data, [raw / name for name in filmsearch.FILES], folder)
    return pq.read_table(folder / "log.parquet").to_pylist()


def bm25(query: list[str], texts: list[list[str]]) -> np.ndarray:
    """The formula of Lucene, term by term, with k1 = 1.2 and b = .75."""
    mean = np.mean([len(text) for text in texts])
    scores = np.zeros(len(texts))
    for term in query:
        having = sum(term in text for text in texts)
        idf = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        for place, text in enumerate(texts):
            count = text.count(term)
            scores[place] += idf * count / (count + 1.2 * (0.25 + 0.75 * len(text) / mean))
    return scores


def test_retrieval_is_bm25_with_titles_three_times(collection):
    films = collection.films
    no_vectors = filmsearch.SentenceVectors(np.zeros((60, 1)), np.zeros((QUERIES, 1)))
    retriever = filmsearch.Retriever(collection, no_vectors)
    titles = [split_words(text) for text in films["title"]]
    tags = [
        split_words(" ".join([*a, *b])) for a, b in zip(films["tags"], films["genres"], strict=True)
    ]
    for query in (0, 7, 50):
        found = retriever.retrieve(query)
        columns = dict(zip(FEATURES, found.features.T, strict=True))
        words = split_words(collection.queries[query])
        np.testing.assert_allclose(
            columns["bm25_title"], bm25(words, titles)[found.film], rtol=1e-5
        )
        np.testing.assert_allclose(columns["bm25_tags"], bm25(words, tags)[found.film], rtol=1e-5)
        others = sum(columns[f"bm25_{field}"] for field in FIELDS if field != "title")
        np.testing.assert_allclose(columns["bm25"], 3 * columns["bm25_title"] + others, rtol=1e-5)
        assert (np.diff(columns["bm25"]) <= 0).all()
        assert sorted(found.film) == [*range(60)]


def test_near_duplicates_and_queries_for_one_film_share_a_split(collection, rows):
    split = {row["request"]: row["split"] for row in rows}
    words = {query: {*split_words(collection.queries[query])} for query in split}
    for a, b in itertools.combinations(split, 2):
        shared = len(words[a] & words[b]) / len(words[a] | words[b])
        if shared >= filmsearch.SAME_QUERY:
            assert split[a] == split[b]
    best = {}
    for row in rows:
        # The rows are in the order of BM25, so the first one wanted is the film of the query.
        wanted = [
            film for film, label in zip(row["item"], row["wanted"], strict=True) if label == 1
        ]
        if wanted:
            best.setdefault(wanted[0], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in best.values())


def test_groups_are_the_components_of_both_relations():
    collection = filmsearch.Collection(
        films=[None] * 4,
        queries=["a b c d", "a b c d e", "x", "y", "z", "d"],
        labels=[{}] * 6,
    )
    groups = filmsearch.group_queries(collection, {1: 3, 2: 3, 4: 0})
    assert groups[0] == groups[1] == groups[2]
    assert len(Counter(groups.tolist())) == 4


def test_splits_have_their_shares_and_large_groups_train():
    groups = np.repeat(np.arange(1000), 3)
    for more in ([], [0] * 97, [0] * 97 + [1] * 28):
        numbers = np.concatenate([groups, np.array(more, int)])
        splits = np.array(filmsearch.split_groups(numbers, 1))
        for name, share in filmsearch.SPLITS.items():
            assert (splits == name).mean() == pytest.approx(share, abs=0.01)
        assert set(splits[np.isin(numbers, more)]) <= {"train"}
    assert filmsearch.split_groups(groups, 1) != filmsearch.split_groups(groups, 2)


def test_rows_hold_labels_and_stages_of_the_raw_files(collection, rows):
    ids = collection.films["id"].tolist()
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    for row in rows:
        labels = collection.labels[row["request"]]
        expected = [labels.get(ids.index(film)) for film in row["item"]]
        by_place = ["passed"] * 5 + ["retrieved"] * 15
        assert row["stage_bm25"] == [
            place if label is None else "shown"
            for place, label in zip(by_place, expected, strict=True)
        ]
        first = sorted(range(20), key=lambda place, row=row: -row["fusion"][place])[:5]
        assert row["stage"] == [
            "shown" if label is not None else "passed" if place in first else "retrieved"
            for place, label in enumerate(expected)
        ]
        np.testing.assert_array_equal(row["wanted"], np.array(expected, float))
        assert all(0 < score < 1 for score in row["final_score"])


def test_the_fused_score_sums_inverse_places_of_both(rows):
    for row in rows:
        for place in (0, 7, 19):
            by_words = 1 + sum(score > row["bm25"][place] for score in row["bm25"])
            by_sentence = 1 + sum(score > row["minilm"][place] for score in row["minilm"])
            is_alone = [row[name].count(row[name][place]) == 1 for name in ("bm25", "minilm")]
            if all(is_alone):
                expected = 1 / (60 + by_words) + 1 / (60 + by_sentence)
                assert row["fusion"][place] == pytest.approx(expected)


@pytest.mark.parametrize(("variant", "unread"), [("", set()), ("lexical", {"minilm", "fusion"})])
def test_the_student_reads_nothing_that_is_known_only_after_it(variant, unread):
    features = config_of(variant).data.features
    columns = {feature.column or name for name, feature in features.items()}
    assert not columns & ({"final_score", "wanted", "stage", "stage_bm25"} | unread)


class Recorded:
    """In place of a LambdaMART: keeps the features of both parts, and ties all films."""

    def __init__(self, **options):
        Recorded.made = self

    def fit(self, inputs, wanted, group, eval_X, eval_y, eval_group, **options):
        assert (len(wanted), len(eval_y)) == (sum(group), sum(eval_group[0]))
        assert {*wanted, *eval_y} == {0, 1}
        self.fitted, self.held = inputs, eval_X

    def predict(self, features):
        return np.zeros(len(features))


def test_no_group_of_films_is_on_both_sides_of_early_stopping(monkeypatch):
    monkeypatch.setattr("lightgbm.LGBMRanker", Recorded)
    groups = np.random.default_rng(0).integers(0, 50, 400)
    label = np.array([1, 0, 0, *[-1] * 40])
    # The only feature of a film is the group of the query.
    queries = [
        filmsearch.Candidates(np.arange(43), np.full((43, 1), group, np.float32), label)
        for group in groups
    ]
    filmsearch.fit_ranker(queries, groups, 1)
    fitted, held = Recorded.made.fitted, Recorded.made.held
    assert {*fitted.ravel()} | {*held.ravel()} == {*groups}
    assert not {*fitted.ravel()} & {*held.ravel()}
    assert len(held) / (len(fitted) + len(held)) == pytest.approx(0.2, abs=0.05)
    assert len(fitted) + len(held) == 400 * 33


def test_a_changed_file_is_refused(raw):
    config = config_of()
    config.data.path = str(raw)
    with pytest.raises(UserError, match=r"movies-corpus\.jsonl\.gz is not the published file"):
        filmsearch.find_files(config.data)
    config.data.path = str(raw / "nowhere")
    with pytest.raises(UserError, match=r"does not exist; set data\.path to .* https"):
        filmsearch.find_files(config.data)


def test_sentences_equal_those_of_sentence_transformers():
    """The expected numbers are those of sentence-transformers 6.2.0 with the same weights."""
    pytest.importorskip("all_minilm_l6_v2")
    found = sentences.embed(["insidious 2 netflix", "Black Adam (2022)."])
    expected = [
        [-0.0275954, -0.1618440, -0.0831335, -0.0514875],
        [-0.0832422, 0.0220087, -0.0050298, 0.0174668],
    ]
    np.testing.assert_allclose(found[:, :4], expected, atol=1e-5)
    assert found[0] @ found[1] == pytest.approx(0.1166674, abs=1e-5)
