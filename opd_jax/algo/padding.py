"""Rows that pad a vocabulary for the hardware: no tokens, so without any probability."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

LOWEST = -1e30  # finite: 0 * LOWEST is 0


def without_padding(
    logits: jax.Array,
    vocab_axes: tuple[int, int],
    padded_from: int | None,
    start: Any = 0,
    size: int | None = None,
) -> jax.Array:
    """Logits with those of padded rows at `LOWEST`; without padding, the same array.

    Args:
        vocab_axes: the axes of `logits` that are n shards of the vocabulary and c rows of each.
        padded_from: first padded row of the vocabulary; `None`: there is none.
        start: the first of the c rows, counted within its shard.
        size: rows of a shard; `None`: c.
    """
    if padded_from is None:
        return logits
    n, c = (logits.shape[axis] for axis in vocab_axes)
    row_nc = (size or c) * jnp.arange(n)[:, None] + (start + jnp.arange(c))[None, :]
    others = tuple(axis for axis in range(logits.ndim) if axis not in vocab_axes)
    return jnp.where(jnp.expand_dims(row_nc < padded_from, others), logits, LOWEST)
