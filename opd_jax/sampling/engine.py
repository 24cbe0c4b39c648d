"""The two programs of the sampler: prefill prompts into free slots, and decode all slots.

Shapes are static, the state is donated, and all that the host reads is replicated, so that every
process of a job sees the same and decides the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opd_jax.core.mesh import RULES, replicated
from opd_jax.model.decode import DecodeCache, decode, empty_cache, insert_rows
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.sampling.keys import sample_keys, token_keys
from opd_jax.sampling.transforms import Transform, draw

HEADER = 4  # columns of a prefill row before its tokens: length, slot, prompt hash, sample index


@dataclass(frozen=True)
class Program:
    """What the compiled programs depend on: hashable, a static argument."""

    model: LanguageModel
    transform: Transform
    end_ids: tuple[int, ...]
    mesh: Mesh | None
    slots: int
    cache_length: int
    max_new_tokens: int
    round_steps: int


class State(NamedTuple):
    """All slots on the device. A free slot is a done one."""

    cache: DecodeCache
    base_b: jax.Array  # uint32 [b, 2], the sample's key
    token_b: jax.Array  # the latest token, not in the cache yet
    count_b: jax.Array  # response tokens drawn
    done_b: jax.Array
    broken_b: jax.Array  # its logits were not finite at response position `count_b`


class First(NamedTuple):
    """What a prefill drew, for the host."""

    token_p: jax.Array
    logprob_p: jax.Array


class Round(NamedTuple):
    """What a decode round drew, for the host: row r of slot b counts while the slot was alive."""

    token_rb: jax.Array
    logprob_rb: jax.Array
    count_b: jax.Array
    done_b: jax.Array
    broken_b: jax.Array


Host = TypeVar("Host", First, Round)
Carry = tuple[jax.Array | int, State, jax.Array, jax.Array]
"""Of a decode round: steps done (at first a plain 0), and the tokens and log-probs drawn."""


class Drawn(NamedTuple):
    """One token per row."""

    token_b: jax.Array
    logprob_b: jax.Array  # under the untransformed distribution at temperature 1
    finite_b: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def empty_state(program: Program) -> State:
    """All slots free."""
    b = program.slots
    zeros = jnp.zeros((b,), jnp.int32)
    cache = empty_cache(program.model, b, program.cache_length)
    base_b = jnp.zeros((b, 2), jnp.uint32)
    done_b = jnp.ones((b,), bool)
    return _shard(program, State(cache, base_b, zeros, zeros, done_b, jnp.zeros((b,), bool)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    program: Program, params: Params, state: State, packed: jax.Array, root: jax.Array
) -> tuple[State, First]:
    """Run prompts, put their keys and values into slots, and draw their first tokens.

    Args:
        packed: int32 [p, HEADER + t], one prompt per row, padded on the right. A row whose slot is
            `program.slots` is padding and leaves no trace.
        root: uint32 [2], of `root_key`.
    """
    length_p, slot_p, prompt_p, index_p = packed[:, :HEADER].T
    tokens_pt = packed[:, HEADER:]
    position_pt = jnp.broadcast_to(jnp.arange(tokens_pt.shape[1])[None, :], tokens_pt.shape)
    out = program.model.forward(params, tokens_pt, position_pt)
    last = (length_p - 1)[:, None, None]
    hidden_pd = jnp.take_along_axis(out.hidden_btd, last, axis=1)[:, 0]
    base_p = sample_keys(root, prompt_p, index_p)
    drawn = _draw(program, params, hidden_pd, token_keys(base_p, jnp.zeros_like(length_p)))
    cache = insert_rows(state.cache, (out.keys, out.values), slot_p, length_p)
    count_p = drawn.finite_b.astype(jnp.int32)
    fresh = State(
        cache, base_p, drawn.token_b, count_p, _ended(program, drawn, count_p), ~drawn.finite_b
    )

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slot_p].set(new, mode="drop")

    state = State(cache, *(put(old, new) for old, new in zip(state[1:], fresh[1:], strict=True)))
    return _shard(program, state), _replicate(program, First(drawn.token_b, drawn.logprob_b))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_round(
    program: Program, params: Params, state: State, wake: jax.Array
) -> tuple[State, Round]:
    """Decode until all slots are done, `wake` slots are done, or `round_steps` steps have passed.

    Args:
        params: of `split_layers`.
    """
    shape = (program.round_steps, program.slots)

    def body(carry: Carry) -> Carry:
        step, state, token_rb, logprob_rb = carry
        state, drawn = _decode_step(program, params, state)
        token_rb = jax.lax.dynamic_update_index_in_dim(token_rb, drawn.token_b, step, 0)
        logprob_rb = jax.lax.dynamic_update_index_in_dim(logprob_rb, drawn.logprob_b, step, 0)
        return step + 1, state, token_rb, logprob_rb

    def proceed(carry: Carry) -> jax.Array:
        step, state, *_ = carry
        done = jnp.sum(state.done_b)
        return (step < program.round_steps) & (done < wake) & (done < program.slots)

    start = (0, state, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, state, token_rb, logprob_rb = jax.lax.while_loop(proceed, body, start)
    seen = Round(token_rb, logprob_rb, state.count_b, state.done_b, state.broken_b)
    return _shard(program, state), _replicate(program, seen)


def _decode_step(program: Program, params: Params, state: State) -> tuple[State, Drawn]:
    """One token for every live slot; done slots compute along and change nothing."""
    live_b = ~state.done_b
    hidden_bd, cache = decode(program.model, params, state.token_b, state.cache)
    cache = cache._replace(lengths_b=jnp.where(live_b, cache.lengths_b, state.cache.lengths_b))
    drawn = _draw(program, params, hidden_bd, token_keys(state.base_b, state.count_b))
    count_b = state.count_b + (live_b & drawn.finite_b)
    fresh = State(
        cache=cache,
        base_b=state.base_b,
        token_b=drawn.token_b,
        count_b=count_b,
        done_b=state.done_b | _ended(program, drawn, count_b),
        broken_b=state.broken_b | (live_b & ~drawn.finite_b),
    )
    return _shard(program, fresh), drawn


def _draw(program: Program, params: Params, hidden_bd: jax.Array, keys_b: jax.Array) -> Drawn:
    logits_bv = jnp.einsum(
        "bd,vd->bv",
        hidden_bd,
        program.model.head(params),
        preferred_element_type=jnp.float32,
    )
    token_b = draw(keys_b, logits_bv, program.transform)
    chosen_b = jnp.take_along_axis(logits_bv, token_b[:, None], axis=-1)[:, 0]
    logprob_b = chosen_b - jax.nn.logsumexp(logits_bv, axis=-1)
    return Drawn(token_b, logprob_b, jnp.all(jnp.isfinite(logits_bv), axis=-1))


def _ended(program: Program, drawn: Drawn, count_b: jax.Array) -> jax.Array:
    end = jnp.array(program.end_ids, jnp.int32)
    at_end = jnp.any(drawn.token_b[:, None] == end[None, :], axis=-1)
    return at_end | (count_b >= program.max_new_tokens) | ~drawn.finite_b


def _shard(program: Program, state: State) -> State:
    """Slots over the batch axes, kv heads over theirs."""
    mesh = program.mesh
    if mesh is None or mesh.size == 1:
        return state

    def put(x: jax.Array) -> jax.Array:
        axes = (RULES["batch"], RULES["kv_heads"]) if x.ndim == 4 else (RULES["batch"],)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree.map(put, state)


def _replicate(program: Program, tree: Host) -> Host:
    mesh = program.mesh
    if mesh is None or mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))
