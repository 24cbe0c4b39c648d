"""Gradients that the logits of chosen tokens give, row by row of the head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.algo.chunks import cut_time, join_time
from opd_jax.core.mesh import axis_size, constrain

ROWS = 2**20
"""Numbers of chosen rows that exist at a time."""
MESH_ROWS = 2**25
"""The same on a device of a mesh: each part is one more exchange of rows with the others."""

Grads = tuple[jax.Array, jax.Array]


def add_chosen_grads(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    ids_bts: jax.Array,
    grad_bts: jax.Array,
    grads: Grads,
    mesh: Mesh | None,
) -> Grads:
    """What the chosen rows' products give, added to `grads` in float32, some time steps at once.

    Each copy of the head on a mesh takes its own rows of the batch, in shards of the head's width,
    and their ids with them: with ids cut otherwise the gradient of the head would be gathered. The
    copies' sums are added once, behind the last step: added up in one array, each part of the steps
    would send them.

    Args:
        hidden_btd: hidden states.
        head_vd: the head in their dtype.
        ids_bts: the chosen tokens.
        grad_bts: float32, gradients of their logits.
        grads: float32, of hidden states [b, t, d] and head [v, d].
        mesh: left aside where it does not cut the rows.
    """
    hidden_grad_btd, head_grad_vd = grads
    b, t, s = grad_bts.shape
    entries, ways, copies, limit = b * s * hidden_btd.shape[-1], 1, 1, ROWS
    if mesh is not None and (mesh.size == 1 or b % axis_size(mesh, "batch")):
        mesh = None  # it cuts nothing, or could not cut these rows
    if mesh is not None:
        ways, copies, limit = axis_size(mesh, "time"), axis_size(mesh, "copies"), MESH_ROWS
        entries = -(-entries // (copies * axis_size(mesh, "embed")))
    chunk = _pieces(t, entries, ways, limit)

    def in_shards(x_bcsd: jax.Array) -> jax.Array:
        return constrain(x_bcsd, mesh, ("copies", "replicated", "replicated", "embed"), "head rows")

    def body(head_grad: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden_bcd, ids_bcs, grad_bcs = xs
        ids_bcs = constrain(ids_bcs, mesh, ("copies", "replicated", "replicated"), "ids of those")
        rows_bcsd = in_shards(jnp.take(head_vd, ids_bcs, axis=0))
        hidden_grad = jnp.einsum(
            "bcs,bcsd->bcd", grad_bcs, rows_bcsd, preferred_element_type=jnp.float32
        )
        # Else the probabilities would be gathered, to have all of the gradient in these shards.
        hidden_grad = constrain(hidden_grad, mesh, ("batch", "time", "replicated"), "head gradient")
        add_bcsd = in_shards(grad_bcs[..., None] * hidden_bcd[:, :, None].astype(jnp.float32))
        return _add_rows(head_grad, ids_bcs, add_bcsd, mesh), hidden_grad

    arrays = (hidden_btd, ids_bts, grad_bts)
    if chunk == t:
        head_grad_vd, more_btd = body(head_grad_vd, arrays)
        return hidden_grad_btd + more_btd, head_grad_vd
    cut = tuple(cut_time(x, chunk, ways) for x in arrays)
    if copies == 1:
        head_grad_vd, more = jax.lax.scan(body, head_grad_vd, cut)
    else:
        sums_nvd, more = jax.lax.scan(body, _apart(head_grad_vd, copies, mesh), cut)
        head_grad_vd = jnp.sum(sums_nvd, axis=0)
    return hidden_grad_btd + join_time(more, t, ways), head_grad_vd


def _apart(head_grad_vd: jax.Array, copies: int, mesh: Mesh | None) -> jax.Array:
    """[n, v, d]: an array for each copy of the head; the first goes on from what is there."""
    first_n = jnp.arange(copies) == 0
    return _of_copies(jnp.where(first_n[:, None, None], head_grad_vd, 0.0), mesh)


def _of_copies(x_nvd: jax.Array, mesh: Mesh | None) -> jax.Array:
    return constrain(x_nvd, mesh, ("copies", "vocab", "embed"), "sums of copies")


def _add_rows(
    sums: jax.Array, ids_bcs: jax.Array, add_bcsd: jax.Array, mesh: Mesh | None
) -> jax.Array:
    """Rows added to [v, d], or those of each copy to its own of [n, v, d]."""
    if sums.ndim == 2:
        return sums.at[ids_bcs].add(add_bcsd)
    ids, add = (x.reshape(len(sums), -1, *x.shape[1:]) for x in (ids_bcs, add_bcsd))
    return _of_copies(jax.vmap(lambda sums, at, x: sums.at[at].add(x))(sums, ids, add), mesh)


def _pieces(t: int, entries: int, ways: int, limit: int) -> int:
    """Time steps at once, of `entries` numbers each: at most `limit`, or one of each part."""
    count = -(-t // (max(1, limit // entries // ways) * ways))
    return -(-t // count // ways) * ways
