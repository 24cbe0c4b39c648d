"""An order of collectives, for several devices on CPUs.

XLA's runtime on CPUs begins a collective when those before it have begun, and a loop has begun with
its first iteration: a collective that stands behind a loop, and needs nothing of it, may run beside
those in the loop, in another order on each device. Gloo would mix their bytes, and a process whose
threads all wait would stand still. GPUs and TPUs run a program's collectives in one order.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.core.mesh import is_one_cpu, platform_of

Arrays = tuple[jax.Array, ...]
Pair = tuple[jax.Array, Arrays]


def _needed(mesh: Mesh | None) -> bool:
    return platform_of(mesh) == "cpu" and not is_one_cpu(mesh)


def after(x: jax.Array, others: Arrays, mesh: Mesh | None) -> jax.Array:
    """`x`, of any shape, when the other arrays are complete.

    What is added to it is 0, of which XLA does not know that it is; numbers of `x` become NaN if
    another one's first number is NaN, integers stay.

    Args:
        mesh: where it has one device, or is not of CPUs, nothing waits.
    """
    if not _needed(mesh):
        return x
    for other in others:
        first = other[(0,) * other.ndim]
        x += jnp.minimum(jnp.abs(first), 0).astype(x.dtype)
    return x


def complete_first(x: jax.Array, others: Arrays, mesh: Mesh | None) -> Pair:
    """All as they are; going backwards, the gradient of `x` waits for those of the others.

    Args:
        x: what leaves a loop.
        others: parameters that are used behind it. Their gradients are computed, even of some that
            are frozen.
        mesh: as for `after`.
    """
    if not _needed(mesh):
        return x, others

    @jax.custom_vjp
    def same(x: jax.Array, others: Arrays) -> Pair:
        return x, others

    def forward(x: jax.Array, others: Arrays) -> tuple[Pair, None]:
        return (x, others), None

    def backward(_: None, gradients: Pair) -> Pair:
        x, others = gradients
        return after(x, others, mesh), others

    same.defvjp(forward, backward)
    return cast(Pair, same(x, others))  # `custom_vjp` hides the type
