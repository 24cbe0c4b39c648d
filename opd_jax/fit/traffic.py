"""Bytes that a compiled program reads from and writes to a device's memory.

By the rules of XLA's own `HloCostAnalysis`, which takes loops once: a fusion reads its inputs and
writes its outputs, of an array that is only sliced or updated within it, the slice. What lies on
the chip (VMEM) costs nothing. A kernel reads and writes its arrays once.
"""

from __future__ import annotations

from collections.abc import Callable

from opd_jax.fit.hlo import Computation, Instruction, Module, array_bytes, executed

Inputs = list[Instruction | None]

_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
        *("while", "call", "conditional", "async-start", "async-update", "async-done"),
        *("partition-id", "replica-id", "opt-barrier", "optimization-barrier", "add-dependency"),
    }
)
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}
"""Which write in place, and which operand it is that they write."""
_VIEWS = ("bitcast", "reshape")


def memory_traffic(module: Module, unknown_trips: int = 1) -> int:
    """Bytes read and written by one device.

    Args:
        unknown_trips: as `hlo.executed` takes it.
    """
    total = 0
    for computation, instruction, times in executed(module, unknown_trips):
        total += times * _bytes(module, computation, instruction)
    return total


def _bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    inputs = [computation.instructions.get(name) for name in instruction.operands]
    reads = sum(_here(x.result) for x in inputs if x is not None)
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode in _SLICES:
        return 2 * _here(instruction.result)
    if opcode in _SPECIAL:
        return _SPECIAL[opcode](module, inputs, instruction)
    # The result of a start repeats its inputs.
    return 2 * reads if opcode.endswith("-start") else reads + _here(instruction.result)


def _here(result: str) -> int:
    return array_bytes(result, everywhere=False)


def _fusion(module: Module, inputs: Inputs, instruction: Instruction) -> int:
    inner = _called(module, instruction)
    if inner is None:
        return 0
    sizes = [0 if x is None else _here(x.result) for x in inputs]
    reads = sum(_read(module, inner, number, size) for number, size in enumerate(sizes))
    return reads + _written(inner, instruction)


def _update(_: Module, inputs: Inputs, instruction: Instruction) -> int:
    """What a slice or some rows are replaced with is read and written."""
    update = inputs[_UPDATES[instruction.opcode]]
    return 0 if update is None else 2 * _here(update.result)


def _copy(_: Module, inputs: Inputs, instruction: Instruction) -> int:
    """`(copy, original, context)`, each of which may lie elsewhere."""
    del inputs
    return _here(instruction.result)


def _slice(_: Module, inputs: Inputs, instruction: Instruction) -> int:
    """`(whole, slice, context)`: a slice on its way to the chip."""
    del inputs
    parts = instruction.result.strip("()").split(", ")
    return min((array_bytes(part) for part in parts[:2]), default=0)


_SPECIAL: dict[str, Callable[[Module, Inputs, Instruction], int]] = {
    "fusion": _fusion,
    "dynamic-update-slice": _update,
    "scatter": _update,
    "copy-start": _copy,
    "slice-start": _slice,
}


def _called(module: Module, instruction: Instruction) -> Computation | None:
    return module.computations.get(instruction.called[0]) if instruction.called else None


def _read(module: Module, computation: Computation, number: int, whole: int) -> int:
    """Bytes that a fusion reads of its input of `whole` bytes."""
    parameter = computation.parameter(number)
    if parameter is None or not whole:
        return 0
    return min(_used(module, computation, parameter.name, whole), whole)


def _used(module: Module, computation: Computation, name: str, whole: int) -> int:
    total = 0
    for user in computation.users(name):
        if user.opcode in _VIEWS:
            total += _used(module, computation, user.name, whole)
        elif user.opcode in _SLICES and user.operands[0] == name:
            total += array_bytes(user.result)
        elif user.opcode in _UPDATES and user.operands[0] == name:
            pass  # in place: only what is written
        elif user.opcode == "fusion" and (inner := _called(module, user)):
            total += _read(module, inner, user.operands.index(name), whole)
        else:
            return whole
    return total


def _written(computation: Computation, instruction: Instruction) -> int:
    """Bytes of a fusion's result; where it updates an array in place, of the update."""
    whole = _here(instruction.result)
    root = computation.instructions.get(computation.root)
    if root is None or not whole:
        return whole
    names = root.operands if root.opcode == "tuple" else (root.name,)
    for name in names:
        made = computation.instructions.get(name)
        while made is not None and made.opcode in _VIEWS:
            made = computation.instructions.get(made.operands[0])
        if made is not None and made.opcode in _UPDATES:
            update = computation.instructions.get(made.operands[_UPDATES[made.opcode]])
            size = 0 if update is None else array_bytes(update.result)
            whole -= max(array_bytes(made.result) - size, 0)
    return max(whole, 0)
