import os
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from ml_collections import ConfigDict

from kd_ranker.config.defaults import feature
from kd_ranker.errors import UserError
from kd_ranker.sources.logs import columns, files, pages
from tests import faults
from tests.sources import faulty_logs
from tests.sources.faulty_logs import make_rows, write_log

IDS, WORDS = pa.list_(pa.int64()), pa.list_(pa.string())


def opened(config) -> files.Log:
    return files.open_log(faulty_logs.layout(config))


def fault_of(config) -> str:
    return faults.fault_of(opened, config)


@pytest.fixture
def log(tmp_path):
    return write_log(tmp_path / "log", make_rows(0))


def test_a_path_that_names_nothing_says_so(tmp_path, log):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.csv").write_text("a,b\n1,2")
    (tmp_path / "text.parquet").write_text("not what it is called")
    for name in ("a.zip", "b.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(log / "part-0.parquet", "part-0.parquet")
    archives = ",".join(f"zip://part-0.parquet::{tmp_path}/{name}" for name in ("a.zip", "b.zip"))
    for path, message in (
        ("absent", "absent does not exist; give a file, a directory or a glob"),
        ("empty", "holds no file that ends in .parquet; it is empty; give a pattern for files of"),
        ("other", "holds no file that ends in .parquet; it holds log.csv; give a pattern for fil"),
        ("other/log.csv", "log.csv has no column 'request_id' (data.columns."),
        ("absent.tsv.gz", "absent.tsv.gz: IO Error: No files found"),
        ("*.parquet.gz", "*.parquet.gz matches no file"),
        ("text.parquet", "text.parquet cannot be read as Parquet: "),
        ("nowhere://bucket/log", "data.path=nowhere://bucket/log cannot be read: Protocol not"),
        ("log,memory://log", "names several file systems; give those of one"),
        (archives, "names several file systems; give those of one"),
    ):
        path = path if path.partition(",")[0].count("://") else f"{tmp_path}/{path}"
        assert message in fault_of(faulty_logs.config(path, tmp_path))


def test_files_are_in_order_without_what_writers_leave(tmp_path, log, monkeypatch, caplog):
    for name in ("_temporary/0", ".tmp", "_delta_log", "_date=1", "deep"):
        (log / name).mkdir(parents=True)
        os.link(log / "part-0.parquet", log / name / "b.parquet")
    (log / "_SUCCESS").write_text("")
    (log / "_metadata.parquet").write_text("")
    more = write_log(tmp_path / "more", make_rows(1), files=2)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = opened(faulty_logs.config(f"{more}/*, ~/log,{more},{log},", tmp_path))
    assert [file.removeprefix(f"{tmp_path}/") for file in found.files] == [
        "log/_date=1/b.parquet",
        "log/deep/b.parquet",
        "log/part-0.parquet",
        "more/part-0.parquet",
        "more/part-1.parquet",
    ]
    assert "is a Delta table: all its files are read" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda of: of.append_column("AGE", of["age"]),
         "has columns 'age' and 'AGE', and case does not count; rename one"),
        (lambda of: of.append_column("File_Row_Number", of["age"]),
         "has columns 'file_row_number', which the engine adds, and 'File_Row_Number', and"),
        (lambda of: of.append_column("age", of["hour"]), "has columns 'age' and 'age'"),
        (lambda of: of.drop_columns(["age"]), "log has no column 'age' (data.features.age); "),
        (lambda of: of.drop_columns(["watch"]),
         "part-0.parquet has no column 'watch' (data.labels.watch)"),
        (lambda of: of.rename_columns({"user_id": "user", "like": "liked"}),
         "'user_id' (data.columns.user), 'like' (data.labels.like); did you mean 'user'? name one"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(tmp_path, log, change, message):
    path = log / "part-0.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    assert message in fault_of(faulty_logs.config(log, tmp_path))


def test_names_of_folders_give_columns_that_no_file_has(tmp_path):
    log = tmp_path / "log"
    for day, hour, country in (("05", 7, "n%20z"), ("6", 23, "__HIVE_DEFAULT_PARTITION__")):
        write_log(log / f"day={day}" / f"hour={hour}" / f"where={country}", make_rows(hour))
    write_log(log / "zone=x", make_rows(0))
    config = faulty_logs.config(log, tmp_path)
    config.data.features.where = feature("context", "category")
    assert opened(config).folder_columns.to_pydict() == {
        "day": [5, 6, None],
        "where": ["n z", None, None],
        "zone": [None, None, "x"],
    }
    path = log / "zone=x" / "part-0.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["hour"]), path)
    config.data.columns.label_weight, config.data.features = "hour", ConfigDict()
    assert "part-0.parquet has no column 'hour' (data.columns.label_weight)" in fault_of(config)


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_files_with_checksums_are_known_by_their_first_page(tmp_path, checksums, version):
    path = str(tmp_path / "a.parquet")
    options = dict(write_page_checksum=checksums, data_page_version=version, compression="zstd")
    for table in ({"a": range(1000)}, {"b": ["x"] * 1000}):
        pq.write_table(pa.table(table), path, **options)
        found = pages.has_checksums(LocalFileSystem(), path, pq.read_metadata(path))
        assert found == checksums


def test_a_page_that_does_not_match_its_checksum_is_refused(tmp_path, log):
    found = opened(faulty_logs.config(log, tmp_path))
    path = log / "part-0.parquet"
    pq.write_table(pq.read_table(path), path, write_page_checksum=True, compression="none")
    pages.check_pages(found, {"age", "tags"}, 2)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(3)
    assert chunk.path_in_schema == "age"
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"part-0.parquet cannot be read as Parquet: .*CRC"):
        pages.check_pages(found, {"age", "tags"}, 2)
    pages.check_pages(found, {"tags"}, 2)


def test_a_feature_may_begin_with_a_later_file(tmp_path, log, caplog):
    table = pq.read_table(log / "part-0.parquet")
    pq.write_table(table.drop_columns(["age"]), log / "part-1.parquet")
    opened(faulty_logs.config(log, tmp_path))
    assert "column 'age' (data.features.age) is missing in 1 file of 2, where" in caplog.text


@pytest.mark.parametrize("type_", [pa.float64(), pa.bool_(), pa.int64()])
def test_ids_of_two_files_are_no_texts_and_fractions(tmp_path, log, type_):
    path, config = log / "part-0.parquet", faulty_logs.config(log, tmp_path)
    table = pq.read_table(path).drop_columns(["author"])
    for name, of in (("part-0", type_), ("part-1", pa.string())):
        column = pa.array([1] * len(table)).cast(of)
        pq.write_table(table.append_column("author", column), log / f"{name}.parquet")
    if pa.types.is_integer(type_):
        opened(config)
    else:
        assert fault_of(config).startswith("column 'author' (data.features.author) is ")


@pytest.mark.parametrize(
    ("key", "type_", "by_request", "message"),
    [
        ("columns.time", IDS, False, "int64>; it takes timestamps, numbers or ISO"),
        ("columns.user", IDS, False, "int64>; it takes whole numbers or texts"),
        ("labels.watch", WORDS, False, "is list<item: string>; it takes numbers, or true"),
        ("teacher.like", pa.string(), False, "(data.teacher.like) is string; it takes numbers"),
        ("columns.stage", pa.float64(), False, "is double; it takes texts or whole numbers"),
        ("columns.item", pa.int64(), True, "is int64; it takes lists of whole numbers or texts"),
        ("features.age", pa.string(), False, "(data.features.age) is string; it takes num"),
        ("features.age", pa.struct({"a": pa.int64()}), False, "takes numbers; flatten it: make"),
        ("features.tags", pa.int32(), False, "is int32; it takes lists of whole numbers"),
        ("features.tags", pa.null(), False, "(data.features.tags) holds nothing in any file;"),
        ("features.author", WORDS, False, "string>; it takes whole numbers or texts"),
        ("features.author", pa.int64(), True, "is int64; it takes lists of whole numbers or"),
        ("features.tags", IDS, True, "int64>; it takes lists of lists of whole num"),
        ("features.recent", WORDS, False, "(data.features.recent) holds texts, and 'item_id' (d"),
    ],
)  # fmt: skip
def test_a_column_of_another_type_is_named(key, type_, by_request, message):
    rows = "request" if by_request else "candidate"
    layout = faulty_logs.layout(faulty_logs.config("log", "datasets", rows=rows))
    schema = faulty_logs._schema(make_rows(0, requests=1), by_request)
    types = {of.name: of.type for of in schema}
    columns.check_types(layout, types)
    (column,) = (of.column for of in columns.wanted_columns(layout) if of.key == f"data.{key}")
    message_of_type = faults.fault_of(columns.check_types, layout, types | {column: type_})
    assert message_of_type.startswith(f"column {column!r} (data.{key}) ")
    assert message in message_of_type


def test_differences_between_manifests_are_counted():
    before = {"a": [1, ""], "b": [2, ""], "c": [3, ""]}
    assert files.manifest_differences(before, dict(before)) == ""
    now = {"a": [1, ""], "b": [2, "later"], "d": [4, ""], "e": [5, ""]}
    found = files.manifest_differences(before, now)
    assert found == "2 files new, 1 file gone, 1 file rewritten"
