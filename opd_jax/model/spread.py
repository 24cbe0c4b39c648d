"""Where a decode step's weights and activations lie on a mesh: nothing sends a weight.

A training step gathers the weights that `fsdp` and `context` cut, once for thousands of
tokens. A decode step has a token per row, far less than a weight. So heads, hidden units and the
vocabulary are cut over `fsdp`, `expert` and `context` too, rows over `data` alone, and the
activations are sent: every device reads its part of each weight once.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def cuts(
    mesh: Mesh, size: int, axes: tuple[str, ...] = ("tensor", "fsdp", "expert", "context")
) -> tuple[str, ...]:
    """The most of these mesh axes, from the first on, that divide so many heads or units."""
    prefixes = [axes[:n] for n in range(len(axes) + 1)]
    return [p for p in prefixes if size % math.prod(mesh.shape[axis] for axis in p) == 0][-1]


def hidden_cuts(mesh: Mesh, size: int) -> tuple[str, ...]:
    """The mesh axes that cut an expert's hidden units."""
    return cuts(mesh, size, ("tensor", "fsdp", "context"))


def spread_weight(mesh: Mesh | None, name: str, weight: jax.Array) -> jax.Array:
    """A weight, [outputs, inputs], with its heads, hidden units or vocabulary cut."""
    axis = weight.ndim - 2 if name == "wo" else 1 if name == "w_down" else 0
    if mesh is None:
        return weight
    return _constrain(mesh, weight, *[None] * axis, cuts(mesh, weight.shape[axis]))


def spread_experts(mesh: Mesh | None, name: str, weight: jax.Array) -> jax.Array:
    """Experts, [e, inputs, outputs], over `expert`, with their hidden units cut."""
    axis = 1 if name == "w_down" else 2
    if mesh is None:
        return weight
    hidden = hidden_cuts(mesh, weight.shape[axis])
    return _constrain(mesh, weight, "expert", *[None] * (axis - 1), hidden)


def spread_rows(mesh: Mesh | None, x: jax.Array, axis: int | None = None) -> jax.Array:
    """Activations or keys: rows over `data`, whole but for `axis`, cut as the weights are."""
    if mesh is None:
        return x
    if axis is None:
        return _constrain(mesh, x, "data")
    return _constrain(mesh, x, "data", *[None] * (axis - 1), cuts(mesh, x.shape[axis]))


def _constrain(mesh: Mesh, x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    if mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
