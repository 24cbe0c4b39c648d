"""One new token per row against a key-value cache, written in place.

The layers are unrolled over separate arrays. A scan over stacked weights and a stacked cache would
copy each layer's slice of both at every step, which costs more than reading them once. Within a
layer the new token is written before the cache is read: only in this order can XLA reuse the
cache's memory.

The cache has rows of several lengths. Rows of one length are a tier, with arrays of its own; the
products with weights run over all rows at once, attention runs tier by tier. On a mesh the rows
are [shards, rows of a shard], and every shard has its part of each tier:

    tiers          ((2, 64), (1, 256))    two rows of 64 tokens and one of 256 in every shard
    row            0  1 | 2 | 3  4 | 5
    row of tier 0  0  1 |   | 2  3 |
    row of tier 1       | 0 |      | 1
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.core.mesh import platform_of
from opd_jax.model.attention import attend_cached
from opd_jax.model.rope import rope_tables
from opd_jax.model.spread import hidden_cuts, spread_experts, spread_rows, spread_weight
from opd_jax.model.transformer import (
    LanguageModel,
    Mixed,
    Params,
    cast,
    layer_runs,
    rms_norm,
    run_layer,
)

GROUPS = 4  # a product of one row with a weight is cut so on CPUs, which then use all their cores
Pair = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Tiers:
    """How many rows of which length a cache has: static in compiled programs.

    Attributes:
        rows: of each tier in one shard.
        lengths: tokens that a row of each tier holds, ascending.
        shards: ways that the rows are cut over a mesh.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    shards: int = 1

    @property
    def total(self) -> int:
        """All rows."""
        return self.shards * sum(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens for which there is room."""
        return self.shards * sum(n * s for n, s in zip(self.rows, self.lengths, strict=True))

    def tier_of(self, row: int) -> int:
        """The tier of a row."""
        ends = itertools.accumulate(self.rows)
        return next(tier for tier, end in enumerate(ends) if row % sum(self.rows) < end)

    def split(self, x_b: jax.Array) -> tuple[jax.Array, ...]:
        """An array of all rows as one per tier."""
        cut = x_b.reshape(self.shards, -1, *x_b.shape[1:])
        ends = [sum(self.rows[:i]) for i in range(len(self.rows) + 1)]
        return tuple(cut[:, a:b].reshape(-1, *x_b.shape[1:]) for a, b in itertools.pairwise(ends))

    def join(self, parts: tuple[jax.Array, ...]) -> jax.Array:
        """The inverse of `split`."""
        if len(parts) == 1:
            return parts[0]
        rest = parts[0].shape[1:]
        cut = jnp.concatenate([x.reshape(self.shards, -1, *rest) for x in parts], axis=1)
        return cut.reshape(-1, *rest)


class DecodeCache(NamedTuple):
    """Keys and values of the tokens so far; row b holds `lengths_b[b]` of them, from position 0."""

    keys: tuple[tuple[jax.Array, ...], ...]  # of each layer and tier: [rows, k, h, length]
    values: tuple[tuple[jax.Array, ...], ...]  # [rows, k, length, h]
    lengths_b: jax.Array


def empty_cache(model: LanguageModel, tiers: Tiers) -> DecodeCache:
    """Room for tokens, none stored yet."""
    k, h = model.arch.num_kv_heads, model.arch.head_dim

    def arrays(*, transposed: bool) -> tuple[tuple[jax.Array, ...], ...]:
        shapes = [
            (tiers.shards * n, k, *((h, s) if transposed else (s, h)))
            for n, s in zip(tiers.rows, tiers.lengths, strict=True)
        ]
        zeros = [[jnp.zeros(x, model.compute_dtype) for x in shapes]] * model.arch.num_layers
        return tuple(tuple(layer) for layer in zeros)

    lengths_b = jnp.zeros((tiers.total,), jnp.int32)
    return DecodeCache(arrays(transposed=True), arrays(transposed=False), lengths_b)


def cache_token_bytes(model: LanguageModel) -> int:
    """Bytes of one token's keys and values in all layers."""
    arch = model.arch
    width = jnp.dtype(model.compute_dtype).itemsize
    return 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * width


def insert_rows(
    tiers: Tiers, cache: DecodeCache, new: Pair, rows_p: jax.Array, lengths_p: jax.Array
) -> DecodeCache:
    """Put whole prompts into rows of the cache.

    Args:
        new: keys and values as `forward` returns them, each [l, p, t, k, h].
        rows_p: int32, where each prompt goes; a row beyond the last drops its prompt.
        lengths_p: int32, tokens of each prompt; what follows them is never read.
    """
    places = _places(tiers, rows_p)

    def put(old: jax.Array, place_p: jax.Array, fresh: jax.Array, time: int) -> jax.Array:
        t = min(fresh.shape[time], old.shape[time])  # a longer prompt is not put into this tier
        fresh = jax.lax.slice_in_dim(fresh, 0, t, axis=time)
        target = old.at[place_p, :, :, :t] if time == 3 else old.at[place_p, :, :t]
        return target.set(fresh, mode="drop")

    def layers(
        olds: tuple[tuple[jax.Array, ...], ...], fresh: jax.Array, time: int
    ) -> tuple[tuple[jax.Array, ...], ...]:
        return tuple(
            tuple(put(old, place, fresh[i], time) for old, place in zip(layer, places, strict=True))
            for i, layer in enumerate(olds)
        )

    keys = layers(cache.keys, jnp.transpose(new[0], (0, 1, 3, 4, 2)), 3)
    values = layers(cache.values, jnp.transpose(new[1], (0, 1, 3, 2, 4)), 2)
    lengths_b = cache.lengths_b.at[rows_p].set(lengths_p, mode="drop")
    return DecodeCache(keys, values, lengths_b)


def move_rows(tiers: Tiers, cache: DecodeCache, from_m: jax.Array, to_m: jax.Array) -> DecodeCache:
    """Copy rows into rows of longer tiers; a row beyond the last moves nothing."""
    sources, targets = _places(tiers, from_m), _places(tiers, to_m)

    def moved(olds: tuple[jax.Array, ...], time: int) -> tuple[jax.Array, ...]:
        new = list(olds)
        for i, source in enumerate(olds):
            rows = source.at[sources[i]].get(mode="clip")
            at_i = sources[i] < source.shape[0]
            for j in range(i + 1, len(olds)):
                place = jnp.where(at_i, targets[j], olds[j].shape[0])
                length = source.shape[time]
                if time == 3:
                    target = new[j].at[place, :, :, :length]
                else:
                    target = new[j].at[place, :, :length]
                new[j] = target.set(rows, mode="drop")
        return tuple(new)

    keys = tuple(moved(layer, 3) for layer in cache.keys)
    values = tuple(moved(layer, 2) for layer in cache.values)
    length_m = cache.lengths_b.at[from_m].get(mode="clip")
    return DecodeCache(keys, values, cache.lengths_b.at[to_m].set(length_m, mode="drop"))


def _places(tiers: Tiers, rows_p: jax.Array) -> tuple[jax.Array, ...]:
    """For each tier where these rows lie in it; beyond its last row for those of other tiers."""
    per_shard = sum(tiers.rows)
    shard_p, index_p = rows_p // per_shard, rows_p % per_shard
    places, start = [], 0
    for count in tiers.rows:
        own_p = (index_p >= start) & (index_p < start + count) & (rows_p < tiers.total)
        place_p = shard_p * count + index_p - start
        places.append(jnp.where(own_p, place_p, tiers.shards * count))
        start += count
    return tuple(places)


@functools.partial(jax.jit, static_argnums=0)
def split_layers(model: LanguageModel, params: Params) -> Params:
    """Parameters as `decode` wants them: in the compute dtype, `layers` a tuple, one per layer.

    Weights are [outputs, inputs], as the output head is: products with few rows read them faster.
    On a mesh they lie as `model.spread` says. This is a copy: it costs one more set of weights in
    memory while a sampler runs.
    """
    params = cast(params, model.compute_dtype)

    def leaf(name: str, x: jax.Array) -> jax.Array:
        if x.ndim == 3 and name.startswith("w_"):
            return spread_experts(model.mesh, name, x)
        if name not in _CONTRACTED:
            return x
        ins = _CONTRACTED[name]
        order = (*range(ins, x.ndim), *range(ins))
        return spread_weight(model.mesh, name, jnp.transpose(x, order))

    layers = tuple(
        {name: leaf(name, x[i]) for name, x in run.items()}
        for run in layer_runs(model.arch, params)
        for i in range(len(run["attn_norm"]))
    )
    tables = {n: spread_weight(model.mesh, n, params[n]) for n in ("embed", "head") if n in params}
    return {**tables, "final_norm": params["final_norm"], "layers": layers}


_CONTRACTED = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w_gate": 1, "w_up": 1, "w_down": 1}
"""Leading axes of a layer's weights that are inputs."""


def product(mesh: Mesh | None, x: jax.Array, weight: jax.Array, contracted: int = 1) -> jax.Array:
    """The last axes of `x` with the last of `weight`, [outputs, inputs]; sums are float32."""
    kept, outs = x.shape[: x.ndim - contracted], weight.shape[: weight.ndim - contracted]
    # As matrices: products of other ranks make XLA copy the weight for CPUs.
    x_bd = x.reshape(math.prod(kept), -1)
    weight_fd = weight.reshape(math.prod(outs), -1)
    if len(x_bd) == 1 and len(weight_fd) % GROUPS == 0 and platform_of(mesh) == "cpu":
        weight_gfd = weight_fd.reshape(GROUPS, -1, weight_fd.shape[1])
        x_gd = jnp.broadcast_to(x_bd, (GROUPS, x_bd.shape[1]))
        out = _dot(weight_gfd, x_gd, (((2,), (1,)), ((0,), (0,))))
    else:
        out = _dot(x_bd, weight_fd, (((1,), (1,)), ((), ())))
    return out.reshape(*kept, *outs)


def _dot(x: jax.Array, y: jax.Array, numbers: jax.lax.DotDimensionNumbers) -> jax.Array:
    return jax.lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)


def logits(model: LanguageModel, params: Params, hidden_bd: jax.Array) -> jax.Array:
    """float32 [b, v].

    Args:
        params: of `split_layers`.
    """
    head_vd = params["embed"] if model.arch.tie_embeddings else params["head"]
    return spread_rows(
        model.mesh, product(model.mesh, spread_rows(model.mesh, hidden_bd), head_vd), 1
    )


def decode(
    model: LanguageModel, tiers: Tiers, params: Params, tokens_b: jax.Array, cache: DecodeCache
) -> tuple[jax.Array, DecodeCache]:
    """Add one token to each row.

    Args:
        params: of `split_layers`.
        tokens_b: int32, the token at position `cache.lengths_b` of each row.
        cache: with room for it: `lengths_b` below the length of the row's tier. What lies beyond
            `lengths_b` is overwritten.

    Returns:
        hidden_bd after the final norm, and the cache that holds the token.
    """
    arch, lengths_b = model.arch, cache.lengths_b
    x_btd = jnp.take(params["embed"], tokens_b[:, None], axis=0)
    rope = rope_tables(lengths_b[:, None], arch)

    def times(x: jax.Array, weight: jax.Array, contracted: int = 1) -> jax.Array:
        return product(model.mesh, x, weight, contracted).astype(x.dtype)

    spread = None if model.mesh is None else hidden_cuts(model.mesh, arch.expert_ffn_dim)
    kept: list[tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]] = []
    for layer, keys, values in zip(params["layers"], cache.keys, cache.values, strict=True):

        def mix(
            q_btnh: jax.Array,
            k_btkh: jax.Array,
            v_btkh: jax.Array,
            old: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]] = (keys, values),
        ) -> Mixed:
            mixed, written = _write_and_attend(tiers, old, lengths_b, (q_btnh, k_btkh, v_btkh))
            return spread_rows(model.mesh, mixed, 2), written

        x_btd = spread_rows(model.mesh, x_btd)
        x_btd, written, _ = run_layer(model, layer, x_btd, rope, mix, times=times, spread=spread)
        kept.append(written)
    hidden_btd = rms_norm(x_btd, params["final_norm"], arch.norm_eps)
    all_keys, all_values = zip(*kept, strict=True)
    return hidden_btd[:, 0], DecodeCache(all_keys, all_values, lengths_b + 1)


def _write_and_attend(
    tiers: Tiers,
    old: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]],
    lengths_b: jax.Array,
    new: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]:
    queries, fresh_keys, fresh_values = (tiers.split(x) for x in new)
    keys, values, mixed = [], [], []
    parts = zip(*old, tiers.split(lengths_b), queries, fresh_keys, fresh_values, strict=True)
    for old_keys, old_values, length_b, q_btnh, k_btkh, v_btkh in parts:
        keys.append(_write(old_keys, k_btkh[:, 0], length_b, 3))
        values.append(_write(old_values, v_btkh[:, 0], length_b, 2))
        mixed.append(attend_cached(q_btnh, keys[-1], values[-1], length_b + 1))
    return tiers.join(tuple(mixed)), (tuple(keys), tuple(values))


def _write(cache: jax.Array, new_bkh: jax.Array, length_b: jax.Array, time: int) -> jax.Array:
    """Each row's new keys or values at its length, along axis `time`, in place.

    In bounds by the contract of `decode`: a mode that checks makes XLA copy the cache, and so does
    a scatter into one row.
    """
    if len(length_b) == 1:
        return jax.lax.dynamic_update_slice_in_dim(
            cache, jnp.expand_dims(new_bkh, time), length_b[0], time
        )
    rows_b = jnp.arange(len(length_b))
    target = cache.at[rows_b, :, :, length_b] if time == 3 else cache.at[rows_b, :, length_b]
    return target.set(new_bkh, mode="promise_in_bounds", unique_indices=True)
