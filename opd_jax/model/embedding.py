"""Token embedding whose gradient is summed in float32."""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp


def embed(table_vd: jax.Array, tokens_bt: jax.Array, dtype: str) -> jax.Array:
    """Rows [b, t, d] of the embedding in the compute dtype; their gradients are summed in float32.

    In bfloat16 the sum over a frequent token's positions would stop growing.
    """
    rows = _embed(table_vd, tokens_bt, dtype)
    return cast(jax.Array, rows)  # `custom_vjp` hides the type


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _embed(table_vd: jax.Array, tokens_bt: jax.Array, dtype: str) -> jax.Array:
    return jnp.take(table_vd.astype(dtype), tokens_bt, axis=0)


def _embed_fwd(
    table_vd: jax.Array, tokens_bt: jax.Array, dtype: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.take(table_vd.astype(dtype), tokens_bt, axis=0), (table_vd, tokens_bt)


def _embed_bwd(
    dtype: str, saved: tuple[jax.Array, jax.Array], grad_btd: jax.Array
) -> tuple[jax.Array, None]:
    table_vd, tokens_bt = saved
    zeros = jnp.zeros(table_vd.shape, jnp.float32)
    return zeros.at[tokens_bt].add(grad_btd.astype(jnp.float32)).astype(table_vd.dtype), None


_embed.defvjp(_embed_fwd, _embed_bwd)
