"""Whether processes on CPUs can meet in different collectives of one program.

XLA's runtime on CPUs begins a collective when those before it in the program have begun. A loop has
begun when its first iteration has: what comes after it, and needs nothing of it, may run while its
collectives do, before them on one process and after them on another. Gloo tells collectives apart
by their kind alone, so each would take the other's bytes.
"""

import re

from opd_jax.fit.hlo import parse_module

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
CALLERS = ("while", "call", "conditional")


def unordered(text):
    """Pairs of a compiled program: a loop, and a later instruction that is not held back by it.

    Args:
        text: of the scheduled program.
    """
    module = parse_module(text)

    def kinds_of(instruction):
        for kind in KINDS:
            if instruction.opcode.startswith(kind):
                return {kind}
        if instruction.opcode not in CALLERS:
            return set()
        names = [*instruction.called, *CONDITION.findall(instruction.attributes)]
        inside = [module.computations[name].instructions.values() for name in names]
        return set().union(*(kinds_of(x) for instructions in inside for x in instructions))

    found = []
    for computation in module.computations.values():
        needs, loops = {}, {}
        for name, instruction in computation.instructions.items():
            known = [x for x in instruction.operands if x in needs]
            needs[name] = set(known).union(*(needs[x] for x in known))
            kinds = kinds_of(instruction)
            found += [(x, name) for x in loops if kinds & loops[x] and x not in needs[name]]
            if instruction.opcode in CALLERS:
                loops[name] = kinds
    return found
