"""Positions whose log-probs nobody reads, prompts and padding: the head leaves most of them out.

Those that are read are moved to the front, and the products run over the first `n` positions, `n`
the smallest of a few fixed numbers that holds them: shapes are compiled. Only on one CPU, where a
step is bound by its products, and for a head large enough to be worth it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.core.mesh import is_one_cpu

T = TypeVar("T")
FEWEST = 256  # positions
LEAST = 2**20  # entries of the head: with fewer of either, a choice is not worth its compilation
EIGHTHS = (4, 5, 6, 7, 8)
MULTIPLE = 16


class Front(NamedTuple):
    """An order of b * t positions in which the needed ones come first."""

    needed_bt: jax.Array
    order_t: jax.Array  # int32

    @property
    def number(self) -> jax.Array:
        """How many are needed: an int32 scalar."""
        return jnp.sum(self.needed_bt, dtype=jnp.int32)

    def take(self, x_bt: jax.Array) -> jax.Array:
        """[b, t, ...] -> [1, b * t, ...] in this order."""
        return jnp.take(x_bt.reshape(1, -1, *x_bt.shape[2:]), self.order_t, axis=1)

    def give_back(self, x_1t: jax.Array) -> jax.Array:
        """The inverse of `take`, with 0 where nothing is needed."""
        x_bt = jnp.take(x_1t, jnp.argsort(self.order_t), axis=1)
        x_bt = x_bt.reshape(*self.needed_bt.shape, *x_1t.shape[2:])
        needed_bt = jnp.expand_dims(self.needed_bt, tuple(range(2, x_bt.ndim)))
        return jnp.where(needed_bt, x_bt, 0)


def to_the_front(
    needed_bt: jax.Array | None, head_vd: jax.Array, mesh: Mesh | None
) -> Front | None:
    """The order in which needed positions come first; `None`: it would be no gain here."""
    if needed_bt is None or needed_bt.size < FEWEST or head_vd.size < LEAST or not is_one_cpu(mesh):
        return None
    return Front(needed_bt, jnp.argsort(~needed_bt.reshape(-1)).astype(jnp.int32))


def over_the_first(count: jax.Array | None, t: int, run: Callable[[int], T]) -> T:
    """`run(n)` with the smallest n at hand that is at least `count`; without a count, `run(t)`."""
    if count is None:
        return run(t)
    sizes = sorted({min(t, -(-t * part // 8 // MULTIPLE) * MULTIPLE) for part in EIGHTHS})
    choice = jnp.searchsorted(jnp.array(sizes, jnp.int32), count)
    return jax.lax.switch(choice, [lambda n=n: run(n) for n in sizes])
