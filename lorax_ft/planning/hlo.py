"""The text of a compiled program, read: computations, instructions, and how often each runs.

Only what plans ask of it is kept: types with their bytes, operands and called computations. What a
loop's body holds runs as often as its compiler says, or as the bound in its condition.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

# Bits of an element; a type that is not here, such as a token's, holds nothing.
BITS: Mapping[str, int] = {
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s4", "u4", "s2", "u2"), 4),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 16),
    **dict.fromkeys(("f32", "s32", "u32"), 32),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 64),
    "c128": 128,
}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type; `space` 0 is a device's main memory."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Without padding; types of eight bits with other names are floats of eight bits."""
        bits = BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
        return math.ceil(self.size * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its type, a tuple's one after another
    operands: tuple[str, ...]
    attributes: str  # what stands behind the operands, as it stands there
    is_root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it names, a loop's condition and body among them."""
        branches = _BRANCHES.search(self.attributes)
        found = _CALLED.findall(self.attributes)
        if branches:
            found += [name.strip().removeprefix("%") for name in branches.group(1).split(",")]
        return tuple(found)


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program's computations by name, of instructions by name."""

    computations: Mapping[str, Computation]
    entry: str

    def executed(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """(instruction, its computation, how often) of all that runs and is not inside a fusion.

        All branches of a conditional count.
        """
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
        computation = self.computations.get(name, {})
        for instruction in computation.values():
            yield instruction, computation, times
            if instruction.opcode == "while":
                condition, body = self._loop(instruction)
                yield from self._executed(body, times * self._trips(instruction, condition))
            elif instruction.opcode in ("call", "conditional", "async-start"):
                for callee in instruction.called:
                    yield from self._executed(callee, times)

    def _loop(self, loop: Instruction) -> tuple[str, str]:
        names = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", loop.attributes))
        return names["condition"], names["body"]

    def _trips(self, loop: Instruction, condition: str) -> int:
        if known := _TRIPS.search(loop.attributes):
            return int(known.group(1))
        bounds = [
            int(found.group(1))
            for instruction in self.computations.get(condition, {}).values()
            if instruction.opcode == "constant"
            and (found := re.fullmatch(r"\((\d+)\).*", instruction.attributes))
        ]
        return max(bounds, default=1)


def parse(text: str) -> Program:
    """The program that a compiled function's `as_text()` shows."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) and " = " not in line.partition("(")[0]:
            current = computations[head.group(2)] = {}
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found.group(2), found.group(3), bool(found.group(1)))
            current[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    """`rest` is `type opcode(operands), attributes`."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    type_text, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    opcode, stop = rest[:start], _closing(rest, start)
    inside, attributes = rest[start + 1 : stop], rest[stop + 1 :]
    if opcode in ("constant", "parameter"):  # its value, its number
        inside, attributes = "", rest[start:]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if inside and not operands:  # names without a sign in front
        operands = tuple(part.split()[-1] for part in inside.split(", "))
    return Instruction(name, opcode, arrays_of(type_text), operands, attributes, is_root)


def arrays_of(type_text: str) -> tuple[Array, ...]:
    """The arrays of a type as the text has it.

    >>> arrays_of("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0:T(256)S(1)})")
    (Array(dtype='f32', shape=(2, 3), space=0), Array(dtype='bf16', shape=(4,), space=1))
    """
    found = []
    for dtype, shape, layout in _ARRAY.findall(type_text):
        sizes = tuple(int(size) for size in shape.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"a parenthesis that does not close: {text[start : start + 80]!r}")
