"""Token embedding whose gradient is summed in float32."""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.core.mesh import axis_size, constrain

Pair = tuple[jax.Array, jax.Array]
LOOKUP_AXES = ("looked_up", "replicated", "embed")
"""Of the rows as they come out of an embedding whose width is cut: each device has its part of all
tokens' vectors. From there they travel once to where their rows lie; left to itself, the
compiler has every device gather the whole vectors of all tokens."""


def embed(table_vd: jax.Array, tokens_bt: jax.Array, dtype: str, mesh: Mesh | None) -> Pair:
    """Rows [b, t, d] of the embedding in the compute dtype, and the embedding for other uses.

    The rows' gradients are summed in float32: in bfloat16 the sum over a frequent token's positions
    would stop growing. They are added to the gradient of the other uses (a tied output head), so
    that one array of [v, d] exists and not two.
    """
    return cast(Pair, _embed(table_vd, tokens_bt, dtype, mesh))  # `custom_vjp` hides the type


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embed(table_vd: jax.Array, tokens_bt: jax.Array, dtype: str, mesh: Mesh | None) -> Pair:
    return _by_width(jnp.take(table_vd.astype(dtype), tokens_bt, axis=0), mesh), table_vd


def _by_width(rows_btd: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Every device has its part of the width. What no mesh divides is for others to refuse."""
    if mesh is None or rows_btd.shape[0] % axis_size(mesh, LOOKUP_AXES[0]):
        return rows_btd
    return constrain(rows_btd, mesh, LOOKUP_AXES, "embedded tokens")


def _embed_fwd(
    table_vd: jax.Array, tokens_bt: jax.Array, dtype: str, mesh: Mesh | None
) -> tuple[Pair, jax.Array]:
    return _embed(table_vd, tokens_bt, dtype, mesh), tokens_bt


def _embed_bwd(
    dtype: str, mesh: Mesh | None, tokens_bt: jax.Array, grads: Pair
) -> tuple[jax.Array, None]:
    rows_btd, table_vd = grads
    rows_btd = _by_width(rows_btd, mesh).astype(jnp.float32)
    total_vd = table_vd.astype(jnp.float32).at[tokens_bt].add(rows_btd)
    return total_vd.astype(table_vd.dtype), None


_embed.defvjp(_embed_fwd, _embed_bwd)
