"""Token embedding whose gradient is summed in float32."""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.core.in_order import after
from opd_jax.core.mesh import constrain

Pair = tuple[jax.Array, jax.Array]


def embed(table_vd: jax.Array, tokens_bt: jax.Array, dtype: str, mesh: Mesh | None = None) -> Pair:
    """Rows [b, t, d] of the embedding in the compute dtype, and the embedding for other uses.

    The rows' gradients are summed in float32: in bfloat16 the sum over a frequent token's positions
    would stop growing. They are added to the gradient of the other uses (a tied output head), so
    that one array of [v, d] exists and not two. On a mesh they are cut as the table is before they
    are added, each copy of it taking its own rows, and their tokens with them. Left to itself, the
    compiler of TPUs gathers the gradients of all rows, in float32, where there are several copies;
    and if tokens are cut otherwise, the gradient of the other uses is gathered.
    """
    return cast(Pair, _embed(table_vd, tokens_bt, dtype, mesh))  # `custom_vjp` hides the type


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embed(table_vd: jax.Array, tokens_bt: jax.Array, dtype: str, mesh: Mesh | None) -> Pair:
    return jnp.take(table_vd.astype(dtype), tokens_bt, axis=0), table_vd


def _embed_fwd(
    table_vd: jax.Array, tokens_bt: jax.Array, dtype: str, mesh: Mesh | None
) -> tuple[Pair, jax.Array]:
    return _embed(table_vd, tokens_bt, dtype, mesh), tokens_bt


def _embed_bwd(
    dtype: str, mesh: Mesh | None, tokens_bt: jax.Array, grads: Pair
) -> tuple[jax.Array, None]:
    rows_btd, table_vd = grads
    rows_btd = constrain(rows_btd, mesh, ("copies", "replicated", "embed"), "embedding's gradient")
    tokens_bt = after(tokens_bt, (rows_btd,), mesh)
    tokens_bt = constrain(tokens_bt, mesh, ("copies", "replicated"), "tokens of that gradient")
    total_vd = table_vd.astype(jnp.float32).at[tokens_bt].add(rows_btd.astype(jnp.float32))
    return total_vd.astype(table_vd.dtype), None


_embed.defvjp(_embed_fwd, _embed_bwd)
