"""Reads pickles of plain data without running anything that they say; RecFlow has such files.

A pickle is a program: it names functions of any installed module, and the usual reader looks them
up and calls them. Here a name is looked up in `_KNOWN` and nowhere else. There it has a stand-in
that builds arrays of numbers, checks all that it is given, and cannot be changed by the pickle. So
there are only

* types that have instructions of their own: None, bool, int, float, str, bytes, list, tuple, dict,
  and set from protocol 4 on;
* NumPy's arrays and scalars of bool, integers and floats, by protocol 3 or 4;
* `collections.defaultdict`, which becomes a plain dict.

Before anything is built, a pass over the instructions bounds what they would build: places in the
memo, which are memory whether used or not; the depth, as a hash in C goes down without counting;
and what is taken from the memo again, which can double every few bytes. So time and memory follow
the size of the file.
"""

import math
import mmap
import pickle
import pickletools
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from kd_ranker.errors import UserError

Name = tuple[str, str]  # module, name

# Kind and bytes. Not `O`: such an array holds objects of any kind.
_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_PLAIN_TYPES = ("bool", "int", "float", "str", "list", "tuple", "dict")
_BYTE_ORDERS = ("<", ">", "|", "=")

# The most containers around a value.
_DEEPEST = 100
# Values that may be taken from the memo again: so many, and so many more an instruction.
_SHARED, _SHARED_EACH = 1_000_000, 100
# Instructions that put what lies above into what lies below.
_GROWING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_EMPTY = {"LIST", "DICT", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_PUTTING = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETTING = {"GET", "BINGET", "LONG_BINGET"}


class _Refused(UserError):
    """A refusal that does not name the file yet."""


def load(path: Path, mentioned: Collection[Name] = ()) -> Any:
    """The contents of a pickle of plain data.

    Args:
      path: the file.
      mentioned: names that may occur in it, and are not looked up: functions that make the entries
        of a `defaultdict`.

    Returns:
      Plain containers of numbers and strings; arrays are instances of a subclass of `np.ndarray`.

    Raises:
      UserError: there is no such file, it is damaged, or it asks for anything else, which the
        message names.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with path.open("rb") as file:
        try:
            # Of a file, a read of many bytes would take the memory for all that it asks for.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                _check_bounds(whole)
            return _Unpickler(file, mentioned).load()
        except _Refused as refused:
            raise UserError(f"{path} was not read: {refused}") from None
        # A pickle can bring about any exception.
        except Exception as error:
            text = " ".join(str(error).split())
            raise UserError(f"{path} is no pickle that can be read: {text}") from error


class _Node:
    """A value that would be built: how many it is, how deep they lie, and if two may hold it."""

    __slots__ = ("depth", "shared", "size")

    def __init__(self, parts: Collection["_Node"] = (), shared: bool = False):
        self.size, self.depth, self.shared = 1, 0, shared
        if parts:
            self.take_in(parts)

    def take_in(self, parts: Collection["_Node"]) -> None:
        """Makes it hold others; what is held elsewhere already would grow there unseen."""
        if self.shared:
            raise _Refused("it changes what it has used before")
        for part in parts:
            self.size += part.size
            self.depth = max(self.depth, part.depth + 1)
        if self.depth > _DEEPEST:
            raise _Refused(f"it nests more than {_DEEPEST} containers")


_MARK, _SINGLE = _Node(shared=True), _Node(shared=True)


def _check_bounds(whole: mmap.mmap) -> None:
    """Refuses a pickle that would take far more memory or time than its bytes.

    It goes through the instructions as the reader does, with a node in place of each value.
    """
    stack: list[_Node] = []
    memo: dict[int, _Node] = {}
    shared = 0
    program: Iterable[tuple[Any, Any, Any]] = pickletools.genops(whole)  # type: ignore[arg-type]
    for number, (opcode, argument, _) in enumerate(program):
        name, before, after = opcode.name, opcode.stack_before, opcode.stack_after
        if name in _PUTTING:
            place = len(memo) if argument is None else int(argument)
            # Python 2 counted from 1.
            if not 0 <= place <= len(memo) + 1:
                raise _Refused(f"it has place {place} of its memo in use, after {len(memo)} others")
            memo[place] = stack[-1]
        elif name in _GETTING or name == "DUP":
            again = memo[int(argument)] if name in _GETTING else stack[-1]
            again.shared = True
            shared += again.size
            if shared > _SHARED + _SHARED_EACH * number:
                raise _Refused(
                    "it is small and builds very much, of the same parts again and again"
                )
            stack.append(again)
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "FRAME" and argument > len(whole):
            raise _Refused(f"it has a part of {argument} bytes, and {len(whole)} in all")
        elif before or after:
            taken = _taken(stack, before, name)
            if name in _GROWING:
                taken[0].take_in(taken[1:])
                stack.append(taken[0])
            elif after:
                stack.append(_Node(taken) if taken or name in _EMPTY else _SINGLE)


def _taken(stack: list[_Node], before: Sequence[Any], name: str) -> list[_Node]:
    """Takes from the stack what an instruction does: some values, all above a mark, or both."""
    above: list[_Node] = []
    number = len(before)
    if pickletools.markobject in before or (name == "POP" and stack[-1] is _MARK):
        while (node := stack.pop()) is not _MARK:
            above.append(node)
        number = before.index(pickletools.markobject) if name != "POP" else 0
    start = len(stack) - number
    if start < 0:
        raise _Refused("it takes what it has not made")
    taken = [*stack[start:], *above]
    del stack[start:]
    return taken


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, mentioned: Collection[Name]):
        super().__init__(file)
        self._mentioned = mentioned

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is None and (module, name) not in self._mentioned:
            raise _Refused(f"it asks for {module}.{name}, and may only hold plain data")
        return known or _MENTIONED


class _Fixed:
    """A stand-in that a pickle cannot change, nor call unless it is given a function."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any] | None = None):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        if self._function is None:
            raise _Refused("it calls what is no function")
        return self._function(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise _Refused("it changes what it did not make")


class _Dtype:
    """A dtype that is not NumPy's own, whose state a pickle could set to anything."""

    __slots__ = ("dtype",)

    def __init__(self, text: object, *_: object):
        if text not in _DTYPES:
            raise _Refused(f"it holds an array of dtype {text!r}, and may only hold numbers")
        self.dtype: np.dtype = np.dtype(str(text))

    def __setstate__(self, state: object) -> None:
        """Takes the byte order, and nothing else."""
        plain = isinstance(state, tuple) and len(state) == 8
        if not (plain and state[1] in _BYTE_ORDERS and state[2:] == (*[None] * 3, -1, -1, 0)):  # type: ignore[index]
            raise _Refused("it holds an array of a dtype that is no plain number")
        self.dtype = self.dtype.newbyteorder(state[1])  # type: ignore[index]


class _Array(np.ndarray):
    """An array whose state is checked before NumPy takes it."""

    def __setstate__(self, state: Any) -> None:
        match state:
            case (1, tuple(shape), _Dtype(dtype=dtype), bool(fortran), bytes(raw)) if all(
                type(length) is int and length >= 0 for length in shape
            ):
                if len(raw) == math.prod(shape) * dtype.itemsize:
                    super().__setstate__((1, shape, dtype, fortran, raw))  # type: ignore[arg-type]
                    return
        raise _Refused("it holds an array whose contents do not fit its shape")


def _reconstruct(subtype: object, shape: object, code: object) -> _Array:
    """An empty array, whose contents come with its state."""
    if subtype is not _NDARRAY or shape != (0,) or code != b"b":
        raise _Refused("it holds an array of a class of its own")
    return np.ndarray.__new__(_Array, (0,), np.int8)


def _scalar(dtype: object, raw: object) -> Any:
    if not (isinstance(dtype, _Dtype) and isinstance(raw, bytes)):
        raise _Refused("it holds a scalar that is no number")
    return np.frombuffer(raw, dtype.dtype)[0].item()


_NDARRAY = _Fixed()
_MENTIONED = _Fixed()
_KNOWN: dict[Name, _Fixed] = {
    # NumPy 2 has another name for the same module.
    **{
        (module, name): _Fixed(function)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name, function in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    },
    # Functions of a defaultdict, which is never asked for an entry that it lacks.
    **{("builtins", name): _MENTIONED for name in _PLAIN_TYPES},
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Fixed(_Dtype),
    ("collections", "defaultdict"): _Fixed(lambda *_: {}),
}
