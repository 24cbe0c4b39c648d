"""XLA's text of a compiled program: its instructions, and how often each runs.

    %body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
      %w = f32[8]{0} get-tuple-element(%p), index=1
      ROOT %t = (s32[], f32[8]) tuple(%i, %w)
    }
    ENTRY %main (x: f32[8]) -> f32[8] {
      %loop = (s32[], f32[8]) while(%init), condition=%c, body=%body,
        backend_config={"known_trip_count":{"n":"36"}}

XLA for GPUs writes down the trip count of a loop where it knows it. In programs for TPUs it follows
from the condition, which compares a counter from 0 on with a constant. How many blocks of a
mixture's experts there are is known to nobody before the tokens have chosen: what is expected
stands in the name of their loop.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from opd_jax.model.experts import BLOCKS_SCOPE

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+)\s*\(.*->.*\{\s*$")
_NAMED = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation|branch_computations"
    r"|called_computations)=(?:\{(?P<many>[^}]*)\}|%?(?P<one>[\w.\-]+))"
)
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_EXPECTED = re.compile(rf'{BLOCKS_SCOPE}(\d+)\)*/while"')
_ARRAY = re.compile(
    r"(?P<dtype>pred|token|bf16|f8\w*|f4\w*|[suf]\d+|c\d+)\[(?P<dims>[\d,]*)\]"
    r"(?P<layout>\{[^{}]*\})?"
)
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")
"""In a layout: the array lies on the chip or with the host, not in the device's memory."""


@dataclass(frozen=True)
class Instruction:
    """One line: `name = result opcode(operands), attributes`.

    Of a parameter the operand is its number, of a constant its value.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs (a condition of a loop is none of them)."""
        found = _CALLED.finditer(self.attributes)
        texts = [match["many"] or match["one"] for match in found]
        return tuple(name.strip(" %") for text in texts for name in text.split(",") if name)


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the root is what it returns."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def parameter(self, number: int) -> Instruction | None:
        """The instruction of its `number`-th parameter."""
        for instruction in self.instructions.values():
            if instruction.opcode == "parameter" and instruction.operands == (str(number),):
                return instruction
        return None

    def users(self, name: str) -> list[Instruction]:
        """Who reads what `name` returns."""
        return [x for x in self.instructions.values() if name in x.operands]


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs, where the text tells, or is expected to by its name."""
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        found = _CONDITION.search(loop.attributes)
        test = self.computations.get(found[1]) if found else None
        if test is None:
            return None
        root = test.instructions[test.root]
        if root.opcode == "compare" and "direction=LT" in root.attributes:
            end = test.instructions[root.operands[1]]
            if end.opcode == "constant":
                return int(end.operands[0])
        found = _EXPECTED.search(loop.attributes)
        return int(found[1]) if found else None


def parse_module(text: str) -> Module:
    """Read `compiled.as_text()`.

    Raises:
        ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name, root, instructions = head["name"], "", {}
            entry = name if head["entry"] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions, root)
        elif found := _NAMED.match(line):
            instruction = _instruction(found["name"], line[found.end() :])
            instructions[instruction.name] = instruction
            root = instruction.name if found["root"] else root
    if entry not in computations:
        raise ValueError("the text holds no entry computation")
    return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    result, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    opcode, inside = rest[:opening], rest[opening + 1 : closing]
    plain = opcode in ("parameter", "constant")
    operands = (inside,) if plain else tuple(_OPERAND.findall(inside))
    return Instruction(name, opcode, result, operands, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens at `opening` is closed."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    return len(text) - 1


def executed(
    module: Module, unknown_trips: int = 1, *, into_fusions: bool = False
) -> Iterator[tuple[Computation, Instruction, int]]:
    """Every instruction that runs, with its computation and how often it runs.

    Of a choice all branches count.

    Args:
        unknown_trips: of an outermost loop whose trip count XLA does not know; unknown loops in
            it count once.
        into_fusions: also those inside fusions; else a fusion is one instruction.
    """
    yield from _executed(module, module.entry, (1, unknown_trips), into_fusions)


def _executed(
    module: Module, name: str, counts: tuple[int, int], into_fusions: bool
) -> Iterator[tuple[Computation, Instruction, int]]:
    computation, (times, unknown) = module.computations[name], counts
    for instruction in computation.instructions.values():
        yield computation, instruction, times
        inner = counts
        hidden = instruction.opcode == "fusion" and not into_fusions
        if hidden or instruction.opcode not in _RUN_WHAT_THEY_CALL:
            continue
        if instruction.opcode == "while":
            known = module.trips(instruction)
            inner = (times * unknown, 1) if known is None else (times * known, unknown)
        for called in instruction.called:
            if called in module.computations:
                yield from _executed(module, called, inner, into_fusions)


_RUN_WHAT_THEY_CALL = ("fusion", "while", "call", "conditional", "async-start")
"""Others call what they reduce or sort with, entry by entry."""


def array_bytes(result: str, *, everywhere: bool = True) -> int:
    """Bytes of all arrays in the text of a type.

    Args:
        everywhere: also of those that do not lie in the device's memory.
    """
    total = 0
    for array in _ARRAY.finditer(result):
        if everywhere or not _ELSEWHERE.search(array["layout"] or ""):
            entries = math.prod(int(x) for x in array["dims"].split(",") if x)
            total += math.ceil(entries * _bits(array["dtype"]) / 8)
    return total


def _bits(dtype: str) -> int:
    if dtype in ("pred", "token"):
        return 8 if dtype == "pred" else 0
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 8
