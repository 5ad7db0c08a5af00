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
from kd_ranker.requests import lock
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources import converted
from kd_ranker.sources.logs.layout import ALLOWABLE
from kd_ranker.sources.ranking_files import agreement
from kd_ranker.sources.registry import SOURCES
from tests.faults import fault_of

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
    """The log as pandas reads it, a row per document."""
    converter = SOURCES[config.data.name].open_source.__self__
    folder.mkdir(exist_ok=True)
    converter.write(config.data, converter.find_files(config.data), folder)
    return pq.read_table(folder / "log.parquet").to_pandas()


def test_letor_rows_are_those_of_scikit_learn(fold, tmp_path):
    rows = rows_of(letor_config(fold), tmp_path / "log")
    assert (
        rows["time"].diff().dropna().tolist()
        == rows["request"].ne(rows["request"].shift())[1:].astype(int).tolist()
    )
    for split, word in WORDS.items():
        features, grades, queries = load_svmlight_file(
            str(fold / f"{word}.txt"), n_features=WIDTH, query_id=True, zero_based=False
        )
        of_split = rows[rows["split"] == split]
        read = np.stack(of_split["features"])
        np.testing.assert_array_equal(read, features.toarray().astype(np.float32))
        scores = np.loadtxt(fold / f"{word}.scores")
        ranks = of_split.groupby("request")["final_score"].rank("first", ascending=False)
        for column, expected in (
            ("request", queries.astype(str)),
            ("grade", grades),
            ("grade_1", grades >= 1),
            ("grade_2", grades >= 2),
            ("final_score", scores.astype(np.float32)),
            ("final_rank", ranks),
        ):
            np.testing.assert_array_equal(of_split[column], expected)
    assert rows["item"][0] == "GX011-00-1234"
    assert {*rows["stage"]} == {"shown"}


def test_unnamed_documents_are_numbered_and_zeros_optional(tmp_path):
    for word in WORDS.values():
        (tmp_path / f"{word}.scores").write_text("0.1\n0.1000000000001\n")
        (tmp_path / f"{word}.txt").write_text(f"2 qid:{word} 2:0.5\n\n0 qid:{word} 1:1 5:-2e-1 #\n")
    config = letor_config(tmp_path, sparse=True)
    rows = rows_of(config, tmp_path / "log")
    first = rows[rows["request"] == "vali"]
    assert first["item"].tolist() == ["vali-0", "vali-1"]
    assert first["final_rank"].tolist() == [2, 1]  # of scores that are equal in 32 bits
    np.testing.assert_allclose(np.stack(first["features"]), [[0, 0.5, 0, 0, 0], [1, 0, 0, 0, -0.2]])


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
    with config.unlocked():
        config.data.runs = runs or dict(bm25="bm25.run", dense="dense.run", gpt="gpt.run")
    given = dict(path=str(folder), dir=str(folder.parent / "data"), final="gpt", allow=ALLOWABLE)
    config.data.update(given | changes)
    return config


def test_trec_rows_are_those_of_pandas(lists, tmp_path):
    rows = rows_of(trec_config(lists), tmp_path / "log")
    names = ["query", "q0", "document", "rank", "score", "tag"]
    runs = {
        run: pd.read_csv(lists / f"{run}.run", sep=r"\s+", names=names, dtype={"query": str})
        for run in ("bm25", "dense", "gpt")
    }
    expected = {}
    for run, table in runs.items():
        table = table.sort_values(["score", "rank"], ascending=[False, True])
        table["place"] = table.groupby("query").cumcount() + 1
        for line in table.itertuples():
            found = expected.setdefault((line.query, line.document), {})
            found |= {f"{run}_score": line.score, f"{run}_rank": line.place}
    qrels = pd.read_csv(lists / "qrels.txt", sep=r"\s+", names=["query", "", "document", "grade"])
    grades = {(str(line.query), line.document): line.grade for line in qrels.itertuples()}
    for key, found in expected.items():
        found["grade"] = grade = grades.get(key, np.nan)
        found["grade_2"] = np.nan if np.isnan(grade) else grade >= 2
        found["stage"] = "passed" if "gpt_rank" in found else "retrieved"
        found["stage"] = found["stage"] if np.isnan(grade) else "shown"
    wanted = pd.DataFrame.from_dict(expected, orient="index")
    # In the order of the qrels; 9 has no grades, and no graded document of 8 is in a run.
    wanted = pd.concat([wanted.loc[[query]] for query in ("7", "5")])
    assert [*zip(rows["request"], rows["item"], strict=True)] == [*wanted.index]
    assert rows["stage"].tolist() == wanted.pop("stage").tolist()
    found = rows[[*wanted]].to_numpy(float)
    np.testing.assert_allclose(found, wanted.to_numpy(float))


def test_trec_files_of_splits_become_a_dataset(tmp_path):
    order = np.random.default_rng(1).permutation
    for word, queries in dict(train=range(30), vali=range(30, 40), test=range(40, 50)).items():
        (tmp_path / word).mkdir()
        for run in ("first", "final"):
            lines = []
            for query in queries:
                for rank, document in enumerate(order(12), 1):
                    lines.append(f"{query} Q0 d{document} {rank} {1 / rank} {run}")
            (tmp_path / word / f"{run}.run").write_text("\n".join(lines))
    qrels = []
    for query in range(50):
        qrels.append(f"{query} 0 d{query % 12} 2")
        qrels.append(f"{query} 0 d{(query + 1) % 12} 0")
    (tmp_path / "qrels.txt").write_text("\n".join(qrels))
    runs = dict(first="{split}/first.run", final="{split}/final.run")
    config = trec_config(tmp_path, runs, final="final")
    checks.validate(config)
    kd.prepare(config)
    dataset = datasets.dataset_of(config)
    assert [len(dataset.columns[split]) for split in SPLITS] == [30, 10, 10]


def test_a_query_is_in_the_run_of_one_split(lists, tmp_path, caplog):
    for word, place in zip(WORDS.values(), ("7 Q0 a", "5 Q0 z", "8 Q0 a"), strict=True):
        (lists / f"{word}.run").write_text(f"9 Q0 a 1 1 x\n{place} 1 1 x\n")
    config = trec_config(lists, dict(first="{split}.run"), final="")
    rows = rows_of(config, tmp_path / "log")
    splits = dict(zip(rows["request"], rows["split"], strict=True))
    assert splits == {"7": "train", "5": "validation", "8": "test"}
    assert caplog.text.count("left out 1 queries") == caplog.text.count("left out") == 1
    (lists / "vali.run").write_text("7 Q0 a 1 1 x\n")
    config.data.teacher, config.data.columns, config.data.features = {}, {}, {}
    with pytest.raises(
        UserError, match=r"1 requests, such as '7', do not have one of train, valid"
    ):
        kd.prepare(config)


def test_agreement_is_the_share_of_the_top(tmp_path):
    (tmp_path / "a").write_text(
        "1 Q0 a 1 3 x\n1 Q0 b 2 2 x\n1 Q0 c 3 1 x\n2 Q0 a 1 1 x\n3 Q0 a 1 1 x"
    )
    # Equal scores are ordered by rank; a byte-order mark is skipped.
    (tmp_path / "b").write_text(
        "\ufeff1 Q0 a 3 1 x\n1 Q0 b 2 1 x\n1 Q0 c 9 3 x\n2 Q0 a 1 1 x\n4 Q0 a 1 1 x"
    )
    found = agreement(tmp_path / "a", tmp_path / "b", k=2)
    assert (found.mean, found.queries) == (0.75, 2)
    assert (found.low, found.high) == (0.5, 1)
    for k, within, mean in ((3, 0, 1), (1, 0, 0.5), (1, 2, 0.5), (1, 3, 1)):
        assert agreement(tmp_path / "a", tmp_path / "b", k, within).mean == mean
    (tmp_path / "c").write_text("7 Q0 a 1 1 x")
    with pytest.raises(UserError, match="share no query"):
        agreement(tmp_path / "a", tmp_path / "c")
    with pytest.raises(UserError, match=r"d cannot be read as plain text .*: .*No files found"):
        agreement(tmp_path / "a", tmp_path / "d")
    for k, within in ((0, 0), (3, 2)):
        with pytest.raises(UserError, match=f"k={k}, within={within}: k must be at least 1"):
            agreement(tmp_path / "a", tmp_path / "b", k, within)


FEATURES = "its features are not 1 to data.num_features=5"
LAYOUT = "not “grade qid:query 1:number 2:number ...”"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 qid:900 1:1 2:1 3:1 4:1", FEATURES),
        ("1 qid:900 1:1 2:1 3:1 4:1 5:1 6:1", FEATURES),
        ("1 qid:900 1:1 2:nan 3:1 4:1 5:1", LAYOUT),
        ("1 900 1:1 2:1 3:1 4:1 5:1", LAYOUT),
        ("1.5 qid:900 1:1 2:1 3:1 4:1 5:1", LAYOUT),
        ("1 qid:50 1:1 2:1 3:1 4:1 5:1 # docid = GX050-00-1234", "its query has this document"),
        ("1 qid:11 1:1 2:1 3:1 4:1 5:1", "its query was before others, or in an earlier split"),
    ],
)
def test_a_letor_line_at_fault_leaves_nothing(fold, line, message):
    path = fold / "train.txt"
    number = path.read_text().count("\n") + 2
    path.write_text(path.read_text() + f"\n{line}\n0 qid:900 9:9\n")
    with pytest.raises(UserError, match=f"train.txt, line {number}: {message}"):
        kd.prepare(letor_config(fold))
    assert not [*(fold.parent / "data" / "logs").glob("[!.]*")]


def test_scores_of_another_length_are_named(fold):
    path = fold / "vali.scores"
    text, number = path.read_text(), path.read_text().count("\n")
    path.write_text(text + "1\n")
    message = rf"vali\.scores has {number + 1} scores for {number} lines of .*vali\.txt"
    with pytest.raises(UserError, match=message):
        kd.prepare(letor_config(fold))
    path.write_text(text.replace("\n", " x\n", 1))
    with pytest.raises(UserError, match=r"vali\.scores, line 1: not “number”"):
        kd.prepare(letor_config(fold))


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("qrels.txt", "7 0 b", "qrels.txt, line 7: not “query 0 document grade”"),
        ("qrels.txt", "7 0 a 1", "qrels.txt, line 7: its query has this document already"),
        ("gpt.run", "7 Q0 c 4 1.0", "gpt.run, line 4: not “query Q0 document rank score tag”"),
        ("gpt.run", "7 Q0 c 4 1e39 g", "cannot be read: Conversion Error: .*1e\\+39"),
        ("gpt.run", "7 Q0 a 4 0.5 g", "gpt.run, line 4: its query has this document already"),
        ("gpt.run", b"\n", "gpt.run is empty"),
        ("gpt.run", b"9 Q0 a 1 1 x", "gpt.run: .*qrels.txt has none of its queries"),
        ("gpt.run", b"\x1f\x8b\x08\x00", "gpt.run cannot be read as plain text in UTF-8"),
        ("gpt.run", "7 Q0 a 1 1 x".encode("utf-16"), "gpt.run cannot be read as plain text"),
    ],
)
def test_a_trec_file_at_fault_leaves_nothing(lists, file, line, message):
    content = line if isinstance(line, bytes) else f"{RUNS[file]}{line}\n".encode()
    (lists / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        kd.prepare(trec_config(lists))
    assert not [*(lists.parent / "data" / "logs").glob("[!.]*")]


def test_keys_at_fault_are_named(lists, fold):
    copied = (fold / "train.txt").read_text().partition("\n")[0]
    (fold / "other.txt").write_text(f"{copied}\n" + (fold / "vali.txt").read_text())
    for config, message in (
        (trec_config(lists, final="llm"), r"data\.final='llm' is not one of data\.runs: bm25"),
        (trec_config(lists, path=""), r"does not exist; set data\.path to the folder of the rank"),
        (letor_config(fold, splits=dict(test="test2")), r"test2\.txt does not exist"),
        (letor_config(fold, "mq2008", splits=dict(validation="other")),
         r"other\.txt, line 1: its query was .* in an earlier split"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            kd.prepare(config)


def test_a_log_converted_just_before_the_lock_is_kept(fold, monkeypatch):
    """Two configs with another `funnel.passed` share the log of their raw files."""
    config, other = letor_config(fold), letor_config(fold)
    other.funnel.passed += 1

    def hold_after_another_build(folder):
        monkeypatch.setattr(converted, "hold_work", lock.hold_work)
        kd.prepare(other)
        return lock.hold_work(folder)

    monkeypatch.setattr(converted, "hold_work", hold_after_another_build)
    directory = kd.prepare(config).directory
    assert directory != kd.prepare(other).directory
    assert len([*(fold.parent / "data" / "logs").glob("[!.]*")]) == 1


def test_a_log_that_another_process_converts_is_one_line(fold, monkeypatch):
    config = letor_config(fold)
    converter = SOURCES[config.data.name].open_source.__self__
    folder = converter._folder(config.data, converter.find_files(config.data))
    with lock.hold_work(folder.with_name(f".unfinished-{folder.name}")):
        assert f"{folder.name} is held by process " in fault_of(kd.prepare, config)
    assert kd.prepare(config).directory.is_dir()


def test_what_a_killed_conversion_left_is_removed(fold):
    config = letor_config(fold)
    converter = SOURCES[config.data.name].open_source.__self__
    folder = converter._folder(config.data, converter.find_files(config.data))
    left = folder.with_name(f".unfinished-{folder.name}") / "work" / "log"
    left.mkdir(parents=True)
    (left / "log.parquet").write_bytes(b"PAR1")
    kd.prepare(config)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]
