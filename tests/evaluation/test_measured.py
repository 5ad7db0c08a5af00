import pytest

from kd_ranker.errors import UserError
from kd_ranker.evaluation import measured, results

MADE_OF = {"config": "a"}


@pytest.fixture
def folder(tmp_path):
    tables = {results.CURVES_FILE: "k\n1\n", results.FILE: "m\n2\n"}
    measured.write_tables(tmp_path, tables, MADE_OF)
    return tmp_path


def test_tables_are_known_by_their_rankers_and_their_bytes(folder):
    assert (folder / results.FILE).read_text() == "m\n2\n"
    assert measured.is_measured(folder, MADE_OF)
    assert not measured.is_measured(folder, {"config": "b"})
    measured.check_whole(folder)
    (folder / results.CURVES_FILE).write_text("k\n3\n")
    assert not measured.is_measured(folder, MADE_OF)
    assert not measured.is_whole(folder)
    with pytest.raises(UserError, match=f"{results.CURVES_FILE} has changed; start the command"):
        measured.check_whole(folder)


def test_tables_that_are_half_written_belong_to_no_ranker(folder):
    class Dying(dict):
        def items(self):
            yield results.FILE, "m\n3\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured.write_tables(folder, Dying(), MADE_OF)
    assert not measured.is_measured(folder, MADE_OF)
    with pytest.raises(UserError, match="is not finished; start the command"):
        measured.check_whole(folder)
