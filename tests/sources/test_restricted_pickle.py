"""Plain data comes back as it was; whatever would run, or could, is refused and does not."""

import collections
import copyreg
import os
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_ranker.errors import UserError
from kd_ranker.sources.restricted_pickle import load

PROTOCOLS = range(6)
OF_ARRAYS = (3, 4)


def written(path: Path, value: object, protocol: int = 3) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def refusal_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_comes_back(tmp_path, protocol):
    plain = {
        1: [True, None, -(2**70), 1.5, "é", ("a", (2, 3))],
        "nested": {(1, 2): [], "empty": {}},
    }
    assert load(written(tmp_path / "plain.pkl", plain, protocol)) == plain


@pytest.mark.parametrize("protocol", OF_ARRAYS)
@pytest.mark.parametrize("dtype", ["?", "<i8", ">i4", "u1", "<f4", ">f8", "<i2"])
def test_arrays_and_scalars_of_numbers_come_back(tmp_path, protocol, dtype):
    array = np.random.default_rng(0).integers(0, 2, (3, 4)).astype(dtype)
    data = {
        "array": array,
        "columns first": np.asfortranarray(array),
        "empty": array[:0],
        "no axis": np.array(array[1, 1]),
        "scalar": array[1, 2],
    }
    read = load(written(tmp_path / "arrays.pkl", data, protocol))
    assert read["scalar"] == array[1, 2].item()
    assert type(read.pop("scalar")) in (bool, int, float)
    for name, value in read.items():
        assert isinstance(value, np.ndarray)
        # NumPy itself turns bytes around on the way.
        assert value.dtype == data[name].dtype.newbyteorder("=")
        assert value.shape == data[name].shape
        np.testing.assert_array_equal(value, data[name])
    assert read["columns first"].flags.f_contiguous


def test_what_older_releases_of_numpy_wrote_is_read(tmp_path):
    path = written(tmp_path / "old.pkl", {np.int64(7): np.arange(6).reshape(2, 3)})
    old = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    path.write_bytes(old)
    read = load(path)
    assert list(read) == [7]
    np.testing.assert_array_equal(read[7], [[0, 1, 2], [3, 4, 5]])


def test_a_defaultdict_is_a_dict_that_makes_nothing(tmp_path):
    data = collections.defaultdict(list, {1: [2]})
    read = load(written(tmp_path / "default.pkl", data))
    assert type(read) is dict
    assert read == {1: [2]}


def made_elsewhere() -> list:
    raise AssertionError("never called")


def test_a_name_that_may_be_mentioned_is_not_looked_up(tmp_path):
    path = written(tmp_path / "d.pkl", collections.defaultdict(made_elsewhere, {1: 2}))
    name = (made_elsewhere.__module__, "made_elsewhere")
    assert load(path, mentioned=[name]) == {1: 2}
    assert "made_elsewhere" in refusal_of(path)
    called = tmp_path / "called.pkl"
    called.write_bytes(b"c%s\nmade_elsewhere\n)R." % made_elsewhere.__module__.encode())
    with pytest.raises(UserError, match="calls what is no function"):
        load(called, mentioned=[name])


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("where", ["top", "key", "value", "object array"])
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "system"), (eval, "eval"), (exec, "exec"), (open, "open")]
)
def test_code_is_refused_by_name_and_does_not_run(tmp_path, protocol, where, function, name):
    trace = tmp_path / "trace"
    argument = {
        "system": f"touch {trace}",
        "eval": f"open({str(trace)!r}, 'w')",
        "exec": f"open({str(trace)!r}, 'w')",
    }
    evil = Calls(function, *([argument[name]] if name in argument else [str(trace), "w"]))
    array = np.empty(1, object)
    array[0] = evil
    value = {"top": evil, "key": {evil: 1}, "value": {1: evil}, "object array": {1: array}}[where]
    path = written(tmp_path / "evil.pkl", value, protocol)
    message = refusal_of(path)
    # Of an array, its dtype is met first, or the way in which older protocols write bytes.
    assert any(part in message for part in (name, "dtype 'O8'", "_codecs.encode"))
    assert not trace.exists()
    pickle.loads(path.read_bytes())  # the test's own pickle does run, in a reader that lets it
    assert trace.exists()


def test_an_array_of_objects_is_refused(tmp_path):
    path = written(tmp_path / "objects.pkl", np.array([1, "a", None], object))
    assert "dtype 'O8'" in refusal_of(path)


@pytest.mark.parametrize(
    "value",
    [
        np.array(["text"]),
        np.array([b"bytes"]),
        np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
        np.array(["2024-01-13"], "datetime64[D]"),
        np.array([1j]),
        np.ma.masked_array([1, 2], [True, False]),
        np.array([1, 2]).view(np.recarray),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.dtype}",
)
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, value):
    refusal_of(written(tmp_path / "array.pkl", value))


class Plain:
    pass


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Plain(), "Plain"),
        (Path("a"), "pathlib"),
        (range(3), "range"),
        (1j, "complex"),
        (slice(1), "slice"),
        (collections.OrderedDict(a=1), "OrderedDict"),
        (print, "print"),
        (Calls(getattr, {}, "keys"), "getattr"),
        (Calls(__import__, "os"), "__import__"),
        (Calls(copyreg._reconstructor, Plain, object, None), "_reconstructor"),
        (Calls(copyreg.add_extension, "os", "system", 77), "add_extension"),
        (Calls(np.load, "a", None, True), "numpy.load"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_objects_are_refused_by_name(tmp_path, value, name):
    assert name in refusal_of(written(tmp_path / "object.pkl", value))


def test_a_registered_extension_is_refused_by_name(tmp_path):
    copyreg.add_extension("posix", "system", 240)
    try:
        path = tmp_path / "extension.pkl"
        path.write_bytes(b"\x80\x02\x82\xf0X\x04\x00\x00\x00true\x85R.")
        assert "EXT1" in [opcode.name for opcode, *_ in pickletools.genops(path.read_bytes())]
        assert "posix.system" in refusal_of(path)
    finally:
        copyreg.remove_extension("posix", "system", 240)


# Instructions that no honest pickle has: calls and changes of what may be named.
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR"
DTYPE = b"cnumpy\ndtype\n(X\x02\x00\x00\x00i8tR"
PLAIN = b"(I3\nX\x01\x00\x00\x00<NNNI-1\nI-1\nI0\ntb"


def state_of_array(shape: bytes, dtype: bytes, raw: bytes) -> bytes:
    return b"(I1\n" + shape + dtype + b"I00\n" + raw + b"tb."


@pytest.mark.parametrize(
    "program",
    [
        b"cnumpy\nndarray\n(I5\ntR.",
        b"cnumpy\nndarray\n)\x81.",  # NEWOBJ
        b"cnumpy\nndarray\n}X\x01\x00\x00\x00aI1\nsb.",  # BUILD of its attributes
        b"cnumpy.core.multiarray\n_reconstruct\n}X\x08\x00\x00\x00__code__I1\nsb.",
        b"cnumpy.core.multiarray\n_reconstruct\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cbuiltins\ndict\n(I0\ntC\x01btR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I99\ntC\x01btR.",
        b"cnumpy.core.multiarray\nscalar\n(I1\nC\x01atR.",
        b"cnumpy.core.multiarray\nscalar\n(" + DTYPE + PLAIN + b"C\x03abctR.",
        b"cnumpy.core.multiarray\nscalar\n(" + DTYPE + PLAIN + b"C\x00tR.",
        b"cnumpy\ndtype\n(X\x01\x00\x00\x00OtR.",
        b"cnumpy\ndtype\n(NtR.",
        # A dtype whose state says that it points somewhere.
        DTYPE + b"(I3\nX\x01\x00\x00\x00|NNNI8\nI8\nI63\ntb.",
        DTYPE + b"(I3\nX\x01\x00\x00\x00<N(X\x01\x00\x00\x00at}I8\nI8\nI0\ntb.",
        # Arrays that reach beyond their bytes.
        ARRAY + state_of_array(b"(I9\nt", DTYPE + PLAIN, b"C\x08aaaaaaaa"),
        ARRAY + state_of_array(b"(I-1\nI-1\nt", DTYPE + PLAIN, b"C\x08aaaaaaaa"),
        ARRAY + state_of_array(b"(I1\nt", b"X\x02\x00\x00\x00i8", b"C\x08aaaaaaaa"),
        ARRAY + state_of_array(b"(I1\nt", DTYPE + PLAIN, b"(lI1\na"),
        ARRAY + b"}X\x01\x00\x00\x00aI1\nsb.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",
        b"cnumpy.core\nmultiarray._reconstruct\n.",
        b"Pid\n.",  # a persistent id
        b"\x80\x05\x97.",  # a buffer from outside
    ],
)
def test_crafted_programs_are_refused(tmp_path, program):
    path = tmp_path / "crafted.pkl"
    path.write_bytes(program)
    refusal_of(path)


def test_the_parts_of_crafted_programs_make_an_array_where_they_are_honest(tmp_path):
    path = tmp_path / "honest.pkl"
    raw = b"C\x10" + struct.pack("<qq", 5, 6)
    path.write_bytes(ARRAY + state_of_array(b"(I2\nt", DTYPE + PLAIN, raw))
    np.testing.assert_array_equal(load(path), [5, 6])


@given(st.binary(max_size=60))
def test_noise_is_plain_data_or_refused(tmp_path_factory, noise):
    path = tmp_path_factory.getbasetemp() / "noise.pkl"
    path.write_bytes(noise)
    try:
        load(path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017


# As small as they are, each would take a reader gigabytes, or ages; the numbers are such that a
# reader without bounds still comes to an end.
DOUBLED = b"".join(b"q%ch%c\x86" % (number, number) for number in range(22))
FROM_THE_TOP = b"]q\x00" + b"".join(
    b"h%c]q%ca0h%ch%ca0" % (number, number + 1, number, number + 1) for number in range(22)
)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (b"Nr\xff\xff\xff\x02.", "place 50331647 of its memo"),
        (b"Np9999999\n.", "place 9999999 of its memo"),
        (b"Np-1\n.", "place -1 of its memo"),
        (b"}])" + DOUBLED + b"aNs.", "of the same parts again and again"),
        (b"})" + DOUBLED + b"Ns.", "of the same parts again and again"),
        (b"}N" + b"2\x86" * 22 + b"Ns.", "of the same parts again and again"),  # DUP
        (b"cnumpy\ndtype\n)" + DOUBLED + b"\x85R.", "of the same parts again and again"),
        (FROM_THE_TOP + b"h\x00.", "it changes what it has used before"),
        (b"]q\x00h\x00a.", "it changes what it has used before"),  # holds itself
        (b"})" + b"\x85" * 200 + b"Ns.", "more than 100 containers"),
        (b"]" * 200 + b"a" * 199 + b".", "more than 100 containers"),
        (b"\x80\x04\x95\xff\xff\xff\x0f\x00\x00\x00\x00N.", "a part of 268435455 bytes"),
        (b"\x80\x04\x8e\xff\xff\xff\x0f\x00\x00\x00\x00N.", "no pickle that can be read"),
        (b"(NaN.", "it changes what it has used before"),  # into a mark
        (b"\x86.", "it takes what it has not made"),
        (b"h\x00.", "no pickle that can be read"),
    ],
)
def test_what_would_take_more_memory_or_time_than_its_bytes_is_refused(tmp_path, program, why):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(program)
    tracemalloc.start()
    try:
        assert why in refusal_of(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_honest_data_share_is_no_bomb(tmp_path, protocol):
    row = [1, "a"]
    data = {"rows": [row] * 1000, "again": [[row, row]] * 10, "deep": ((((((), ()),),),),)}
    assert load(written(tmp_path / "shared.pkl", data, protocol)) == data


def test_a_file_that_is_missing_or_cut_short_is_said_to_be(tmp_path):
    assert "does not exist" in refusal_of(tmp_path / "none.pkl")
    path = written(tmp_path / "cut.pkl", {1: np.arange(100)})
    path.write_bytes(path.read_bytes()[:-20])
    assert "no pickle that can be read" in refusal_of(path)
