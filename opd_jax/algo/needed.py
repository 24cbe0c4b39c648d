"""Positions whose log-probs nobody reads: prompts and padding, left out of the head's products.

The others are moved to the front, and the products run over the first `n` positions, the smallest
of a few fixed numbers that holds them: shapes are compiled. It is done on one CPU, where the
products are what takes time; elsewhere the choice would wait for the device, or be made on each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.core.mesh import is_one_cpu

T = TypeVar("T")
FEWEST = 256  # positions: with fewer, a choice is not worth its compilation
EIGHTHS = (4, 5, 6, 7, 8)
MULTIPLE = 16


class Front(NamedTuple):
    """Which positions come first."""

    order_t: jax.Array  # int32, of b * t positions: those that are needed, then the others
    count: jax.Array  # int32 scalar: how many are needed

    def take(self, x_bt: jax.Array) -> jax.Array:
        """[b, t, ...] -> [1, b * t, ...] in this order."""
        return jnp.take(x_bt.reshape(1, -1, *x_bt.shape[2:]), self.order_t, axis=1)

    def give_back(self, x_1t: jax.Array, needed_bt: jax.Array) -> jax.Array:
        """The inverse of `take`, with 0 where nothing is needed."""
        back = jnp.zeros_like(x_1t[0]).at[self.order_t].set(x_1t[0], unique_indices=True)
        back_bt = back.reshape(*needed_bt.shape, *x_1t.shape[2:])
        return jnp.where(needed_bt.reshape(*needed_bt.shape, *[1] * (back_bt.ndim - 2)), back_bt, 0)


def to_the_front(needed_bt: jax.Array | None, mesh: Mesh | None) -> Front | None:
    """The order in which needed positions come first; `None`: it would be no gain here."""
    if needed_bt is None or needed_bt.size < FEWEST or not is_one_cpu(mesh):
        return None
    needed = needed_bt.reshape(-1)
    return Front(jnp.argsort(~needed).astype(jnp.int32), jnp.sum(needed, dtype=jnp.int32))


def over_the_first(count: jax.Array | None, t: int, run: Callable[[int], T]) -> T:
    """`run(n)` with the smallest n at hand that is at least `count`; without a count, `run(t)`."""
    if count is None:
        return run(t)
    sizes = sorted({min(t, -(-t * part // 8 // MULTIPLE) * MULTIPLE) for part in EIGHTHS})
    choice = jnp.searchsorted(jnp.array(sizes, jnp.int32), count)
    return jax.lax.switch(choice, [lambda n=n: run(n) for n in sizes])
