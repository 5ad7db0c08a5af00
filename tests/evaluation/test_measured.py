import pytest

from kd_ranker.errors import UserError
from kd_ranker.evaluation import kept, measured, results

WHOSE = {"config": "a"}


@pytest.fixture
def folder(tmp_path):
    measured.write_tables(tmp_path, {results.CURVES_FILE: "k\n1\n", results.FILE: "m\n2\n"}, WHOSE)
    return tmp_path


def test_tables_are_known_by_whose_they_are_and_by_their_bytes(folder):
    assert (folder / results.FILE).read_text() == "m\n2\n"
    assert measured.is_measured(folder, WHOSE)
    assert not measured.is_measured(folder, {"config": "b"})
    assert measured.is_whole(folder)
    measured.check_whole(folder)


@pytest.mark.parametrize("file", [results.CURVES_FILE, results.FILE, measured.FILE])
@pytest.mark.parametrize("how", ["cut", "changed", "removed"])
def test_damage_is_found_and_named(folder, file, how):
    path = folder / file
    text = path.read_text()
    if how == "removed":
        path.unlink()
    else:
        path.write_text(text[:-2] if how == "cut" else text[:-2].replace("2", "3") + "7")
    assert not measured.is_measured(folder, WHOSE)
    assert not measured.is_whole(folder)
    if file == measured.FILE and how == "removed":
        measured.check_whole(folder)  # as of a release that wrote none
        return
    with pytest.raises(UserError, match=f"{file} is not as it was written; start the command"):
        measured.check_whole(folder)


def test_a_table_that_came_later_is_no_damage_to_those_there(folder):
    (folder / kept.FILE).write_text("more")
    measured.check_whole(folder)


def test_tables_that_are_half_written_are_nobodys(folder):
    class Dying(dict):
        def items(self):
            yield results.FILE, "m\n3\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured.write_tables(folder, Dying(), WHOSE)
    assert not measured.is_measured(folder, WHOSE)
