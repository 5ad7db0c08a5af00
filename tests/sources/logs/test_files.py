import datetime
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from ml_collections import ConfigDict

from kd_ranker.config.features import feature
from kd_ranker.errors import UserError
from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.files import manifest_differences
from kd_ranker.sources.logs.layout import read_layout
from tests.sources import faulty_logs
from tests.sources.faulty_logs import make_rows, write_log


def opened(config) -> files.Log:
    return files.open_log(read_layout(config.data, config.tasks, config.funnel))


def fault_of(config) -> str:
    with pytest.raises(UserError) as caught:
        opened(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def log(tmp_path):
    return write_log(tmp_path / "log", make_rows(0))


def test_a_path_that_names_nothing_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.csv").write_text("a,b\n1,2")
    for path, message in (
        (tmp_path / "absent", "absent does not exist; give a file, a directory or a glob"),
        (tmp_path / "empty", "holds no file that ends in .parquet; it is empty"),
        (
            tmp_path / "other",
            "holds no file that ends in .parquet; it holds log.csv; give a pattern for files of",
        ),
        (tmp_path / "other" / "log.csv", "log.csv has no column 'request_id' (data.columns."),
        (tmp_path / "absent.tsv.gz", "absent.tsv.gz: IO Error: No files found"),
        (tmp_path / "*.parquet", "*.parquet matches no file"),
        ("nowhere://bucket/log", "data.path=nowhere://bucket/log cannot be read: Protocol not"),
    ):
        assert message in fault_of(faulty_logs.config(path, tmp_path))


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "log.parquet"
    path.write_text("not what it is called")
    assert f"{path} cannot be read as Parquet: " in fault_of(faulty_logs.config(path, tmp_path))


def test_a_directory_is_read_in_the_order_of_names_without_what_writers_leave(tmp_path, log):
    (log / "deep").mkdir()
    (log / "part-0.parquet").rename(log / "deep" / "b.parquet")
    write_log(tmp_path / "more", make_rows(1))
    (tmp_path / "more" / "part-0.parquet").rename(log / "a.parquet")
    (log / "_SUCCESS").write_text("")
    (log / "_metadata.parquet").write_text("")
    config = faulty_logs.config(log, tmp_path)
    found = opened(config)
    assert [file.removeprefix(f"{log}/") for file in found.files] == ["a.parquet", "deep/b.parquet"]


def test_what_a_writer_keeps_below_a_log_is_not_of_it(tmp_path, log, caplog):
    for folder in ("_temporary/0", ".tmp", "_delta_log", "_date=1"):
        (log / folder).mkdir(parents=True)
        pq.write_table(pq.read_table(log / "part-0.parquet"), log / folder / "part.parquet")
    config = faulty_logs.config(log, tmp_path)
    found = opened(config)
    names = [file.removeprefix(f"{log}/") for file in found.files]
    assert names == ["_date=1/part.parquet", "part-0.parquet"]
    assert "is a Delta table: all its files are read" in caplog.text


def test_several_paths_are_one_log(tmp_path, log):
    more = write_log(tmp_path / "more", make_rows(1), files=2)
    config = faulty_logs.config(f"{log}/part-0.parquet,{more}/*,{more}", tmp_path)
    found = opened(config)
    assert [file.removeprefix(f"{tmp_path}/") for file in found.files] == [
        "log/part-0.parquet",
        "more/part-0.parquet",
        "more/part-1.parquet",
    ]
    config = faulty_logs.config(f"{log},memory://log", tmp_path)
    assert "names several file systems; give those of one" in fault_of(config)


def test_two_archives_are_two_file_systems(tmp_path, log):
    for name in ("a.zip", "b.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(log / "part-0.parquet", "part-0.parquet")
    urls = ",".join(f"zip://part-0.parquet::{tmp_path / name}" for name in ("a.zip", "b.zip"))
    assert "names several file systems" in fault_of(faulty_logs.config(urls, tmp_path))
    assert "a comma without a path" in fault_of(faulty_logs.config(f"{log},", tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda of: of.append_column("AGE", of["age"]),
         "has columns 'age' and 'AGE', which differ only in case; rename one"),
        (lambda of: of.append_column("File_Row_Number", of["age"]),
         "has a column 'File_Row_Number', a name that the engine needs"),
        (lambda of: of.append_column("age", of["hour"]),
         "part-0.parquet has two columns 'age' (data.features.age); rename one of them"),
        (lambda of: of.drop_columns(["tags"]).append_column("tags", pa.nulls(len(of))),
         "column 'tags' (data.features.tags) holds nothing in any file; leave it out"),
        (lambda of: of.drop_columns(["age"]).append_column("age", pa.array([{"a": 3}] * len(of))),
         "is struct<a: int64>; it takes numbers; flatten it: make each of its"),
        (lambda of: of.drop_columns(["age"]), "log has no column 'age' (data.features.age); "),
        (lambda of: of.drop_columns(["watch"]),
         "part-0.parquet has no column 'watch' (data.labels.watch)"),
        (lambda of: of.slice(0, 0), "1 file without any row"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(tmp_path, log, change, message):
    path = log / "part-0.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    assert message in fault_of(faulty_logs.config(log, tmp_path))


def test_a_column_that_some_files_have_from_their_folders_is_refused(tmp_path):
    log = tmp_path / "log"
    write_log(log / "age=1", make_rows(0))
    write_log(log / "age=2", make_rows(1))
    path = log / "age=1" / "part-0.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["age"]), path)
    config = faulty_logs.config(log, tmp_path)
    config.data.columns.label_weight, config.data.features = "age", ConfigDict()
    assert "part-0.parquet has no column 'age' (data.columns.label_weight)" in fault_of(config)


def test_a_day_that_no_month_has_is_a_text():
    assert files.given_by_folders(["d=2024-02-30/a"])["d"].to_pylist() == ["2024-02-30"]


def test_a_home_folder_is_found(tmp_path, log, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = faulty_logs.config("~/log", tmp_path)
    found = opened(config)
    assert found.files == (str(log / "part-0.parquet"),)


def test_folders_of_one_name_and_many_values_give_a_column(tmp_path):
    log = tmp_path / "log"
    for date, hour, country in (("2024-05-01", 7, "n%20z"), ("2024-05-02", 23, files._NONE)):
        folder = log / f"date={date}" / f"hour={hour}" / f"where={country}"
        write_log(folder, make_rows(hour))
    config = faulty_logs.config(log, tmp_path)
    config.data.features.where = feature("context", "category")
    found = opened(config)
    # The files have an hour of their own.
    assert found.given.to_pydict() == {
        "date": [datetime.date(2024, 5, 1), datetime.date(2024, 5, 2)],
        "where": ["n z", None],
    }


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_files_with_checksums_are_known_by_their_first_page(tmp_path, checksums, version):
    path = str(tmp_path / "a.parquet")
    rows = {"a": range(1000), "b": ["x"] * 1000}
    for columns in (["a", "b"], ["b", "a"]):
        table = pa.table(rows).select(columns)
        pq.write_table(
            table,
            path,
            write_page_checksum=checksums,
            data_page_version=version,
            compression="zstd",
        )
        found = files._has_checksums(LocalFileSystem(), path, pq.read_metadata(path))
        assert found == checksums


def test_a_page_that_does_not_match_its_checksum_is_refused(tmp_path, log):
    config = faulty_logs.config(log, tmp_path)
    found = opened(config)
    path = log / "part-0.parquet"
    pq.write_table(pq.read_table(path), path, write_page_checksum=True, compression="none")
    files.check_pages(found, {"age", "tags"}, 2)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(3)
    assert chunk.path_in_schema == "age"
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"part-0.parquet cannot be read as Parquet: .*CRC"):
        files.check_pages(found, {"age", "tags"}, 2)
    files.check_pages(found, {"tags"}, 2)


def test_a_feature_may_begin_with_a_later_file(tmp_path, log, caplog):
    table = pq.read_table(log / "part-0.parquet")
    pq.write_table(table.drop_columns(["age"]), log / "part-1.parquet")
    config = faulty_logs.config(log, tmp_path)
    opened(config)
    assert "column 'age' (data.features.age) is missing in 1 file of 2, where" in caplog.text


def test_missing_columns_are_named_with_their_keys_and_a_hint(tmp_path, log):
    config = faulty_logs.config(log, tmp_path)
    config.data.columns.user = "user"
    config.data.labels.like = "liked"
    message = fault_of(config)
    assert (
        "part-0.parquet has no column 'user' (data.columns.user), 'liked' (data.labels.like)"
        in (message)
    )
    assert "did you mean 'user_id'? it has: request_id, time, user_id" in message


@pytest.mark.parametrize(
    ("section", "name", "column", "message"),
    [
        (
            "columns",
            "time",
            "recent",
            "is list<element: int64>; it takes timestamps, numbers or ISO",
        ),
        ("columns", "user", "recent", "is list<element: int64>; it takes whole numbers or texts"),
        ("labels", "watch", "tags", "(data.labels.watch) is list<element: string>; it takes nu"),
        ("teacher", "like", "source", "(data.teacher.like) is string; it takes numbers"),
        ("columns", "stage", "score", "is double; it takes texts or whole numbers"),
    ],
)
def test_a_column_of_another_type_says_what_it_is_and_what_it_should_be(
    tmp_path, log, section, name, column, message
):
    config = faulty_logs.config(log, tmp_path)
    config.data.features = ConfigDict()  # which some of these are
    config.data[section][name] = column
    assert message in fault_of(config)


@pytest.mark.parametrize(
    ("name", "column", "by_request", "message"),
    [
        ("age", "country", False, "(data.features.age) is string; it takes numbers"),
        ("tags", "author", False, "is int32; it takes lists of whole numbers or texts"),
        ("author", "tags", False, "is list<element: string>; it takes whole numbers or texts"),
        ("recent", "spots", False, "column 'spots' (data.features.recent) holds text ids, and"),
        ("author", "user_id", True, "is int64; it takes lists of whole numbers or texts"),
        ("tags", "recent", True, "int64>; it takes lists of lists of whole numbers or texts"),
    ],
)
def test_a_feature_of_another_type_says_so(tmp_path, name, column, by_request, message):
    log = write_log(tmp_path / "log", make_rows(0), by_request)
    rows = "request" if by_request else "candidate"
    config = faulty_logs.config(log, tmp_path, rows=rows)
    config.data.features[name].column = column
    assert message in fault_of(config)


def test_a_row_a_request_needs_lists_of_items(tmp_path, log):
    config = faulty_logs.config(log, tmp_path, rows="request")
    message = fault_of(config)
    assert (
        "column 'item_id' (data.columns.item) is int64; it takes lists of whole numbers" in message
    )


@pytest.mark.parametrize(
    ("name", "key", "type_", "family"),
    [
        ("user_id", "columns.user", pa.string(), "text"),
        ("author", "features.author", pa.uint64(), "uint64"),
    ],
)
def test_files_that_disagree_on_the_type_of_an_id_are_named(
    tmp_path, log, name, key, type_, family
):
    table = pq.read_table(log / "part-0.parquet")
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, table[name].cast(type_)), log / "part-1.parquet")
    message = fault_of(faulty_logs.config(log, tmp_path))
    assert f"column {name!r} (data.{key}) holds integer ids in" in message
    assert f"part-0.parquet and {family} ids in" in message


def test_candidates_of_lists_are_counted_over_row_groups(tmp_path):
    rows = make_rows(2)
    log = write_log(tmp_path / "log", rows, by_request=True, row_group=7)
    config = faulty_logs.config(log, tmp_path, rows="request")
    found = opened(config)
    assert found.candidates == sum(len(row.candidates) for row in rows)


def test_differences_between_manifests_are_counted():
    before = {"a": [1, ""], "b": [2, ""], "c": [3, ""]}
    assert manifest_differences(before, dict(before)) == ""
    now = {"a": [1, ""], "b": [2, "later"], "d": [4, ""], "e": [5, ""]}
    assert manifest_differences(before, now) == "2 files new, 1 file gone, 1 file rewritten"
