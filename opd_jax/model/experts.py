"""The experts' MLPs as products of grouped rows: the compiler's own on TPUs, by blocks elsewhere.

A (token, expert) pair is one row of work. `jax.lax.ragged_dot` is a grouped product on TPUs only:
on CPU and GPU XLA makes it one dense product with every expert, whose memory and work grow with
their number. There, pairs sorted by expert are taken in blocks that lie within one expert:

    pair             1 5 7 | 0 2 3 4 6 8 | 9        three experts have 3, 6 and 1 pairs
    blocks of 4      1 5 7 - | 0 2 3 4 | 6 8 - - | 9 - - -

A loop over the blocks that hold a pair reads one expert's weights in place and a block's tokens,
forward and again backward; it keeps nothing of a block. Neither blocks nor weights are laid out.

Letters beyond the legend: p pair, e expert, c block, r row of a block.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SMALLEST_BLOCK, LARGEST_BLOCK = 8, 256
BLOCKS_SCOPE = "expert_blocks_"
"""In the compiled text the loop's name goes on with how often it is expected to run."""
_f32 = jnp.float32


class Weights(NamedTuple):
    """The held experts' MLPs."""

    gate_edf: jax.Array
    up_edf: jax.Array
    down_efd: jax.Array


class Blocks(NamedTuple):
    """Which tokens meet which expert. Blocks from `used` on are empty."""

    weight_cr: jax.Array  # float32, of the router
    token_cr: jax.Array  # int32, distinct in a block; where no pair is, past the last token
    expert_c: jax.Array  # int32
    used: jax.Array  # int32


Product = Callable[[jax.Array, jax.Array, jax.Array, Weights], jax.Array]


_in_groups_anywhere = ContextVar("_in_groups_anywhere", default=False)


@contextlib.contextmanager
def in_groups_anywhere() -> Generator[None]:
    """Traced within, the product has the form of TPUs: its work does not depend on the routing."""
    token = _in_groups_anywhere.set(True)
    try:
        yield
    finally:
        _in_groups_anywhere.reset(token)


def product_on(platform: str, pairs: int, experts: int) -> Product:
    """The form of the product for a platform.

    Args:
        platform: as `core.mesh.platform_of` says it.
        pairs: that one device chooses its own from.
        experts: all of them, wherever they are held.
    """
    if platform == "tpu" or _in_groups_anywhere.get():
        return functools.partial(in_groups, experts=experts)
    rows = block_rows(pairs, experts)
    return functools.partial(in_blocks, rows=rows, each=expected_blocks(pairs / experts, rows))


def in_groups(
    x_td: jax.Array,
    weight_ts: jax.Array,
    expert_ts: jax.Array,
    weights: Weights,
    *,
    experts: int | None = None,
) -> jax.Array:
    """float32 [t, d]: what the held experts add to each token, by `jax.lax.ragged_dot`.

    Args:
        weight_ts: float32.
        expert_ts: int32; only `0` to `e - 1` are held.
        experts: all of them, wherever they are held; `None`: it is not known.
    """
    (t, s), held = expert_ts.shape, weights.gate_edf.shape[0]
    group_p = _groups(expert_ts, held)
    order_p = jnp.argsort(group_p)
    size_e = jnp.sum(group_p[:, None] == jnp.arange(held)[None], axis=0, dtype=jnp.int32)
    grouped_p1 = (group_p < held)[order_p][:, None]

    def defined(x: jax.Array) -> jax.Array:
        # Rows in no group: their products and gradients are undefined on some backends.
        return x if held == experts else jnp.where(grouped_p1, x, 0)

    rows = defined(x_td[order_p // s])
    gate = jax.lax.ragged_dot(rows, weights.gate_edf, size_e)
    up = jax.lax.ragged_dot(rows, weights.up_edf, size_e)
    hidden = defined(jax.nn.silu(gate) * up)
    # Weighted before the last product, which no gradient then needs: it is not kept, and a layer
    # that is computed again leaves it out.
    weight_p1 = weight_ts.reshape(-1)[order_p][:, None]
    weighted = defined((hidden * weight_p1).astype(x_td.dtype))
    out = jax.lax.ragged_dot(weighted, weights.down_efd, size_e, preferred_element_type=_f32)
    return jnp.sum(defined(out)[jnp.argsort(order_p)].reshape(t, s, -1), axis=1)


def in_blocks(
    x_td: jax.Array,
    weight_ts: jax.Array,
    expert_ts: jax.Array,
    weights: Weights,
    *,
    rows: int,
    each: float = 1.0,
) -> jax.Array:
    """What `in_groups` gives, in blocks of `rows` pairs.

    Args:
        each: how many blocks a held expert is expected to have; nothing is computed from it.
    """
    held = weights.gate_edf.shape[0]
    blocks = cut_blocks(weight_ts, expert_ts, held, rows)
    with jax.named_scope(f"{BLOCKS_SCOPE}{max(round(held * each), 1)}"):
        return _blocks_mlp(*_varying_alike((x_td, blocks, weights)))


def block_rows(pairs: int, experts: int) -> int:
    """Pairs in a block: a power of two, about half an expert's even share.

    Half a block of padding per expert is then at most a quarter more rows than there are.
    """
    share = max(pairs // (2 * experts), 1)
    return min(max(1 << (share.bit_length() - 1), SMALLEST_BLOCK), LARGEST_BLOCK)


def expected_blocks(share: float, rows: int) -> float:
    """Blocks of an expert that gets `share` pairs on average, of tokens that choose at random."""
    return share / rows + 0.5 if share >= rows else 1.0 - math.exp(-share)


def cut_blocks(weight_ts: jax.Array, expert_ts: jax.Array, experts: int, rows: int) -> Blocks:
    """Sort the pairs of experts `0` to `experts - 1` and cut them at the experts' borders."""
    (t, s), pairs = expert_ts.shape, expert_ts.size
    group_p = _groups(expert_ts, experts)
    order_p = jnp.argsort(group_p)
    # Of the sorted pairs: counting by comparison would hold pairs x experts on a CPU.
    end_e = jnp.searchsorted(group_p[order_p], jnp.arange(experts), side="right")
    size_e = jnp.diff(end_e, prepend=0)
    blocks_e = -(-size_e // rows)
    last_e = jnp.cumsum(blocks_e)
    # At most one block per expert that has pairs is not full.
    most = (pairs + min(experts, pairs) * (rows - 1)) // rows
    block_c = jnp.arange(most)
    expert_c = jnp.minimum(jnp.sum(last_e[None] <= block_c[:, None], axis=1), experts - 1)
    rank_c = (block_c - (last_e - blocks_e)[expert_c]) * rows
    place_r = jnp.arange(rows)
    rank_cr = rank_c[:, None] + place_r[None]
    filled_cr = rank_cr < size_e[expert_c][:, None]
    first_c = (end_e - size_e)[expert_c]
    pair_cr = order_p[jnp.where(filled_cr, first_c[:, None] + rank_cr, 0)]
    weight_cr = jnp.where(filled_cr, weight_ts.reshape(-1)[pair_cr], 0)
    token_cr = jnp.where(filled_cr, pair_cr // s, t + place_r[None])
    return Blocks(weight_cr, token_cr, expert_c, last_e[-1])


def _groups(expert_ts: jax.Array, experts: int) -> jax.Array:
    """Each pair's expert; pairs of experts held elsewhere come last."""
    expert_p = expert_ts.reshape(-1)
    return jnp.where((expert_p >= 0) & (expert_p < experts), expert_p, experts)


class _Rows(NamedTuple):
    """One block's tokens, router weights, expert (without the axis `e`), and its hidden rows."""

    token_r: jax.Array
    weight_r1: jax.Array
    expert: Weights
    x_rd: jax.Array
    gate_rf: jax.Array
    up_rf: jax.Array
    hidden_rf: jax.Array


def _block(c: jax.Array, x_td: jax.Array, blocks: Blocks, weights: Weights) -> _Rows:
    token_r, expert = blocks.token_cr[c], _expert(weights, blocks.expert_c[c])
    x_rd = _take(x_td, token_r)
    gate_rf, up_rf = x_rd @ expert.gate_edf, x_rd @ expert.up_edf
    hidden_rf = jax.nn.silu(gate_rf) * up_rf
    return _Rows(token_r, blocks.weight_cr[c][:, None], expert, x_rd, gate_rf, up_rf, hidden_rf)


def _take(x_td: jax.Array, token_r: jax.Array) -> jax.Array:
    return x_td.at[token_r].get(mode="fill", fill_value=0, unique_indices=True)


def _add(sum_td: jax.Array, token_r: jax.Array, x_rd: jax.Array) -> jax.Array:
    return sum_td.at[token_r].add(x_rd, mode="drop", unique_indices=True)


def _put(x: jax.Array, value: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, i, axis=0)


def _bits(x: jax.Array) -> jax.Array:
    """`x` as integers: a CPU would make all of a bfloat16 array float32 to read or write a part."""
    return x.view(_bits_dtype(x.dtype))


def _bits_dtype(dtype: Any) -> Any:
    return jnp.dtype("uint16") if dtype.itemsize == 2 else dtype


def _expert(weights: Weights, e: jax.Array) -> Weights:
    """One expert's weights, without the axis `e`."""

    def pick(w: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(_bits(w), e, keepdims=False).view(w.dtype)

    return Weights(*map(pick, weights))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=_f32)


def _varying(x: jax.Array) -> frozenset[str]:
    """The axes of a `shard_map` along which `x` may differ."""
    return jax.typeof(x).manual_axis_type.varying


def _vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    new = tuple(axes - _varying(x))
    return jax.lax.pcast(x, new, to="varying") if new else x


def _varying_alike(tree: Any) -> Any:
    """Every leaf as if it differed wherever one does, as a loop's sums of all of them do."""
    axes = frozenset[str]().union(*map(_varying, jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: _vary(x, axes), tree)


def _zeros(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.Array:
    return _vary(jnp.zeros(shape, dtype), _varying(like))


@jax.custom_vjp
def _blocks_mlp(x_td: jax.Array, blocks: Blocks, weights: Weights) -> jax.Array:
    def add_block(c: jax.Array, out_td: jax.Array) -> jax.Array:
        rows = _block(c, x_td, blocks, weights)
        y_rd = _dot(rows.hidden_rf, rows.expert.down_efd)
        return _add(out_td, rows.token_r, y_rd * rows.weight_r1)

    return jax.lax.fori_loop(0, blocks.used, add_block, _zeros(x_td.shape, _f32, x_td))


def _forward(x_td: jax.Array, blocks: Blocks, weights: Weights) -> tuple[jax.Array, Any]:
    return _blocks_mlp(x_td, blocks, weights), (x_td, blocks, weights)


class _Gradients(NamedTuple):
    """Carried from block to block. An expert's blocks are neighbours: `sums` are float32."""

    x_td: jax.Array
    weight_cr: jax.Array
    sums: Weights  # without the axis `e`: of the expert at hand
    bits: Weights  # of the gradients of all weights


def _backward(saved: tuple[jax.Array, Blocks, Weights], g_td: jax.Array) -> Any:
    x_td, blocks, weights = saved
    start = _Gradients(
        _zeros(x_td.shape, _f32, x_td),
        _zeros(blocks.weight_cr.shape, _f32, x_td),
        Weights(*(_zeros(w.shape[1:], _f32, x_td) for w in weights)),
        Weights(*(_zeros(w.shape, _bits_dtype(w.dtype), x_td) for w in weights)),
    )

    def add_block(c: jax.Array, total: _Gradients) -> _Gradients:
        e = blocks.expert_c[c]
        x_rd, weight_r, part = _block_gradients(c, g_td, saved)
        same = (c > 0) & (blocks.expert_c[jnp.maximum(c - 1, 0)] == e)
        sums = Weights(*(jnp.where(same, s, 0) + p for s, p in zip(total.sums, part, strict=True)))
        bits = [_bits(s.astype(w.dtype)) for s, w in zip(sums, weights, strict=True)]
        return _Gradients(
            _add(total.x_td, blocks.token_cr[c], x_rd),
            _put(total.weight_cr, weight_r, c),
            sums,
            Weights(*(_put(x, part, e) for x, part in zip(total.bits, bits, strict=True))),
        )

    total = jax.lax.fori_loop(0, blocks.used, add_block, start)
    routes = Blocks(total.weight_cr, *(_no_gradient(x) for x in blocks[1:]))
    gradients = [x.view(w.dtype) for x, w in zip(total.bits, weights, strict=True)]
    return total.x_td.astype(x_td.dtype), routes, Weights(*gradients)


def _no_gradient(x: jax.Array) -> Any:
    return np.zeros(x.shape, jax.dtypes.float0)


def _block_gradients(
    c: jax.Array, g_td: jax.Array, saved: tuple[jax.Array, Blocks, Weights]
) -> tuple[jax.Array, jax.Array, Weights]:
    """float32 gradients of one block's tokens, router weights and expert."""
    x_td, blocks, weights = saved
    dtype, rows = x_td.dtype, _block(c, x_td, blocks, weights)
    g_rd = _take(g_td, rows.token_r)
    # Before the router's weight: with hidden rows it is that weight's gradient, with no product.
    plain_rf = _dot(g_rd.astype(dtype), rows.expert.down_efd.T)
    weight_r = jnp.sum(plain_rf * rows.hidden_rf, axis=1)
    _, activation = jax.vjp(lambda a, b: jax.nn.silu(a) * b, rows.gate_rf, rows.up_rf)
    gate_rf, up_rf = activation((plain_rf * rows.weight_r1).astype(dtype))
    x_rd = _dot(gate_rf, rows.expert.gate_edf.T) + _dot(up_rf, rows.expert.up_edf.T)
    part = Weights(
        _dot(rows.x_rd.T, gate_rf),
        _dot(rows.x_rd.T, up_rf),
        _dot(rows.hidden_rf.T, (g_rd * rows.weight_r1).astype(dtype)),
    )
    return x_rd, weight_r, part


_blocks_mlp.defvjp(_forward, _backward)
