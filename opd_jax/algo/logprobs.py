"""Log-probs of chosen tokens from hidden states, without a [batch, time, vocab] array in memory.

The logits of a block of the vocabulary exist at a time, for all tokens; the backward pass computes
them again. So every row of the head is read once, and its gradient written once. The log-sum-exp
and the head's gradient are float32, over the true vocabulary, whatever its size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp

BLOCK_LOGITS = 2**20
MIN_BLOCK = 1024  # rows of the head: smaller products are slow
CHUNK_TOKENS = 1024
LOWEST = -1e30  # finite: 0 * LOWEST is 0
Pair = tuple[jax.Array, jax.Array]
Triple = tuple[jax.Array, jax.Array, jax.Array]
Start = jax.Array | int  # of a block: traced inside the loop, known after it
Carry = TypeVar("Carry", bound=tuple[jax.Array, ...])


class ChosenLogprobs(NamedTuple):
    """Natural log-probs under the full softmax at temperature 1."""

    logprob_bts: jax.Array  # float32, of each chosen id
    entropy_bt: jax.Array  # float32, nats; carries no gradient


class TopK(NamedTuple):
    """The likeliest tokens of a distribution, likeliest first."""

    logprob_bt: jax.Array  # float32, of the target
    ids_btk: jax.Array  # int32
    logprob_btk: jax.Array  # float32, normalised over the whole vocabulary


def chosen_logprobs(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    ids_bts: jax.Array,
    shards: int = 1,
    block_rows: int | None = None,
) -> ChosenLogprobs:
    """Log-probs of `ids_bts` at every position, and the entropy there.

    Args:
        hidden_btd: after the final norm.
        head_vd: logits are `hidden_btd @ head_vd.T`.
        ids_bts: int32 in [0, v); the s ids of a position need not differ.
        shards: into how many pieces a mesh cuts the vocabulary: each is run through on its own.
        block_rows: rows of each piece whose logits exist at a time; `None`: as many as keep them
            below `BLOCK_LOGITS`.
    """
    b, t, _ = hidden_btd.shape
    fitting = block_rows or max(MIN_BLOCK, BLOCK_LOGITS // (b * t * shards))
    rows = min(head_vd.shape[0] // shards, fitting)
    found = _normaliser(hidden_btd, head_vd, shards, rows)
    lse_bt, entropy_bt = cast(Pair, found)  # `custom_vjp` hides the type
    logit_bts = _chosen_logits(hidden_btd, head_vd, ids_bts)
    return ChosenLogprobs(logit_bts - lse_bt[..., None], entropy_bt)


def top_k_logprobs(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    ids_bt: jax.Array,
    k: int,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TopK:
    """Log-prob of the target and of the `k` likeliest tokens at every position. Forward only."""
    chunk = _chunk(hidden_btd, chunk_tokens)

    def body(_: None, xs: Pair) -> tuple[None, TopK]:
        hidden, ids = xs
        logits = _logits(hidden, head_vd)
        lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        target = jnp.take_along_axis(logits, ids[..., None], axis=-1) - lse
        values, top_ids = jax.lax.top_k(logits, k)
        return None, TopK(target[..., 0], top_ids.astype(jnp.int32), values - lse)

    _, out = jax.lax.scan(body, None, (_cut(hidden_btd, chunk), _cut(ids_bt, chunk)))
    return jax.tree.map(lambda x: _join(x, hidden_btd.shape[1]), out)


def _chunk(hidden_btd: jax.Array, chunk_tokens: int) -> int:
    b, t, _ = hidden_btd.shape
    return min(t, max(1, chunk_tokens // b))


def _cut(x: jax.Array, chunk: int) -> jax.Array:
    """[b, t, ...] -> [t / chunk, b, chunk, ...], zero-padded at the end of t."""
    b, t = x.shape[:2]
    count = -(-t // chunk)
    padded = jnp.pad(x, [(0, 0), (0, count * chunk - t)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(b, count, chunk, *x.shape[2:]), 1, 0)


def _join(x: jax.Array, t: int) -> jax.Array:
    """The inverse of `_cut`."""
    count, b, chunk = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(b, count * chunk, *x.shape[3:])[:, :t]


def _logits(hidden_bcd: jax.Array, head_vd: jax.Array) -> jax.Array:
    return jnp.einsum("bcd,vd->bcv", hidden_bcd, head_vd, preferred_element_type=jnp.float32)


def _chosen_logits(hidden_btd: jax.Array, head_vd: jax.Array, ids_bts: jax.Array) -> jax.Array:
    """[b, t, s]: products with the chosen rows of the head alone, some time steps at once."""
    b, t, s = ids_bts.shape
    chunk = min(t, max(1, BLOCK_LOGITS // (b * s * hidden_btd.shape[-1])))

    def body(xs: Pair) -> jax.Array:
        hidden_bcd, ids_bcs = xs
        rows_bcsd = jnp.take(head_vd, ids_bcs, axis=0)
        return jnp.einsum(
            "bcd,bcsd->bcs", hidden_bcd, rows_bcsd, preferred_element_type=jnp.float32
        )

    if chunk == t:
        return body((hidden_btd, ids_bts))
    # Saves nothing of a chunk: the rows are gathered again in the backward pass.
    cut = (_cut(hidden_btd, chunk), _cut(ids_bts, chunk))
    return _join(jax.lax.map(jax.checkpoint(body), cut), t)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _normaliser(hidden_btd: jax.Array, head_vd: jax.Array, shards: int, rows: int) -> Pair:
    """Log-sum-exp and entropy at every position, float32; the entropy carries no gradient."""
    return _normaliser_fwd(hidden_btd, head_vd, shards, rows)[0]


def _over_vocabulary(
    head_vd: jax.Array,
    shards: int,
    rows: int,
    body: Callable[[jax.Array, Start, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Run `body(head_ncd, start, carry)` over blocks of c rows of each of the n shards.

    Blocks of `rows` in a loop, then the smaller one that is left.
    """
    head_nvd = head_vd.reshape(shards, -1, head_vd.shape[-1])
    size = head_nvd.shape[1]

    def block(j: jax.Array, carry: Carry) -> Carry:
        head_ncd = jax.lax.dynamic_slice_in_dim(head_nvd, j * rows, rows, axis=1)
        return body(head_ncd, j * rows, carry)

    carry = jax.lax.fori_loop(0, size // rows, block, carry)
    start = size - size % rows
    return carry if start == size else body(head_nvd[:, start:], start, carry)


def _block_logits(hidden_btd: jax.Array, head_ncd: jax.Array) -> jax.Array:
    return jnp.einsum("btd,ncd->btnc", hidden_btd, head_ncd, preferred_element_type=jnp.float32)


def _normaliser_fwd(
    hidden_btd: jax.Array, head_vd: jax.Array, shards: int, rows: int
) -> tuple[Pair, Triple]:
    # `spread`: weights times logits below the largest; the logits themselves would cancel badly.
    def body(head_ncd: jax.Array, _: Start, carry: Triple) -> Triple:
        top_btn, total_btn, spread_btn = carry
        logits_btnc = _block_logits(hidden_btd, head_ncd)
        new_top = jnp.maximum(top_btn, jnp.max(logits_btnc, axis=-1))
        below = logits_btnc - new_top[..., None]
        weight = jnp.exp(below)
        moved = top_btn - new_top
        spread_btn = (spread_btn + total_btn * moved) * jnp.exp(moved)
        spread_btn += jnp.sum(weight * below, axis=-1)
        total_btn = total_btn * jnp.exp(moved) + jnp.sum(weight, axis=-1)
        return new_top, total_btn, spread_btn

    zero = jnp.zeros((*hidden_btd.shape[:2], shards), jnp.float32)
    start = (zero + LOWEST, zero, zero)
    top, total, spread = _over_vocabulary(head_vd, shards, rows, body, start)
    lse_bt = jax.nn.logsumexp(top + jnp.log(total), axis=-1)
    above = lse_bt[..., None] - top
    entropy_bt = jnp.sum(jnp.exp(-above) * (total * above - spread), axis=-1)
    return (lse_bt, entropy_bt), (hidden_btd, head_vd, lse_bt)


def _normaliser_bwd(shards: int, rows: int, saved: Triple, cotangents: Pair) -> Pair:
    hidden_btd, head_vd, lse_bt = saved
    grad_bt = cotangents[0].astype(jnp.float32)

    def body(head_ncd: jax.Array, start: Start, carry: Pair) -> Pair:
        hidden_grad_nbtd, head_grad_nvd = carry
        prob = jnp.exp(_block_logits(hidden_btd, head_ncd) - lse_bt[..., None, None])
        logit_grad = (prob * grad_bt[..., None, None]).astype(hidden_btd.dtype)
        hidden_grad_nbtd += jnp.einsum(
            "btnc,ncd->nbtd", logit_grad, head_ncd, preferred_element_type=jnp.float32
        )
        block = jnp.einsum(
            "btnc,btd->ncd", logit_grad, hidden_btd, preferred_element_type=jnp.float32
        )
        return hidden_grad_nbtd, jax.lax.dynamic_update_slice_in_dim(
            head_grad_nvd, block, start, axis=1
        )

    v, d = head_vd.shape
    zeros = (
        jnp.zeros((shards, *hidden_btd.shape), jnp.float32),
        jnp.zeros((shards, v // shards, d), jnp.float32),
    )
    hidden_grad, head_grad = _over_vocabulary(head_vd, shards, rows, body, zeros)
    hidden_grad_btd = jnp.sum(hidden_grad, axis=0).astype(hidden_btd.dtype)
    return hidden_grad_btd, head_grad.reshape(v, d).astype(head_vd.dtype)


_normaliser.defvjp(_normaliser_fwd, _normaliser_bwd)
