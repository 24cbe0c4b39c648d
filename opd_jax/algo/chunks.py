"""Time steps in chunks, for loops over them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cut_time(x: jax.Array, chunk: int, ways: int = 1) -> jax.Array:
    """[b, t, ...] -> [t / chunk, b, chunk, ...], zero-padded.

    Each of the `ways` equal parts into which a mesh cuts t gives its share of every chunk.
    """
    b, t, *rest = x.shape
    part, share = t // ways, chunk // ways
    count = -(-part // share)
    x = x.reshape(b, ways, part, *rest)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, count * share - part)] + [(0, 0)] * len(rest))
    x = jnp.moveaxis(x.reshape(b, ways, count, share, *rest), 2, 0)
    return x.reshape(count, b, chunk, *rest)


def join_time(x: jax.Array, t: int, ways: int = 1) -> jax.Array:
    """The inverse of `cut_time`."""
    count, b, chunk, *rest = x.shape
    x = jnp.moveaxis(x.reshape(count, b, ways, chunk // ways, *rest), 0, 2)
    return x.reshape(b, ways, -1, *rest)[:, :, : t // ways].reshape(b, t, *rest)


def longer(x: jax.Array, axis: int, size: int) -> jax.Array:
    """With zeros at the end of an axis, up to `size`."""
    return jnp.pad(x, [(0, size - x.shape[i] if i == axis else 0) for i in range(x.ndim)])
