"""Facts about a compiled program, read from its memory analysis and its text."""

import math
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax

from kd_ranker.embedding.row_sharding import RARELY

_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_ON_CHIP = "S(1)"  # the memory space in a TPU's layouts
# In bytes: an array of which a copy per call, before its many steps, costs nothing.
_SMALL = 2 * 2**20
_COPIES = ("copy", "transpose", "convert")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Compiled(NamedTuple):
    """Facts about a compiled program, for one device; memory and exchanges in bytes.

    `temporary` are arrays other than arguments and results; in `total`, a result in the place of an
    argument counts once. `cycles` are 0 where the compiler has no estimate, as for GPUs. `copies`
    copy, transpose or convert one of the given arrays. `loops` read or write one row per iteration.
    """

    temporary: int
    total: int
    cycles: int
    copies: tuple[str, ...]
    loops: tuple[str, ...]
    exchanged: int


def read_compiled(compiled: jax.stages.Compiled, sizes: Collection[int]) -> Compiled:
    """Read a program and its text; copies count for arrays with one of these entry counts."""
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    arrays = list(_moved(text))
    arguments = memory.argument_size_in_bytes
    temporary = memory.temp_size_in_bytes
    return Compiled(
        temporary=temporary,
        total=arguments + temporary + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        cycles=cycles_of(text),
        copies=tuple(f"{op} {of}" for op, of, size, _ in arrays if op in _COPIES and size in sizes),
        loops=loops_of(text),
        exchanged=sum(nbytes for op, *_, nbytes in arrays if op in _COLLECTIVES),
    )


def _moved(text: str) -> Iterator[tuple[str, str, int, int]]:
    """Find the arrays that a program copies, and those that devices exchange or reduce.

    Copies of small arrays do not count before the loop over steps, nor into a TPU memory on the
    chip, where only such arrays fit. Yields the operation without "-start", the type of the array,
    its entries, and its bytes.

    >>> list(_moved("%r = (f32[3]{0}, s32[2,2]{1,0}) all-reduce-start(%a, %b)"))[1]
    ('all-reduce', 's32[2,2]', 4, 16)
    >>> step, entry = "%c = f32[3]{0} copy(%a)", "ENTRY %main () -> f32[3] {"
    >>> len(list(_moved(step))), len(list(_moved(f"{entry}\\n{step}")))
    (1, 0)
    """
    names = "|".join(_COPIES + _COLLECTIVES)
    pattern = re.compile(rf"^[^=\n]* = ([^\n]*?) ({names})(?:-start)?\(")
    is_before_steps = False
    for line in text.splitlines():
        if line.startswith("ENTRY"):  # the last part of a program; its loops are before it
            is_before_steps = True
        moved = pattern.match(line)
        if not moved:
            continue
        returned, operation = moved.groups()
        is_copy = operation in _COPIES
        if is_copy and _ON_CHIP in returned:
            continue
        for dtype, sizes in _SHAPE.findall(returned):
            size = math.prod(map(int, filter(None, sizes.split(","))))
            bits = re.sub(r"^\D+", "", dtype)
            nbytes = size * int(bits or 8) // 8
            if not (is_copy and is_before_steps and nbytes <= _SMALL):
                yield operation, f"{dtype}[{sizes}]", size, nbytes


def cycles_of(text: str) -> int:
    """Sum the cycles that a TPU's compiler expects of a program's operations.

    The body of a loop counts once per iteration where their number is known, else once. The loop
    over steps counts once. Operations without an estimate count 0, as do those done `RARELY`.
    """
    pattern = r"^(ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}"
    bodies = {
        entry.strip() or name: body
        for entry, name, body in re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    }

    def iterations(condition: str) -> int:
        """Return those of a loop that counts from 0 to a constant; 1 of any other."""
        body = bodies.get(condition, "")
        bounds = re.findall(r" s32\[\]\S* constant\((\d+)\)", body)
        return int(bounds[0]) if "direction=LT" in body and len(bounds) == 1 else 1

    def total(name: str) -> int:
        cycles = 0
        for line in bodies.get(name, "").splitlines():
            if inner := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                cycles += 0 if RARELY in line else iterations(inner[1]) * total(inner[2])
            elif number := re.search(r'"estimated_cycles":"?(\d+)', line):
                cycles += int(number[1])
        return cycles

    return total("ENTRY")


def loops_of(text: str) -> tuple[str, ...]:
    """Find the loops that the compiler added to those of the source, by their operations.

    A compiler without a better way to read or write scattered rows does it in a loop. It keeps the
    name of the operation.

    >>> loops_of('%w = (s32[]) while(%t), body=%b, metadata={op_name="jit(f)/gather"}')
    ('jit(f)/gather',)
    """
    named = re.findall(r'^.* while\((?:.*op_name="([^"]*)")?.*$', text, re.MULTILINE)
    return tuple(name for name in named if name.rpartition("/")[2] != "while")
