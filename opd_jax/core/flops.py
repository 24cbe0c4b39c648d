"""FLOPs of matrix products in a traced program, loops by their trip counts.

XLA's own count takes the body of a loop once. Here integers and booleans that follow from known
inputs are computed along the way, so that a loop whose end depends on them is run through as often
as the program would.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

MOST_KNOWN = 2**16
"""Entries of the largest array that is followed: masks of whole rows are, those of tiles not."""
Known = list[np.ndarray | None]
"""Values in order; `None`: not followed."""


def count_flops(program: ClosedJaxpr, given: Sequence[np.ndarray | None] | None = None) -> int:
    """2 for each multiplication of all `dot_general` and `ragged_dot` in a program.

    Of the branches of a choice that is not known the largest counts; of a program cut over a mesh
    within `shard_map`, what the first device does.

    Args:
        program: as `jax.make_jaxpr` gives it.
        given: of its inputs, the integers and booleans on which trip counts depend. `None`: none.

    Raises:
        ValueError: the end of a loop with products in it does not follow from `given`.
    """
    known = list(given) if given is not None else [None] * len(program.jaxpr.invars)
    return _count(program, [x if x is None else _kept(x) for x in known])[0]


def _kept(x: Any) -> np.ndarray | None:
    return np.asarray(x) if _followed(x) else None


def _followed(x: Any) -> bool:
    """Whether an array, or the type of one, is such as trip counts are made of."""
    small = hasattr(x, "size") and x.size <= MOST_KNOWN
    return small and bool(jnp.issubdtype(x.dtype, np.integer) or x.dtype == np.bool_)


def _count(program: ClosedJaxpr, known: Known) -> tuple[int, Known]:
    """FLOPs, and what is known of the outputs."""
    values: dict[Any, np.ndarray | None] = {}
    values.update(zip(program.jaxpr.constvars, map(_kept, program.consts), strict=True))
    values.update(zip(program.jaxpr.invars, known, strict=True))

    def read(atom: Any) -> np.ndarray | None:
        if isinstance(atom, Literal):
            return _kept(np.asarray(atom.val, atom.aval.dtype))  # pyright: ignore
        return values.get(atom)

    total = 0
    for eqn in program.jaxpr.eqns:
        flops, found = _equation(eqn, [read(atom) for atom in eqn.invars])
        total += flops
        values.update(zip(eqn.outvars, found, strict=True))
    return total, [read(atom) for atom in program.jaxpr.outvars]


def _equation(eqn: Any, known: Known) -> tuple[int, Known]:
    name = eqn.primitive.name
    nothing: Known = [None] * len(eqn.outvars)
    if name in PRODUCTS:
        return PRODUCTS[name](eqn), nothing
    if name in CONTROL:
        return CONTROL[name](eqn.params, known)
    inner = [_closed(x) for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program)]
    inner = [program for program in inner if program is not None]
    if len(inner) == 1 and len(inner[0].jaxpr.invars) == len(known):
        return _count(inner[0], known)
    if inner:
        return sum(_count(x, [None] * len(x.jaxpr.invars))[0] for x in inner), nothing
    if any(x is None for x in known) or not all(_followed(var.aval) for var in eqn.outvars):
        return 0, nothing
    found = eqn.primitive.bind(*known, **eqn.params)
    return 0, list(map(_kept, found if eqn.primitive.multiple_results else [found]))


def _is_program(x: Any) -> bool:
    return isinstance(x, (Jaxpr, ClosedJaxpr))


def _closed(x: Any) -> ClosedJaxpr | None:
    if isinstance(x, Jaxpr):
        return ClosedJaxpr(x, [])
    return x if isinstance(x, ClosedJaxpr) else None


def _dot_general(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _ragged_dot(eqn: Any) -> int:
    """Every row meets one group's matrix: [m, k] and [g, k, n], or [m, k] and [m, n]."""
    left, right = (eqn.invars[i].aval.shape for i in (0, 1))
    return 2 * math.prod(left) * right[-1]


PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
}


def _scan(params: dict[str, Any], known: Known) -> tuple[int, Known]:
    """Trips that begin alike, as layers do, are counted once and added as often."""
    body, consts, carries = params["jaxpr"], params["num_consts"], params["num_carry"]
    fixed, carry, xs = known[:consts], known[consts : consts + carries], known[consts + carries :]
    count = functools.lru_cache(maxsize=1)(lambda given: _count(body, _thawed(given)))
    order = range(params["length"])
    total, rows = 0, [[] for _ in body.jaxpr.outvars[carries:]]
    for i in reversed(order) if params["reverse"] else order:
        piece = [None if x is None else x[i] for x in xs]
        flops, found = count(_frozen([*fixed, *carry, *piece]))
        total += flops
        carry = found[:carries]
        for row, value in zip(rows, found[carries:], strict=True):
            row.append(value)
    return total, [*carry, *(_stacked(row, params["reverse"]) for row in rows)]


def _stacked(row: Known, reverse: bool) -> np.ndarray | None:
    values = [x for x in row if x is not None]
    if len(values) < len(row) or not row:
        return None
    return _kept(np.stack(values[::-1] if reverse else values))


def _frozen(known: Known) -> tuple[Any, ...]:
    return tuple(None if x is None else (x.tobytes(), x.dtype.str, x.shape) for x in known)


def _thawed(frozen: tuple[Any, ...]) -> Known:
    return [
        None if x is None else np.frombuffer(x[0], np.dtype(x[1])).reshape(x[2]) for x in frozen
    ]


def _while(params: dict[str, Any], known: Known) -> tuple[int, Known]:
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    cut = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    for_test, fixed, carry = known[: cut[0]], known[cut[0] : cut[1]], known[cut[1] :]
    total = 0
    while True:
        (goes_on,) = _count(test, [*for_test, *carry])[1]
        if goes_on is None:
            flops, _ = _count(body, [None] * (len(fixed) + len(carry)))
            if flops:
                raise ValueError("a loop's trip count does not follow from the given inputs")
            return total, [None] * len(carry)
        if not goes_on:
            return total, carry
        flops, carry = _count(body, [*fixed, *carry])
        total += flops


def _cond(params: dict[str, Any], known: Known) -> tuple[int, Known]:
    branches, (index, *given) = params["branches"], known
    if index is not None:
        return _count(branches[min(max(int(index), 0), len(branches) - 1)], given)
    counted = [_count(branch, given)[0] for branch in branches]
    return max(counted), [None] * len(branches[0].jaxpr.outvars)


def _first_device(_params: dict[str, Any], _known: Known) -> tuple[int, Known]:
    return 0, [np.zeros((), np.int32)]


def _from_others(_params: dict[str, Any], known: Known) -> tuple[int, Known]:
    """What devices send each other is not followed."""
    return 0, [None] * len(known)


COLLECTIVES = ("all_gather", "all_to_all", "ppermute", "psum", "psum_invariant", "reduce_scatter")
CONTROL: dict[str, Callable[[dict[str, Any], Known], tuple[int, Known]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "axis_index": _first_device,
    **dict.fromkeys(COLLECTIVES, _from_others),
}
