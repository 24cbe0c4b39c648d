"""Whether devices on CPUs can meet in different collectives of one program.

XLA's runtime on CPUs begins a collective when those before it in the program have begun. A loop has
begun when its first iteration has: what comes after it, and needs nothing that it changes, may run
while its collectives do, before them on one device and after them on another. Gloo tells those of
the same devices apart by their kind alone, so each would take the other's bytes; and in one process
each may hold a thread that waits, until none is left to run what they wait for.
"""

import re

from opd_jax.fit.collectives import KINDS
from opd_jax.fit.hlo import parse_module

CONDITION = re.compile(r"condition=%?([\w.\-]+)")
INDEX = re.compile(r"index=(\d+)")
CALLERS = ("while", "call", "conditional")


def unordered(text):
    """Pairs of a compiled program: a loop, and a later instruction that is not held back by it.

    Both are collectives or have some inside.

    Args:
        text: of the scheduled program.
    """
    module = parse_module(text)

    def meets(instruction):
        if instruction.opcode.startswith(KINDS):
            return True
        if instruction.opcode not in CALLERS:
            return False
        names = [*instruction.called, *CONDITION.findall(instruction.attributes)]
        inside = [module.computations[name].instructions.values() for name in names]
        return any(meets(x) for instructions in inside for x in instructions)

    def operands(computation, instruction):
        """What it waits for: of what a loop hands through unchanged, where the loop has it from."""
        if instruction.opcode != "get-tuple-element":
            return instruction.operands
        source = computation.instructions[instruction.operands[0]]
        if source.opcode != "while":
            return instruction.operands
        at = int(INDEX.search(instruction.attributes)[1])
        body = module.computations[source.called[0]]
        begin = computation.instructions[source.operands[0]]
        if begin.opcode == "tuple" and hands_through(body, at):
            return (begin.operands[at],)
        return instruction.operands

    found = []
    for computation in module.computations.values():
        needs, loops = {}, []
        for name, instruction in computation.instructions.items():
            known = [x for x in operands(computation, instruction) if x in needs]
            needs[name] = set(known).union(*(needs[x] for x in known))
            if not meets(instruction):
                continue
            found += [(x, name) for x in loops if x not in needs[name]]
            if instruction.opcode in CALLERS:
                loops.append(name)
    return found


def hands_through(body, at):
    """Whether a loop leaves this element of what it carries as it is."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return False
    item = body.instructions[root.operands[at]]
    if item.opcode != "get-tuple-element" or int(INDEX.search(item.attributes)[1]) != at:
        return False
    return body.instructions[item.operands[0]].opcode == "parameter"
