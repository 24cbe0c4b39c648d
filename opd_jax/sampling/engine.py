"""The programs of the sampler: prefill prompts, start samples of them in free slots, decode all
slots.

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
from opd_jax.model.cache import (
    PagedCache,
    Pages,
    PageTable,
    empty_cache,
    insert_rows,
    room,
)
from opd_jax.model.decode import decode, logits
from opd_jax.model.spread import spread_rows
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.sampling.keys import sample_keys, token_keys
from opd_jax.sampling.transforms import Transform, Uses, bend, draw


@dataclass(frozen=True)
class Program:
    """What the compiled programs depend on: hashable, a static argument."""

    model: LanguageModel
    pages: Pages
    uses: Uses
    end_ids: tuple[int, ...]
    mesh: Mesh | None
    round_steps: int

    @property
    def slots(self) -> int:
        """Samples in flight."""
        return self.pages.rows


class Slots(NamedTuple):
    """What each slot works on. A free slot is a done one."""

    base_b: jax.Array  # uint32 [b, 2], the sample's key
    token_b: jax.Array  # the latest token, not in the cache yet
    count_b: jax.Array  # response tokens drawn
    done_b: jax.Array
    broken_b: jax.Array  # its logits were not finite at response position `count_b`
    limit_b: jax.Array  # most response tokens
    least_b: jax.Array  # response tokens before which no end token is drawn
    transform: Transform


class State(NamedTuple):
    """All slots on the device."""

    cache: PagedCache
    slots: Slots


class Prefilled(NamedTuple):
    """Prompts that have been read: what every sample of them starts from."""

    keys: jax.Array  # [l, p, t, k, h]
    values: jax.Array
    hidden_pd: jax.Array  # of each prompt's last token
    length_p: jax.Array


class Start(NamedTuple):
    """Samples to start, from the host; a sample whose slot is beyond the last leaves no trace."""

    source_p: jax.Array  # int32, the row of its prompt
    slot_p: jax.Array
    pages_lp: tuple[jax.Array, ...]  # as `insert_rows` takes them
    prompt_p: jax.Array  # `stable_hash` of the prompt's id
    index_p: jax.Array  # sample index
    limit_p: jax.Array
    least_p: jax.Array
    transform: Transform


class First(NamedTuple):
    """What a start drew, for the host."""

    token_p: jax.Array
    logprob_p: jax.Array
    drawn_logprob_p: jax.Array


class Round(NamedTuple):
    """What a decode round drew, for the host: row r of slot b counts while the slot was alive."""

    token_rb: jax.Array
    logprob_rb: jax.Array
    drawn_logprob_rb: jax.Array
    count_b: jax.Array
    done_b: jax.Array
    stuck_b: jax.Array  # alive, but without a page for its next token
    broken_b: jax.Array


Host = TypeVar("Host", First, Round)
Carry = tuple[jax.Array | int, State, tuple[jax.Array, jax.Array, jax.Array]]
"""Of a decode round: steps done (at first a plain 0), the state, and what was drawn."""


class Drawn(NamedTuple):
    """One token per row."""

    token_b: jax.Array
    logprob_b: jax.Array  # under the untransformed distribution at temperature 1
    drawn_logprob_b: jax.Array  # under the distribution that it was drawn from
    finite_b: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def empty_state(program: Program) -> State:
    """All slots free."""
    b = program.slots
    ints, floats, bools = (jnp.zeros((b,), x) for x in (jnp.int32, jnp.float32, bool))
    slots = Slots(
        base_b=jnp.zeros((b, 2), jnp.uint32),
        token_b=ints,
        count_b=ints,
        done_b=~bools,
        broken_b=bools,
        limit_b=ints,
        least_b=ints,
        transform=Transform(floats, ints, floats, floats),
    )
    return _shard(program, State(empty_cache(program.model, program.pages), slots))


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    program: Program, params: Params, tokens_pt: jax.Array, length_p: jax.Array
) -> Prefilled:
    """Read prompts.

    Args:
        tokens_pt: int32, one prompt per row, padded on the right.
        length_p: int32, their lengths, at least 1.
    """
    position_pt = jnp.broadcast_to(jnp.arange(tokens_pt.shape[1])[None, :], tokens_pt.shape)
    out = program.model.forward(params, tokens_pt, position_pt)
    last = (length_p - 1)[:, None, None]
    hidden_pd = jnp.take_along_axis(out.hidden_btd, last, axis=1)[:, 0]
    return Prefilled(out.keys, out.values, hidden_pd, length_p)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def start(
    program: Program,
    params: Params,
    state: State,
    prompts: Prefilled,
    new: Start,
    root: jax.Array,
) -> tuple[State, First]:
    """Put prompts into slots, and draw the samples' first tokens.

    Args:
        params: of `split_layers`.
        root: uint32 [2], of `root_key`.
    """
    source_p = new.source_p
    hidden_pd, length_p = prompts.hidden_pd[source_p], prompts.length_p[source_p]
    base_p = sample_keys(root, new.prompt_p, new.index_p)
    zero_p = jnp.zeros_like(source_p)
    fresh = Slots(
        base_p, zero_p, zero_p, zero_p > 0, zero_p > 0, new.limit_p, new.least_p, new.transform
    )
    drawn = _draw(program, params, hidden_pd, fresh)
    fresh = _advance(program, fresh, drawn)
    keys_values = prompts.keys[:, source_p], prompts.values[:, source_p]
    cache = insert_rows(program.pages, state.cache, keys_values, new.pages_lp, length_p)
    slots = jax.tree.map(lambda old, x: old.at[new.slot_p].set(x, mode="drop"), state.slots, fresh)
    first = First(drawn.token_b, drawn.logprob_b, drawn.drawn_logprob_b)
    return _shard(program, State(cache, slots)), _replicate(program, first)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_round(
    program: Program,
    params: Params,
    state: State,
    table: PageTable,
    wake: jax.Array,
    halt_b: jax.Array,
) -> tuple[State, Round]:
    """Decode until no slot can go on, `wake` slots cannot, another one is stuck, or the round ends.

    A round has at most `round_steps` steps.

    Args:
        params: of `split_layers`.
        halt_b: bool, slots that the host has ended.
    """
    shape = (program.round_steps, program.slots)
    slots = state.slots._replace(done_b=state.slots.done_b | halt_b)
    state = State(state.cache, slots)
    room_b = room(program.pages, table)
    stuck_before = jnp.sum(_stuck(state, room_b))

    def body(carry: Carry) -> Carry:
        step, state, seen = carry
        state, drawn = _decode_step(program, params, state, table, room_b)
        new = (drawn.token_b, drawn.logprob_b, drawn.drawn_logprob_b)
        rows = [
            jax.lax.dynamic_update_index_in_dim(old, x, step, 0)
            for old, x in zip(seen, new, strict=True)
        ]
        return step + 1, state, (rows[0], rows[1], rows[2])

    def proceed(carry: Carry) -> jax.Array:
        step, state, _ = carry
        stuck = jnp.sum(_stuck(state, room_b))
        idle = jnp.sum(state.slots.done_b) + stuck
        more = (idle < wake) & (idle < program.slots) & (stuck <= stuck_before)
        return (step < program.round_steps) & more

    floats = jnp.zeros(shape, jnp.float32)
    begin = (0, state, (jnp.zeros(shape, jnp.int32), floats, floats))
    _, state, (token_rb, logprob_rb, drawn_rb) = jax.lax.while_loop(proceed, body, begin)
    slots, stuck_b = state.slots, _stuck(state, room_b)
    seen = Round(
        token_rb, logprob_rb, drawn_rb, slots.count_b, slots.done_b, stuck_b, slots.broken_b
    )
    return _shard(program, state), _replicate(program, seen)


def _stuck(state: State, room_b: jax.Array) -> jax.Array:
    """Slots that have more to say than their pages have room for."""
    return ~state.slots.done_b & (state.cache.lengths_b >= room_b)


def _decode_step(
    program: Program, params: Params, state: State, table: PageTable, room_b: jax.Array
) -> tuple[State, Drawn]:
    """One token for every live slot; the others compute along and change nothing."""
    slots, old = state.slots, state.cache
    live_b = ~slots.done_b & ~_stuck(state, room_b)
    hidden_bd, cache = decode(program.model, program.pages, params, slots.token_b, old, table)
    cache = cache._replace(lengths_b=jnp.where(live_b, cache.lengths_b, old.lengths_b))
    drawn = _draw(program, params, hidden_bd, slots)
    fresh = _advance(program, slots, drawn)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(live_b, new, old)

    slots = slots._replace(
        token_b=keep(fresh.token_b, slots.token_b),
        count_b=keep(fresh.count_b, slots.count_b),
        done_b=keep(fresh.done_b, slots.done_b),
        broken_b=keep(fresh.broken_b, slots.broken_b),
    )
    return _shard(program, State(cache, slots)), drawn


def _advance(program: Program, slots: Slots, drawn: Drawn) -> Slots:
    """The slots with one more token each."""
    count_b = slots.count_b + drawn.finite_b
    at_end = _is_end(program, drawn.token_b)
    return slots._replace(
        token_b=drawn.token_b,
        count_b=count_b,
        done_b=at_end | (count_b >= slots.limit_b) | ~drawn.finite_b,
        broken_b=~drawn.finite_b,
    )


def _draw(program: Program, params: Params, hidden_bd: jax.Array, slots: Slots) -> Drawn:
    uses = program.uses
    logits_bv = logits(program.model, params, hidden_bd)
    bent_bv = bend(_without_end(program, logits_bv, slots), slots.transform, uses)
    # Laid out as the rows of the logits are. Else the loops of the noise gather them, and processes
    # on CPUs may meet in different collectives (tests/collective_order.py).
    keys_b = spread_rows(program.mesh, token_keys(slots.base_b, slots.count_b))
    token_b = draw(keys_b, bent_bv, slots.transform.temperature_b == 0, uses)
    logprob_b = _logprob(logits_bv, token_b)
    drawn_b = _logprob(bent_bv, token_b) if uses.bends else logprob_b
    if uses.temperature:  # of a greedy row, tied maxima aside, all mass is on the token
        drawn_b = jnp.where(slots.transform.temperature_b == 0, 0.0, drawn_b)
    return Drawn(token_b, logprob_b, drawn_b, jnp.all(jnp.isfinite(logits_bv), axis=-1))


def _logprob(logits_bv: jax.Array, token_b: jax.Array) -> jax.Array:
    chosen_b = jnp.take_along_axis(logits_bv, token_b[:, None], axis=-1)[:, 0]
    return chosen_b - jax.nn.logsumexp(logits_bv, axis=-1)


def _without_end(program: Program, logits_bv: jax.Array, slots: Slots) -> jax.Array:
    """Logits, with end tokens cut off where a sample has fewer than its least number of tokens."""
    if not program.uses.floor or not program.end_ids:
        return logits_bv
    ids = jnp.arange(logits_bv.shape[-1])
    early_b = slots.count_b < slots.least_b
    cut_bv = early_b[:, None] & _is_end(program, ids)[None, :]
    return jnp.where(cut_bv, -jnp.inf, logits_bv)


def _is_end(program: Program, token_b: jax.Array) -> jax.Array:
    end = jnp.array(program.end_ids, jnp.int32)
    return jnp.any(token_b[:, None] == end[None, :], axis=-1)


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
