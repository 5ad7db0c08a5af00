"""TREC and LETOR files as logs, against independent readers; and lines that are at fault."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_svmlight_file

import kd_ranker as kd
from kd_ranker.config import checks
from kd_ranker.configs import letor, trec
from kd_ranker.errors import UserError
from kd_ranker.pipeline import datasets
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.layout import ALLOWABLE
from kd_ranker.sources.ranking_files import agreement, read_run
from kd_ranker.sources.registry import SOURCES

WIDTH = 5
WORDS = dict(train="train", validation="vali", test="test")


@pytest.fixture
def fold(tmp_path):
    """A fold of LETOR files: 40, 12 and 12 queries of 3 to 11 documents, with scores."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "Fold1"
    folder.mkdir()
    query = 10
    for word, queries in zip(WORDS.values(), (40, 12, 12), strict=True):
        lines, scores = [], []
        for _ in range(queries):
            query += 1
            for place in range(generator.integers(3, 12)):
                features = generator.normal(size=WIDTH).round(6)
                grade = int(np.clip(1 + features[0] + generator.normal() / 2, 0, 2))
                pairs = " ".join(f"{i}:{value}" for i, value in enumerate(features, 1))
                name = f"GX{query:03}-{place:02}-1234"
                lines.append(f"{grade} qid:{query} {pairs} #docid = {name} inc = 1 prob = 0.5\n")
                scores.append(f"{2 * features[0]:.4f}\n")
        (folder / f"{word}.txt").write_text("".join(lines))
        (folder / f"{word}.scores").write_text("".join(scores))
    return folder


def letor_config(folder, variant="mq2008_scores", **changes):
    config = letor(variant)
    config.data.path, config.data.dir = str(folder), str(folder.parent / "data")
    config.data.num_features, config.data.allow = WIDTH, ALLOWABLE
    config.data.update(changes)
    config.parallel.devices, config.batch.requests = 1, 8
    return config


def rows_of(config, folder):
    """The log as pandas reads it, a row per query."""
    converter = SOURCES[config.data.name].open_source.args[0]
    folder.mkdir(exist_ok=True)
    converter.write(config.data, converter.find_files(config.data), folder)
    return pq.read_table(folder / "log.parquet").to_pandas().set_index("request")


def test_letor_rows_are_those_of_scikit_learn(fold, tmp_path):
    rows = rows_of(letor_config(fold), tmp_path / "log")
    for split, word in WORDS.items():
        features, grades, queries = load_svmlight_file(
            str(fold / f"{word}.txt"), n_features=WIDTH, query_id=True, zero_based=False
        )
        scores = np.loadtxt(fold / f"{word}.scores")
        of_split = rows[rows["split"] == split]
        assert of_split.index.tolist() == [str(query) for query in dict.fromkeys(queries)]
        assert np.repeat(of_split.index, of_split["item"].map(len)).astype(int).tolist() == [
            *queries
        ]
        read = np.stack(np.concatenate(of_split["features"].tolist()))
        np.testing.assert_array_equal(read, features.toarray().astype(np.float32))
        for column, expected in (
            ("grade", grades),
            ("grade_1", grades >= 1),
            ("grade_2", grades >= 2),
            ("final_score", scores.astype(np.float32)),
        ):
            np.testing.assert_array_equal(np.concatenate(of_split[column].tolist()), expected)
        for of in of_split.itertuples():
            np.testing.assert_array_equal(
                np.diff(of.final_score[np.argsort(of.final_rank)]) <= 0, True
            )
    assert rows.loc["11", "item"][0] == "GX011-00-1234"
    assert {*np.concatenate(rows["stage"].tolist())} == {3}


def test_a_document_without_a_name_is_numbered_and_zeros_may_be_omitted(tmp_path):
    for word in WORDS.values():
        (tmp_path / f"{word}.scores").write_text("0.1\n0.1000000000001\n")
        (tmp_path / f"{word}.txt").write_text(f"2 qid:{word} 2:0.5\n\n0 qid:{word} 1:1 5:-2e-1 #\n")
    config = letor_config(tmp_path, sparse=True)
    (first,) = rows_of(config, tmp_path / "log").loc[["vali"]].itertuples()
    assert first.item.tolist() == ["vali-0", "vali-1"]
    assert first.final_rank.tolist() == [2, 1]  # of scores that are equal in 32 bits
    np.testing.assert_allclose(np.stack(first.features), [[0, 0.5, 0, 0, 0], [1, 0, 0, 0, -0.2]])


@pytest.mark.parametrize("signal", ["rank", "score", ""])
def test_letor_files_become_a_dataset_and_a_student_trains(fold, tmp_path, signal):
    config = letor_config(fold, "mq2008_scores" if signal else "")
    if signal:
        config.data.teacher_signal = signal
        config.data.teacher = dict.fromkeys(config.tasks, f"final_{signal}")
    config.train.steps = config.teacher.train.steps = 6
    config.distill.mode = "aux"
    checks.validate(config)
    kd.prepare(config)
    dataset = datasets.dataset_of(config)
    assert [len(dataset.columns[split]) for split in SPLITS] == [40, 12, 12]
    if signal == "score":
        run = kd.train(config, tmp_path / "run")
        results = pd.read_csv(run.workdir / "results.csv")
        student = results[results["role"] == "student"]
        assert student["survival@10"].between(0.9, 1).all()


RUNS = {
    # Two first stages and a final ranker; query 9 has no grades, and 8 none in a run.
    "bm25.run": "7 Q0 a 1 9.5 x\n7 Q0 b 2 7.25 x\n7\tQ0\tc  3 1 x\n9 Q0 a 1 1 x\n8 Q0 z 1 1 x\n"
    "5 Q0 z 1 3 x\n",
    "dense.run": "5 Q0 y 1 0.5 d\n7 Q0 d 4 0.9 d\n7 Q0 a 1 0.8 d\n",
    # Equal scores are ordered by rank.
    "gpt.run": "7 Q0 a 3 1.0 g\n7 Q0 d 2 1.0 g\n7 Q0 b 1 4.0 g\n",
    "qrels.txt": "8 0 a 1\n7 0 a 3\n7 0 d 0\n7 0 e 2\n5 0 z 1\n5 0 y 2\n",
}


@pytest.fixture
def lists(tmp_path):
    folder = tmp_path / "lists"
    folder.mkdir()
    for name, text in RUNS.items():
        (folder / name).write_text(text)
    return folder


def trec_config(folder, runs=None, **changes):
    config = trec()
    config.data.path, config.data.dir = str(folder), str(folder.parent / "data")
    with config.unlocked():
        config.data.runs = runs or dict(bm25="bm25.run", dense="dense.run", gpt="gpt.run")
    config.data.final = "gpt"
    config.data.update(changes)
    return config


def test_trec_rows_are_those_of_pandas(lists, tmp_path):
    rows = rows_of(trec_config(lists), tmp_path / "log")
    assert rows.index.tolist() == ["7", "5"]  # in the order of the qrels
    names = ["query", "q0", "document", "rank", "score", "tag"]
    qrels = pd.read_csv(
        lists / "qrels.txt", sep=r"\s+", names=["query", "zero", "document", "grade"]
    ).set_index(["query", "document"])
    for query, row in rows.iterrows():
        found = {}
        for run in ("bm25", "dense", "gpt"):
            read = pd.read_csv(lists / f"{run}.run", sep=r"\s+", names=names)
            read = read[read["query"] == int(query)].sort_values(
                ["score", "rank"], ascending=[False, True]
            )
            for place, (document, score) in enumerate(
                zip(read["document"], read["score"], strict=True), 1
            ):
                found.setdefault(document, {})[run] = (place, score)
        assert row["item"].tolist() == [*found]
        for place, (document, of) in enumerate(found.items()):
            for run in ("bm25", "dense", "gpt"):
                expected = of.get(run, (np.nan, np.nan))
                actual = [row[f"{run}_{column}"][place] for column in ("rank", "score")]
                np.testing.assert_allclose(actual, expected)
            key = (int(query), document)
            grade = qrels["grade"].get(key, np.nan)
            np.testing.assert_array_equal(row["grade"][place], grade)
            wanted = np.nan if np.isnan(grade) else grade >= 2
            np.testing.assert_array_equal(row["grade_2"][place], wanted)
            stage = 2 if "gpt" in of else 1
            assert row["stage"][place] == (stage if np.isnan(grade) else 3)


def test_trec_files_of_splits_become_a_dataset(tmp_path):
    generator = np.random.default_rng(1)
    qrels = []
    for word, queries in zip(
        WORDS.values(), (range(30), range(30, 40), range(40, 50)), strict=True
    ):
        (tmp_path / word).mkdir()
        for run in ("first", "final"):
            lines = []
            for query in queries:
                for rank, document in enumerate(generator.permutation(12), 1):
                    lines.append(f"{query} Q0 d{document} {rank} {1 / rank} {run}")
            (tmp_path / word / f"{run}.run").write_text("\n".join(lines))
        qrels += [
            f"{query} 0 d{query % 12} 2\n{query} 0 d{(query + 1) % 12} 0" for query in queries
        ]
    (tmp_path / "qrels.txt").write_text("\n".join(qrels))
    runs = dict(first="{split}/first.run", final="{split}/final.run")
    config = trec_config(tmp_path, runs, final="final", split="column", allow=ALLOWABLE)
    checks.validate(config)
    kd.prepare(config)
    dataset = datasets.dataset_of(config)
    assert [len(dataset.columns[split]) for split in SPLITS] == [30, 10, 10]


def test_a_query_is_in_the_run_of_one_split(lists, tmp_path, caplog):
    for word, place in zip(WORDS.values(), ("7 Q0 a", "5 Q0 z", "8 Q0 a"), strict=True):
        (lists / f"{word}.run").write_text(f"9 Q0 a 1 1 x\n{place} 1 1 x\n")
    config = trec_config(lists, dict(first="{split}.run"), final="", split="column")
    rows = rows_of(config, tmp_path / "log")
    assert rows["split"].to_dict() == {"7": "train", "5": "validation", "8": "test"}
    assert caplog.text.count("left out 1 queries") == caplog.text.count("left out") == 1
    (lists / "vali.run").write_text("7 Q0 a 1 1 x\n")
    message = "qrels.txt, split validation: query 7 was there before, at .*, split train"
    with pytest.raises(UserError, match=message):
        rows_of(config, tmp_path / "log")


def test_agreement_is_the_share_of_the_top(tmp_path):
    (tmp_path / "a").write_text(
        "1 Q0 a 1 3 x\n1 Q0 b 2 2 x\n1 Q0 c 3 1 x\n2 Q0 a 1 1 x\n3 Q0 a 1 1 x"
    )
    (tmp_path / "b").write_text(
        "1 Q0 c 1 3 x\n1 Q0 b 2 2 x\n1 Q0 a 3 1 x\n2 Q0 a 1 1 x\n4 Q0 a 1 1 x"
    )
    found = agreement(tmp_path / "a", tmp_path / "b", k=2)
    assert (found.mean, found.queries) == (0.75, 2)
    assert (found.low, found.high) == (0.5, 1)
    assert agreement(tmp_path / "a", tmp_path / "b", k=3).mean == 1
    assert agreement(tmp_path / "a", tmp_path / "b", k=1).mean == 0.5
    assert agreement(tmp_path / "a", tmp_path / "b", k=1, within=2).mean == 0.5
    assert agreement(tmp_path / "a", tmp_path / "b", k=1, within=3).mean == 1
    (tmp_path / "c").write_text("7 Q0 a 1 1 x")
    with pytest.raises(UserError, match="share no query"):
        agreement(tmp_path / "a", tmp_path / "c")
    with pytest.raises(UserError, match=r"d cannot be read as plain text .*: .*No such file"):
        agreement(tmp_path / "a", tmp_path / "d")
    for k, within in ((0, 0), (3, 2)):
        with pytest.raises(UserError, match=f"k={k}, within={within}: k must be at least 1"):
            agreement(tmp_path / "a", tmp_path / "b", k, within)


def assert_nothing_written(folder):
    """Only the checksums of the raw files are kept."""
    assert [path.name for path in (folder / "data" / "logs").iterdir()] == [".raw_files.json"]


LETOR_FAULTS = {
    "1 qid:900 1:1 2:1 3:1 4:1": "4 features, the largest index is 4; data.num_features=5 expects",
    "1 qid:900 1:1 2:1 3:1 4:1 5:1 6:1": "6 features, the largest index is 6",
    "1 qid:900 1:1 2:1 3:1 5:1 4:1": "5 features, the largest index is 5",
    "1 qid:900 1:1 2:one 3:1 4:1 5:1": "a feature is not index:number .*'one'",
    "1 qid:900 1:1 2 1 3:1 4:1 5:1": "a feature is not index:number",
    "1 qid:900 1:1 2:nan 3:1 4:1 5:1": "a feature is not a finite number",
    "1 qid:900 1:1 2:1e39 3:1 4:1 5:1": "a feature is not a finite number",
    "1 900 1:1 2:1 3:1 4:1 5:1": "expected: grade qid:query",
    "1.5 qid:900 1:1 2:1 3:1 4:1 5:1": "grade 1.5 is not a whole number",
    "1 qid:900 1:1:2 1 3:1 4:1 5:1": "a feature is not index:number",
    "1 qid: 1:1 2:1 3:1 4:1 5:1": "expected: grade qid:query",
    "1 qid:50 1:1 2:1 3:1 4:1 5:1 # docid = GX050-00-1234": "query 50 has document GX050-00-1234",
    "1 qid:11 1:1 2:1 3:1 4:1 5:1": "query 11 was there before, .*train.txt, line 1, split train",
}


@pytest.mark.parametrize("line", LETOR_FAULTS)
def test_a_letor_line_at_fault_leaves_nothing(fold, line):
    path = fold / "train.txt"
    number = path.read_text().count("\n") + 1
    path.write_text(path.read_text() + line + "\n")
    (fold / "train.scores").open("a").write("0\n")
    with pytest.raises(UserError, match=f"train.txt, line {number}.*: {LETOR_FAULTS[line]}"):
        kd.prepare(letor_config(fold))
    assert_nothing_written(fold.parent)


def test_scores_of_another_length_are_named(fold):
    path = fold / "vali.scores"
    text, number = path.read_text(), path.read_text().count("\n")
    path.write_text(text + "1\n")
    with pytest.raises(UserError, match=f"vali.scores, line {number + 1}: no document"):
        kd.prepare(letor_config(fold))
    path.write_text(text.replace("\n", "", 1).replace("\n", " x\n", 1))
    with pytest.raises(UserError, match=r"vali\.scores, line 1: '.*' is not a finite number"):
        kd.prepare(letor_config(fold))
    path.write_text("".join(text.splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=f"vali.txt, line {number}: no score"):
        kd.prepare(letor_config(fold))


def test_a_number_is_not_the_name_of_another_document(tmp_path):
    (tmp_path / "train.txt").write_text("1 qid:9 1:1 # docid = 9-1\n1 qid:9 1:1\n")
    with pytest.raises(UserError, match=r"train\.txt, line 2: query 9 has document 9-1 already"):
        rows_of(letor_config(tmp_path, "", documents="train.txt", num_features=1), tmp_path / "log")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08\x00", "a.run cannot be read as plain text in UTF-8"),
        ("7 Q0 a 1 1 x".encode("utf-16"), "a.run cannot be read as plain text in UTF-8"),
        (b"7 Q0 a 1 1e39 x", "a.run, line 1: '1e39' is not a finite number of 32 bits"),
    ],
)
def test_bytes_at_fault_are_named(tmp_path, content, message):
    (tmp_path / "a.run").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "a.run")


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a.run").write_bytes(b"\xef\xbb\xbf7 Q0 \xc3\xa4 1 1 x")
    assert read_run(tmp_path / "a.run") == {"7": {"ä": 1.0}}


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("qrels.txt", "7 0 b", "qrels.txt, line 7: 3 columns; expected 4: query 0 document grade"),
        ("qrels.txt", "7 0 a 1", "qrels.txt, line 7: query 7 has document a already"),
        ("qrels.txt", "7 0 b x", "qrels.txt, line 7: 'x' is not a finite number"),
        ("gpt.run", "7 Q0 c 4 1.0", "gpt.run, line 4: 5 columns; expected 6"),
        ("gpt.run", "7 Q0 c 4 inf g", "gpt.run, line 4: 'inf' is not a finite number"),
        ("gpt.run", "7 Q0 a 4 0.5 g", "gpt.run, line 4: query 7 has document a already"),
        ("gpt.run", None, "gpt.run is empty"),
        ("gpt.run", "\n7 Q0 z 5 0 g", "bm25.run: query 7 is not in .*qrels.txt"),
    ],
)
def test_a_trec_line_at_fault_leaves_nothing(lists, file, line, message):
    text = "\n" if line is None else RUNS[file] + line + "\n"
    (lists / file).write_text(text)
    if "is not in" in message:
        (lists / "qrels.txt").write_text("70 0 a 1\n")
    config = trec_config(lists)
    with pytest.raises(UserError, match=message):
        kd.prepare(config)
    assert_nothing_written(lists.parent)


def test_keys_at_fault_are_named(lists, fold):
    with pytest.raises(UserError, match=r"data\.final='llm' is not one of data\.runs: bm25, dense"):
        kd.prepare(trec_config(lists, final="llm"))
    with pytest.raises(UserError, match=r"data\.path is empty"):
        kd.prepare(trec_config(lists, path=""))
    with pytest.raises(UserError, match=r"test2\.txt does not exist"):
        kd.prepare(letor_config(fold, splits=dict(test="test2")))
    with pytest.raises(UserError, match=r"a name has {split}; set data\.split=column"):
        kd.prepare(trec_config(lists, dict(gpt="{split}.run")))
    mixed = trec_config(lists, dict(gpt="{split}.run", bm25="bm25.run"), split="column")
    for config in (mixed, letor_config(fold, scores="train.scores")):
        with pytest.raises(UserError, match=r"put {split} in all of these names, or in none"):
            kd.prepare(config)


def test_scores_decide_the_order_of_a_run(lists):
    assert {query: [*of] for query, of in read_run(lists / "gpt.run").items()} == {"7": [*"bda"]}
