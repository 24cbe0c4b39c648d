"""Log-probs of chosen tokens from hidden states, without a [batch, time, vocab] array in memory.

The logits of a block of the vocabulary exist at a time, for all tokens; the backward pass computes
them again, unless it is told to keep them, or the tokens are so few that the logits cost less than
the head's gradient does. So every row of the head is read once, and its gradient written once. The
log-sum-exp and the head's gradient are float32, over the true vocabulary, whatever its size. A
chosen token's logit is one of those that are summed: another product of the same numbers may be
rounded otherwise (an accelerator takes float32 products in fewer bits), and a log-prob would come
out above 0. The head comes as the parameter it is: it is cast here, so that its gradient is never
rounded to the compute dtype, in which a frequent token's sum would stop growing. What a mesh cuts
of its width is gathered a block at a time, and a block's gradient is scattered at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.algo.chosen_grads import add_chosen_grads
from opd_jax.algo.chunks import longer
from opd_jax.algo.needed import over_the_first, to_the_front
from opd_jax.algo.padding import LOWEST, without_padding
from opd_jax.core.in_order import after
from opd_jax.core.mesh import axis_size, constrain

BLOCK_LOGITS = 2**20
MIN_BLOCK = 1024  # rows of the head: smaller products are slow
MAX_BLOCK = 4096  # a float32 sum of more terms, one after the other, loses digits
KEPT_LOGITS = 2**27  # half a GiB


class ChosenLogprobs(NamedTuple):
    """Natural log-probs under the full softmax at temperature 1."""

    logprob_bts: jax.Array  # float32, of each chosen id
    entropy_bt: jax.Array  # float32, nats; carries no gradient


class _Plan(NamedTuple):
    """How to run through the vocabulary; hashable."""

    mesh: Mesh | None
    shards: int
    """Pieces of the vocabulary, as the mesh cuts it: each is run through on its own."""
    size: int
    """Rows of each piece."""
    rows: int
    """Rows of each piece whose logits exist at a time."""
    keep: bool  # whether the backward pass finds the logits of the forward pass
    padded_from: int | None


def chosen_logprobs(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    ids_bts: jax.Array,
    mesh: Mesh | None = None,
    block_rows: int | None = None,
    padded_from: int | None = None,
    *,
    keep_logits: bool = False,
    needed_bt: jax.Array | None = None,
) -> ChosenLogprobs:
    """Log-probs of `ids_bts` at every position, and the entropy there.

    Args:
        hidden_btd: after the final norm; its dtype is the products'.
        head_vd: logits are `hidden_btd @ head_vd.T`; its gradient has its dtype.
        ids_bts: int32 in [0, v); the s ids of a position need not differ.
        mesh: where the head lies; `None`: one device.
        block_rows: `rows` of the plan; `None`: as many as keep the logits below `BLOCK_LOGITS`.
        padded_from: first row of the head that is no token and has no probability, if one is.
        keep_logits: leave float32 [b, t, v] for the backward pass, which then computes a quarter
            less; few tokens' are kept in any case.
        needed_bt: bool: elsewhere both may be 0 (`algo.needed`). `None`: all are needed.
    """
    (b, t, d), v = hidden_btd.shape, head_vd.shape[0]
    shards = 1 if mesh is None else axis_size(mesh, "vocab")
    fitting = block_rows or min(max(MIN_BLOCK, BLOCK_LOGITS // (b * t * shards)), MAX_BLOCK)
    keep = keep_logits or (b * t <= d and b * t * v <= KEPT_LOGITS)
    size = v // shards
    plan = _Plan(mesh, shards, size, min(size, fitting), keep, padded_from)
    chosen = cast(Callable[..., tuple[jax.Array, jax.Array]], _chosen)  # `custom_vjp` hides it
    front = to_the_front(needed_bt, head_vd, mesh)
    if front is None:
        return ChosenLogprobs(*chosen(hidden_btd, head_vd, ids_bts, None, plan))
    found = chosen(front.take(hidden_btd), head_vd, front.take(ids_bts), front.number, plan)
    return ChosenLogprobs(*(front.give_back(x) for x in found))


def pick(block_btnc: jax.Array, ids_bts: jax.Array, start: Any, size: int) -> jax.Array:
    """[b, t, n, s]: entries of ids in the rows from `start` of n pieces of `size`; else 0."""
    n, c = block_btnc.shape[-2:]
    first_n = jnp.arange(n, dtype=jnp.int32) * size + start
    at_btns = ids_bts[:, :, None] - first_n[None, None, :, None]
    here = (at_btns >= 0) & (at_btns < c)
    found = jnp.take_along_axis(block_btnc, jnp.clip(at_btns, 0, c - 1), axis=-1)
    return jnp.where(here, found, 0.0)


class _Blocks(NamedTuple):
    """Logits [n, c, b, t] of each block of the vocabulary; `None`: not kept."""

    stack: jax.Array | None  # with a leading axis: the blocks of `plan.rows`
    rest: jax.Array | None  # of the smaller block that is left


class _Saved(NamedTuple):
    """What the backward pass needs."""

    hidden_btd: jax.Array
    head_vd: jax.Array  # cast
    ids_bts: jax.Array
    number: jax.Array | None  # of the positions that are needed, if they come first
    lse_bt: jax.Array
    like: jax.Array  # empty, of the parameter's dtype
    logits: _Blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chosen(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    ids_bts: jax.Array,
    count: jax.Array | None,
    plan: _Plan,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs [b, t, s] and entropy [b, t], float32; the entropy carries no gradient."""
    return _chosen_fwd(hidden_btd, head_vd, ids_bts, count, plan._replace(keep=False))[0]


def _chosen_fwd(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    ids_bts: jax.Array,
    count: jax.Array | None,
    plan: _Plan,
) -> tuple[tuple[jax.Array, jax.Array], _Saved]:
    like = jnp.zeros((0,), head_vd.dtype)
    head_vd = head_vd.astype(hidden_btd.dtype)
    t = hidden_btd.shape[1]

    def of_first(n: int) -> tuple[tuple[jax.Array, ...], _Blocks]:
        *found, logits = _forward(hidden_btd[:, :n], head_vd, ids_bts[:, :n], plan, t)
        return tuple(longer(x, 1, t) for x in found), logits

    (logprob_bts, lse_bt, entropy_bt), logits = over_the_first(count, t, of_first)
    saved = _Saved(hidden_btd, head_vd, ids_bts, count, lse_bt, like, logits)
    return (logprob_bts, entropy_bt), saved


def _chosen_bwd(
    plan: _Plan, saved: _Saved, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    grad_bts = cotangents[0].astype(jnp.float32)
    t = grad_bts.shape[1]

    def of_first(n: int) -> tuple[jax.Array, jax.Array]:
        hidden_btd, head_vd = _normaliser_grads(saved, -jnp.sum(grad_bts[:, :n], axis=-1), plan)
        return longer(hidden_btd, 1, t), head_vd

    found = over_the_first(saved.number, t, of_first)
    given = saved.hidden_btd, saved.head_vd, after(saved.ids_bts, found, plan.mesh), grad_bts
    hidden_btd, head_vd = add_chosen_grads(*given, found, plan.mesh)
    return hidden_btd.astype(saved.hidden_btd.dtype), head_vd.astype(saved.like.dtype), None, None


def _as_parameter(x_nvd: jax.Array, plan: _Plan) -> jax.Array:
    """Rows of the head, or of its gradient, cut as the mesh cuts the parameter."""
    return constrain(x_nvd, plan.mesh, ("vocab", "replicated", "embed"), "head")


def _over_vocabulary(
    head_vd: jax.Array,
    plan: _Plan,
    body: Callable[[jax.Array, Any, Any, jax.Array | None], tuple[Any, jax.Array | None]],
    carry: Any,
    kept: _Blocks,
) -> tuple[Any, _Blocks]:
    """Run `body(head_ncd, start, carry, kept)` over blocks of c whole rows of each of the n shards.

    Blocks of `plan.rows` in a loop, then the smaller one that is left. A body gives the next carry
    and what to keep of its block.
    """
    head_nvd = head_vd.reshape(plan.shards, -1, head_vd.shape[-1])
    size, rows = head_nvd.shape[1], plan.rows

    def block(carry: Any, xs: tuple[jax.Array, jax.Array | None]) -> tuple[Any, jax.Array | None]:
        j, kept_ncbt = xs
        head_ncd = jax.lax.dynamic_slice_in_dim(head_nvd, j * rows, rows, axis=1)
        return body(whole(head_ncd), j * rows, carry, kept_ncbt)

    def whole(head_ncd: jax.Array) -> jax.Array:
        head_ncd = _as_parameter(head_ncd, plan)  # or all would be gathered, and a block cut out
        return constrain(head_ncd, plan.mesh, ("vocab", "replicated", "replicated"), "head")

    carry, stack = jax.lax.scan(block, carry, (jnp.arange(size // rows), kept.stack))
    start = size - size % rows
    if start == size:
        return carry, _Blocks(stack, None)
    carry, rest = body(whole(head_nvd[:, start:]), start, carry, kept.rest)
    return carry, _Blocks(stack, rest)


def _block_logits(hidden_btd: jax.Array, head_ncd: jax.Array, at: Any, plan: _Plan) -> jax.Array:
    """With the vocabulary first: as the head's gradient reads its large operand."""
    ncbt = jnp.einsum("ncd,btd->ncbt", head_ncd, hidden_btd, preferred_element_type=jnp.float32)
    return without_padding(ncbt, (0, 1), plan.padded_from, at, plan.size)


def _forward(
    hidden_btd: jax.Array, head_vd: jax.Array, ids_bts: jax.Array, plan: _Plan, kept_t: int
) -> tuple[jax.Array, jax.Array, jax.Array, _Blocks]:
    """Chosen log-probs, log-sum-exp and entropy, float32; and the kept logits, of `kept_t`."""

    # `spread`: weights times logits below the largest; the logits themselves would cancel badly.
    # It is a product, for CPUs: of two sums each would compute the exponentials again.

    def body(
        head_ncd: jax.Array, start: Any, carry: tuple[jax.Array, ...], _: jax.Array | None
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        top_nbt, total_nbt, spread_nbt, chosen_btns = carry
        logits_ncbt = _block_logits(hidden_btd, head_ncd, start, plan)
        logits_btnc = jnp.moveaxis(logits_ncbt, (0, 1), (2, 3))
        chosen_btns += pick(logits_btnc, ids_bts, start, plan.size)
        new_top = jnp.maximum(top_nbt, jnp.max(logits_ncbt, axis=1))
        below = logits_ncbt - new_top[:, None]
        weight = jnp.exp(below)
        moved = top_nbt - new_top
        spread_nbt = (spread_nbt + total_nbt * moved) * jnp.exp(moved)
        spread_nbt += jnp.einsum("ncbt,ncbt->nbt", weight, below, precision="highest")
        total_nbt = total_nbt * jnp.exp(moved) + jnp.sum(weight, axis=1)
        kept = longer(logits_ncbt, 3, kept_t) if plan.keep else None
        return (new_top, total_nbt, spread_nbt, chosen_btns), kept

    (b, t, s), n = ids_bts.shape, plan.shards
    zero = jnp.zeros((n, b, t), jnp.float32)
    begin = (zero + LOWEST, zero, zero, jnp.zeros((b, t, n, s)))
    found, logits = _over_vocabulary(head_vd, plan, body, begin, _Blocks(None, None))
    top, total, spread, chosen_btns = (*(jnp.moveaxis(x, 0, 2) for x in found[:3]), found[3])
    top_bt = jnp.max(top, axis=-1)
    log_total_bt = jnp.log(jnp.sum(total * jnp.exp(top - top_bt[..., None]), axis=-1))
    logprob_bts = (jnp.sum(chosen_btns, axis=2) - top_bt[..., None]) - log_total_bt[..., None]
    lse_bt = top_bt + log_total_bt
    above = lse_bt[..., None] - top
    entropy_bt = jnp.sum(jnp.exp(-above) * (total * above - spread), axis=-1)
    return logprob_bts, lse_bt, entropy_bt, logits


def _normaliser_grads(
    saved: _Saved, grad_bt: jax.Array, plan: _Plan
) -> tuple[jax.Array, jax.Array]:
    """Float32 gradients of the log-sum-exp for hidden states [b, t, d] and head [v, d].

    For as many of the first positions as `grad_bt` has.
    """
    t = grad_bt.shape[1]
    hidden_btd, lse_bt, head_vd = saved.hidden_btd[:, :t], saved.lse_bt[:, :t], saved.head_vd
    grad_bt1 = grad_bt[..., None]  # times rows of d numbers: there are fewer than of v
    scaled_btd = (hidden_btd * grad_bt1).astype(hidden_btd.dtype)

    def body(
        head_ncd: jax.Array, start: Any, carry: tuple[jax.Array, ...], kept: jax.Array | None
    ) -> tuple[tuple[jax.Array, ...], None]:
        hidden_grad_nbtd, head_grad_nvd = carry
        if kept is None:
            logits_ncbt = _block_logits(hidden_btd, head_ncd, start, plan)
        else:
            logits_ncbt = kept[..., :t]
        prob_ncbt = jnp.exp(logits_ncbt - lse_bt[None, None]).astype(hidden_btd.dtype)
        hidden_grad_nbtd += jnp.einsum(
            "ncbt,ncd->nbtd", prob_ncbt, head_ncd, preferred_element_type=jnp.float32
        )
        block = jnp.einsum(
            "ncbt,btd->ncd", prob_ncbt, scaled_btd, preferred_element_type=jnp.float32
        )
        block = _as_parameter(block, plan)
        head_grad_nvd = jax.lax.dynamic_update_slice_in_dim(head_grad_nvd, block, start, axis=1)
        return (hidden_grad_nbtd, head_grad_nvd), None

    v, d = head_vd.shape
    zeros = (
        jnp.zeros((plan.shards, *hidden_btd.shape), jnp.float32),
        _as_parameter(jnp.zeros((plan.shards, plan.size, d), jnp.float32), plan),
    )
    (hidden_grad, head_grad), _ = _over_vocabulary(head_vd, plan, body, zeros, saved.logits)
    return jnp.sum(hidden_grad, axis=0) * grad_bt1, head_grad.reshape(v, d)


_chosen.defvjp(_chosen_fwd, _chosen_bwd)
