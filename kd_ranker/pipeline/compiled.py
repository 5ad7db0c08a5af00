"""The findings in a compiled program: its memory, its traffic, and the text of its operations."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from kd_ranker.embedding.deal import RARELY

_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_ON_CHIP = "S(1)"
_COPIES = ("copy", "copy-start", "transpose", "convert")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Array(NamedTuple):
    """The type and the shape of an array in a program's text."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its bytes, of entries side by side."""
        bits = re.sub(r"^\D+", "", self.dtype)
        return self.size * (int(bits) // 8 if bits else 1)


class Collective(NamedTuple):
    """An operation in which devices exchange an array, or reduce it."""

    operation: str
    array: Array


class Compiled(NamedTuple):
    """The compiler's word on a program, of one device.

    Attributes:
      arguments: bytes of what the program is handed, as it is laid out.
      temporary: bytes that it needs beside these and its results.
      total: bytes in all; a result in the place of an argument counts once.
      cycles: those of a step by kind of operation, as far as the compiler has a number for them;
        empty where it has none.
      copies: operations that copy, transpose or convert an array that was asked for.
      loops: loops that the compiler made of an operation, which has one entry a turn.
      collectives: the arrays that devices exchange.
    """

    arguments: int
    temporary: int
    total: int
    cycles: Mapping[str, int]
    copies: tuple[str, ...]
    loops: tuple[str, ...]
    collectives: tuple[Collective, ...]

    @property
    def exchanged(self) -> int:
        """Bytes of the arrays that devices exchange."""
        return sum(collective.array.bytes for collective in self.collectives)


def read(
    compiled: jax.stages.Compiled, tables: Collection[int], others: Collection[int] = ()
) -> Compiled:
    """Reads a program.

    Args:
      compiled: the program.
      tables: the numbers of entries of arrays that are not to be copied.
      others: of some that may be copied to where a small one is at hand: the memory on the chip.
    """
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Compiled(
        arguments=arguments,
        temporary=temporary,
        total=arguments + temporary + results,
        cycles=cycles_by_kind(text),
        copies=(*copies(text, tables), *copies(text, others, but_on_chip=True)),
        loops=tuple(loops(text)),
        collectives=tuple(collectives(text)),
    )


def cycles_by_kind(text: str) -> dict[str, int]:
    """The cycles that a TPU's compiler expects of a program's operations, by `_KINDS`.

    The body of a loop counts as often as it is run, where the compiler knows that, and else once:
    so it is with the loop over steps. Operations without a number count for nothing, and so does
    what is done `RARELY`.
    """
    bodies = dict(_computations(text))
    total: dict[str, int] = {}

    def add(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if inner := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                turns = 0 if RARELY in line else _turns(bodies.get(inner[1], ()))
                add(inner[2], times * turns)
            elif number := re.search(r'"estimated_cycles":"?(\d+)', line):
                kind = _kind(line)
                total[kind] = total.get(kind, 0) + times * int(number[1])

    add("ENTRY", 1)
    return total


_KINDS = {
    "rows": ("gather", "scatter", "scatter-add"),
    "products": ("dot_general",),
    "exchange": ("all_gather", "psum", "psum_invariant"),
}


def _kind(line: str) -> str:
    named = re.search(r'op_name="([^"]*)"', line)
    operation = named[1].rpartition("/")[2] if named else ""
    return next((kind for kind, names in _KINDS.items() if operation in names), "all else")


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """The lines of each computation, by its name; that of the program itself is ENTRY."""
    pattern = r"^(ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}"
    for entry, name, body in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
        yield (entry.strip() or name), body.splitlines()


def _turns(condition: Collection[str]) -> int:
    """The turns of a loop that counts from 0 to a constant; 1 of any other."""
    compared = any("direction=LT" in line for line in condition)
    bounds = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return int(bounds[0]) if compared and len(bounds) == 1 else 1


def copies(text: str, sizes: Collection[int], but_on_chip: bool = False) -> Iterator[str]:
    """The operations of a program that copy arrays with one of these numbers of entries.

    Not counted is what a TPU moves as it is between its memory and that on the chip, S(1); with
    `but_on_chip`, nor what it lays out anew there.

    >>> list(copies("  %c.1 = f32[8,3]{0,1} copy(%p), metadata={}", {24}))
    ['copy f32[8,3]']
    >>> list(copies("  %c.1 = f32[8,3]{0,1} copy(%p), metadata={}", {8}))
    []
    """
    for operation, returned, arrays in _operations(text, _COPIES):
        for array in arrays[:1]:
            free = _ON_CHIP in returned and (but_on_chip or operation == "copy-start")
            if array.size in sizes and not free:
                yield f"{operation} {array.dtype}[{','.join(map(str, array.shape))}]"


def loops(text: str) -> Iterator[str]:
    """The names of those loops of a program that no loop of the source asked for.

    A compiler that has no other way to read or write rows here and there does it in a loop, a row a
    turn, which keeps the name of what it was made of.

    >>> list(loops('%w = (s32[]) while(%t), body=%b, metadata={op_name="jit(f)/gather"}'))
    ['jit(f)/gather']
    >>> list(loops('%w = (s32[]) while(%t), body=%b, metadata={op_name="jit(f)/while"}'))
    []
    """
    for line in re.findall(r"^.* while\(.*$", text, re.MULTILINE):
        named = re.search(r'op_name="([^"]*)"', line)
        name = named[1] if named else "a loop without a name"
        if name.rpartition("/")[2] != "while":
            yield name


def collectives(text: str) -> Iterator[Collective]:
    """The arrays that the devices of a program exchange or reduce.

    >>> list(collectives("%r = (f32[3]{0}, s32[2,2]{1,0}) all-reduce(%a, %b)"))[1]
    Collective(operation='all-reduce', array=Array(dtype='s32', shape=(2, 2)))
    """
    started = tuple(f"{name}-start" for name in _COLLECTIVES)
    for operation, _, arrays in _operations(text, _COLLECTIVES + started):
        for array in arrays:
            yield Collective(operation.removesuffix("-start"), array)


def _operations(text: str, names: Collection[str]) -> Iterator[tuple[str, str, list[Array]]]:
    """Each operation of one of these names, with what it returns, as text and as arrays."""
    pattern = rf"^[^=\n]* = ([^\n]*?) ({'|'.join(sorted(names, key=len, reverse=True))})\("
    for returned, operation in re.findall(pattern, text, re.MULTILINE):
        arrays = [
            Array(dtype, tuple(int(size) for size in shape.split(",") if size))
            for dtype, shape in _SHAPE.findall(returned)
        ]
        yield operation, returned, arrays
