"""Grouped-query attention of the tokens of whole rows to each other, in plain XLA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from opd_jax.model.attention_mesh import mirrored, places

NO_SEGMENT = -(2**31)  # of padding; no token has it
MASKED = -1e30  # finite: a row in which all is masked must not turn into NaN
BLOCK = 256
ROW_BLOCK = 128
"""Where rows are computed one by one, in the caches of a CPU's core; at most."""
SIMD = 8
"""Float32 numbers that a CPU computes at once: tiles have whole multiples."""
SAVED = "attention"
"""Name of what the backward pass needs, for `jax.checkpoint` policies."""
Pair = tuple[jax.Array, jax.Array]
Triple = tuple[jax.Array, jax.Array, jax.Array]


def attend(
    q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, segments_bt: jax.Array | None
) -> jax.Array:
    """Causal softmax attention within segments; all scores of a row exist at once.

    Args:
        q_btnh: queries; query head n reads kv head n // (n_heads // kv_heads).
        k_btkh: keys of the same tokens.
        v_btkh: values of the same tokens.
        segments_bt: int32; a token reads the tokens of its segment up to itself. `None`: one
            segment per row.

    Returns:
        [b, t, n, h] in the dtype of `q_btnh`; scores and sums are float32.
    """
    b, t, n, h = q_btnh.shape
    k = k_btkh.shape[2]
    q_btkgh = q_btnh.reshape(b, t, k, n // k, h) * (h**-0.5)
    score = jnp.einsum("btkgh,bskh->bkgts", q_btkgh, k_btkh, preferred_element_type=jnp.float32)
    mask_bts = jnp.tril(jnp.ones((1, t, t), bool))
    if segments_bt is not None:
        mask_bts &= segments_bt[:, :, None] == segments_bt[:, None, :]
    score = jnp.where(mask_bts[:, None, None], score, MASKED)
    weight = jax.nn.softmax(score, axis=-1).astype(v_btkh.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weight, v_btkh, preferred_element_type=jnp.float32)
    return mixed.reshape(b, t, n, h).astype(q_btnh.dtype)


def attend_chunked(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    segments_bt: jax.Array | None,
    block: int = BLOCK,
    axis: str | None = None,
    *,
    skip: bool = False,
) -> jax.Array:
    """`attend`, one tile of `block` x `block` scores at a time, forward and backward.

    Tiles above the diagonal are never computed. The backward pass computes the tiles again from
    the log-sum-exp of each row. Source: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2.

    Args:
        axis: within `shard_map`, the mesh axis that cuts the tokens of the rows; the arrays are
            then this device's tokens. It gathers the others' keys and values.
        skip: leave out tiles that segments mask in all rows.
    """
    b, t, n, h = q_btnh.shape
    k, c = k_btkh.shape[2], min(block, t if axis is None else -(-t // 2))
    if segments_bt is None:
        segments_bt = jnp.zeros((b, t), jnp.int32)
    # Padding keys lie after every query, or, of cut rows, in a segment without one: no query of a
    # token reads them.
    multiple = c if axis is None else 2 * c
    q, keys, values = (pad_time(x, multiple) for x in (q_btnh, k_btkh, v_btkh))
    segments = pad_time(segments_bt, multiple, NO_SEGMENT)
    q_bkgth = jnp.moveaxis((q * (h**-0.5)).reshape(b, -1, k, n // k, h), 1, 3)
    rows = (jnp.moveaxis(keys, 1, 2), jnp.moveaxis(values, 1, 2), segments)
    places_i = places(q_bkgth.shape[3] // c, axis)
    queries = Queries(mirrored(q_bkgth, axis, 3), mirrored(segments, axis, 1), places_i)
    mixed = cast(
        jax.Array, _tiled(queries, *rows, Tiling(c, axis, skip))
    )  # `custom_vjp` hides the type
    mixed_bkgth = mirrored(mixed, axis, 3)
    return jnp.moveaxis(mixed_bkgth, 3, 1).reshape(b, -1, n, h)[:, :t]


def attend_by_row(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    segments_bt: jax.Array | None,
    block: int = ROW_BLOCK,
) -> jax.Array:
    """`attend_chunked`, one row after the other, without the tiles that segments mask whole.

    For one CPU: a batch's tiles do not fit the caches of its cores, and what one row can leave out
    another needs. The tiles left out are those whose ranges of segments do not meet, so all of
    them where segments are numbered along the row.
    """
    t = q_btnh.shape[1]
    even = -(-t // -(-t // block))  # tiles of one size, without much padding
    side = -(-even // SIMD) * SIMD

    def attend_row(row: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        q, k, v, segments = jax.tree.map(lambda x: x[None], row)
        return attend_chunked(q, k, v, segments, side, skip=segments is not None)[0]

    return jax.lax.map(attend_row, (q_btnh, k_btkh, v_btkh, segments_bt))


def pad_time(x_bt: jax.Array, multiple: int, value: int = 0) -> jax.Array:
    """[b, t, ...] with whole multiples of tokens."""
    widths = [(0, 0), (0, -x_bt.shape[1] % multiple)] + [(0, 0)] * (x_bt.ndim - 2)
    return jnp.pad(x_bt, widths, constant_values=value)


class Queries(NamedTuple):
    """What reads keys and values."""

    q_bkgth: jax.Array
    segments_bt: jax.Array
    places_i: jax.Array  # int32, of each block of queries: its number among those of the whole row


class Tiling(NamedTuple):
    """Tokens along a side of a tile, and as `attend_chunked` has them."""

    c: int
    axis: str | None
    skip: bool


class _Saved(NamedTuple):
    """What the backward pass of `_tiled` needs."""

    queries: Queries
    keys_bksh: jax.Array  # of this device, as values and segments
    values_bksh: jax.Array
    segments_bt: jax.Array
    mixed_bkgth: jax.Array
    lse_bkgt: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(
    queries: Queries,
    keys_bksh: jax.Array,
    values_bksh: jax.Array,
    segments_bt: jax.Array,
    tiling: Tiling,
) -> jax.Array:
    return _tiled_fwd(queries, keys_bksh, values_bksh, segments_bt, tiling)[0]


def _tiled_fwd(
    queries: Queries,
    keys_bksh: jax.Array,
    values_bksh: jax.Array,
    segments_bt: jax.Array,
    tiling: Tiling,
) -> tuple[jax.Array, _Saved]:
    c, axis, skip = tiling
    q_bkgth = queries.q_bkgth
    b, k, g, t, h = q_bkgth.shape
    all_keys, all_values, all_segments = _of_whole_rows(keys_bksh, values_bksh, segments_bt, axis)
    visible_ij = _visible(queries.segments_bt, all_segments, c) if skip else None

    def query_block(numbers: Pair) -> Pair:
        i, place = numbers
        q, segments = _cut(q_bkgth, i, c, 3), _cut(queries.segments_bt, i, c, 1)

        def key_block(j: jax.Array, carry: Triple) -> Triple:
            top, total, mixed = carry
            mask = _tile_mask(place, j, segments, _cut(all_segments, j, c, 1))
            score = _tile_scores(q, _cut(all_keys, j, c, 2), mask)
            new_top = jnp.maximum(top, jnp.max(score, axis=-1))
            weight = jnp.exp(score - new_top[..., None])
            scale = jnp.exp(top - new_top)
            add = _product("bkqs,bksh->bkqh", weight, _cut(all_values, j, c, 2), g)
            total = total * scale + jnp.sum(weight, axis=-1)
            return new_top, total, mixed * scale[..., None] + add

        zero = jnp.zeros((b, k, g, c), jnp.float32)
        start = (zero + MASKED, zero, jnp.zeros((b, k, g, c, h), jnp.float32))
        body = _where_visible(visible_ij, i, key_block)
        top, total, mixed = jax.lax.fori_loop(0, place + 1, body, start)
        return (mixed / total[..., None]).astype(q_bkgth.dtype), top + jnp.log(total)

    mixed, lse = jax.lax.map(query_block, (jnp.arange(t // c), queries.places_i))
    mixed_bkgth = jnp.moveaxis(mixed, 0, 3).reshape(q_bkgth.shape)
    lse_bkgt = jnp.moveaxis(lse, 0, 3).reshape(b, k, g, t)
    found = (q_bkgth, keys_bksh, values_bksh, mixed_bkgth, lse_bkgt)
    q_bkgth, keys_bksh, values_bksh, mixed_bkgth, lse_bkgt = (
        checkpoint_name(x, SAVED) for x in found
    )
    queries = queries._replace(q_bkgth=q_bkgth)
    saved = _Saved(queries, keys_bksh, values_bksh, segments_bt, mixed_bkgth, lse_bkgt)
    return mixed_bkgth, saved


def _of_whole_rows(
    keys_bksh: jax.Array, values_bksh: jax.Array, segments_bt: jax.Array, axis: str | None
) -> Triple:
    """The same of all tokens of the rows. The backward pass gathers them again: none is kept."""
    if axis is None:
        return keys_bksh, values_bksh, segments_bt
    return (
        jax.lax.all_gather(keys_bksh, axis, axis=2, tiled=True),
        jax.lax.all_gather(values_bksh, axis, axis=2, tiled=True),
        jax.lax.all_gather(segments_bt, axis, axis=1, tiled=True),
    )


def _visible(query_segments_bt: jax.Array, segments_bs: jax.Array, c: int) -> jax.Array:
    """bool [i, j]: some query of block i may read block j, as their ranges of segments meet."""

    def ranges(segments_bt: jax.Array) -> Pair:
        # Padding, 0 in packed rows, comes after all segments.
        placed = jnp.where(segments_bt > 0, segments_bt, jnp.iinfo(jnp.int32).max)
        blocks_bic = placed.reshape(placed.shape[0], -1, c)
        return jnp.min(blocks_bic, -1), jnp.max(blocks_bic, -1)

    (low_bi, high_bi), (low_bj, high_bj) = ranges(query_segments_bt), ranges(segments_bs)
    meet = (low_bi[:, :, None] <= high_bj[:, None]) & (high_bi[:, :, None] >= low_bj[:, None])
    return jnp.any(meet, axis=0)


def _where_visible(
    visible_ij: jax.Array | None, i: jax.Array, body: Callable[[jax.Array, Any], Any]
) -> Callable[[jax.Array, Any], Any]:
    """A loop over key blocks without those that query block i cannot read."""
    if visible_ij is None:
        return body

    def step(j: jax.Array, carry: Any) -> Any:
        return jax.lax.cond(visible_ij[i, j], lambda x: body(j, x), lambda x: x, carry)

    return step


def _tiled_bwd(
    tiling: Tiling, saved: _Saved, grad_bkgth: jax.Array
) -> tuple[Queries, jax.Array, jax.Array, None]:
    """With weights P and their gradient dP: dS = P * (dP - rowsum(dO * O)).

    Gradients of keys and values are summed over the devices of `axis` in float32.
    """
    c, axis, skip = tiling
    queries, mixed_bkgth, lse_bkgt = saved.queries, saved.mixed_bkgth, saved.lse_bkgt
    rows = (saved.keys_bksh, saved.values_bksh, saved.segments_bt)
    keys_bksh, values_bksh, segments_bt = _of_whole_rows(*rows, axis)
    q_bkgth = queries.q_bkgth
    g, t = q_bkgth.shape[2:4]
    visible_ij = _visible(queries.segments_bt, segments_bt, c) if skip else None
    delta_bkgt = jnp.einsum(
        "bkgth,bkgth->bkgt", grad_bkgth, mixed_bkgth, preferred_element_type=jnp.float32
    )

    def query_block(carry: Pair, numbers: Pair) -> tuple[Pair, jax.Array]:
        i, place = numbers
        q, grad, lse, delta = (
            _cut(x, i, c, 3) for x in (q_bkgth, grad_bkgth, lse_bkgt, delta_bkgt)
        )
        segments = _cut(queries.segments_bt, i, c, 1)

        def key_block(j: jax.Array, carry: Triple) -> Triple:
            q_grad, key_grads, value_grads = carry
            keys, values = _cut(keys_bksh, j, c, 2), _cut(values_bksh, j, c, 2)
            mask = _tile_mask(place, j, segments, _cut(segments_bt, j, c, 1))
            weight = jnp.exp(_tile_scores(q, keys, mask) - lse[..., None])
            weight_grad = _product("bkqh,bksh->bkqs", grad, values, g)
            score_grad = weight * (weight_grad - delta[..., None])
            q_grad += _product("bkqs,bksh->bkqh", score_grad, keys, g)
            key_grads = _add_block(key_grads, j, _transposed(score_grad, q))
            value_grads = _add_block(value_grads, j, _transposed(weight, grad))
            return q_grad, key_grads, value_grads

        start = (jnp.zeros(q.shape, jnp.float32), *carry)
        body = _where_visible(visible_ij, i, key_block)
        q_grad, key_grads, value_grads = jax.lax.fori_loop(0, place + 1, body, start)
        return (key_grads, value_grads), q_grad.astype(q_bkgth.dtype)

    zeros = (jnp.zeros(keys_bksh.shape, jnp.float32), jnp.zeros(values_bksh.shape, jnp.float32))
    numbers = (jnp.arange(t // c), queries.places_i)
    (key_grads, value_grads), q_grads = jax.lax.scan(query_block, zeros, numbers)
    if axis is not None:
        key_grads, value_grads = (
            jax.lax.psum_scatter(x, axis, scatter_dimension=2, tiled=True)
            for x in (key_grads, value_grads)
        )
    q_grad = jnp.moveaxis(q_grads, 0, 3).reshape(q_bkgth.shape)
    no_gradient: Any = None  # of integers
    queries = Queries(q_grad, no_gradient, no_gradient)
    return queries, key_grads.astype(keys_bksh.dtype), value_grads.astype(values_bksh.dtype), None


_tiled.defvjp(_tiled_fwd, _tiled_bwd)


def _cut(x: jax.Array, i: jax.Array, c: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * c, c, axis)


def _add_block(x_bksh: jax.Array, j: jax.Array, add_bkch: jax.Array) -> jax.Array:
    c = add_bkch.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(x_bksh, _cut(x_bksh, j, c, 2) + add_bkch, j * c, 2)


def _tile_mask(i: jax.Array, j: jax.Array, query_bc: jax.Array, key_bs: jax.Array) -> jax.Array:
    """[b, c, s] bool for query block i and key block j of the row, given their segments."""
    c = query_bc.shape[1]
    place = jnp.arange(c)
    causal = (i * c + place)[None, :, None] >= (j * c + place)[None, None, :]
    return causal & (query_bc[:, :, None] == key_bs[:, None, :])


def _tile_scores(q_bkgch: jax.Array, keys_bksh: jax.Array, mask_bcs: jax.Array) -> jax.Array:
    score = _product("bkqh,bksh->bkqs", q_bkgch, keys_bksh, q_bkgch.shape[2])
    return jnp.where(mask_bcs[:, None, None], score, MASKED)


def _product(spec: str, x_bkgcx: jax.Array, y: jax.Array, g: int) -> jax.Array:
    """A product of one tile in float32 sums: the g query heads of a kv head are one matrix."""
    b, k, _, c, last = x_bkgcx.shape
    flat = x_bkgcx.astype(y.dtype).reshape(b, k, g * c, last)
    out = jnp.einsum(spec, flat, y, preferred_element_type=jnp.float32)
    return out.reshape(b, k, g, c, -1)


def _transposed(x_bkgcs: jax.Array, y_bkgch: jax.Array) -> jax.Array:
    """[b, k, s, h]: summed over the queries of all heads that read a kv head."""
    b, k, g, c, s = x_bkgcs.shape
    x = x_bkgcs.astype(y_bkgch.dtype).reshape(b, k, g * c, s)
    y = y_bkgch.reshape(b, k, g * c, -1)
    return jnp.einsum("bkqs,bkqh->bksh", x, y, preferred_element_type=jnp.float32)
