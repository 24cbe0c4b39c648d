"""One new token per row against a key-value cache, written in place.

The layers are unrolled over separate arrays. A scan over stacked weights and a stacked cache would
copy each layer's slice of both at every step, which costs more than reading them once. Within a
layer the new token is written before the cache is read: only in this order can XLA reuse the
cache's memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.model.attention import attend_cached
from opd_jax.model.rope import rope_tables
from opd_jax.model.transformer import (
    LanguageModel,
    Mixed,
    Params,
    cast,
    layer_runs,
    rms_norm,
    run_layer,
)


class DecodeCache(NamedTuple):
    """Keys and values of the tokens so far; row b holds `lengths_b[b]` of them, from position 0."""

    keys: tuple[jax.Array, ...]  # of each layer: [b, k, s, h]
    values: tuple[jax.Array, ...]
    lengths_b: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def split_layers(model: LanguageModel, params: Params) -> Params:
    """Parameters as `decode` wants them: in the compute dtype, `layers` a tuple, one per layer.

    A layer's MLP or experts lie beside its attention. This is a copy: it costs one more set of
    weights in memory while a sampler runs.
    """
    params = cast(params, model.compute_dtype)
    layers = tuple(
        jax.tree.map(lambda x, i=i: x[i], run)
        for run in layer_runs(model.arch, params)
        for i in range(len(run["attn_norm"]))
    )
    whole = {name: params[name] for name in ("embed", "final_norm", "head") if name in params}
    return {**whole, "layers": layers}


def empty_cache(model: LanguageModel, rows: int, length: int) -> DecodeCache:
    """Room for `length` tokens in each of `rows` rows, none stored yet."""
    arch = model.arch
    shape = (rows, arch.num_kv_heads, length, arch.head_dim)
    keys, values = (
        tuple(jnp.zeros(shape, model.compute_dtype) for _ in range(arch.num_layers))
        for _ in range(2)
    )
    return DecodeCache(keys, values, jnp.zeros((rows,), jnp.int32))


def insert_rows(
    cache: DecodeCache,
    new: tuple[jax.Array, jax.Array],
    rows_p: jax.Array,
    lengths_p: jax.Array,
) -> DecodeCache:
    """Put whole prompts into rows of the cache.

    Args:
        new: keys and values as `forward` returns them, each [l, p, t, k, h].
        rows_p: int32, where each prompt goes; a row beyond the last drops its prompt.
        lengths_p: int32, tokens of each prompt; what follows them is never read.
    """

    def put(old: jax.Array, new_ptkh: jax.Array) -> jax.Array:
        t = new_ptkh.shape[1]
        return old.at[rows_p, :, :t].set(jnp.swapaxes(new_ptkh, 1, 2), mode="drop")

    keys, values = (
        tuple(put(layer, fresh[i]) for i, layer in enumerate(old))
        for old, fresh in zip((cache.keys, cache.values), new, strict=True)
    )
    lengths_b = cache.lengths_b.at[rows_p].set(lengths_p, mode="drop")
    return DecodeCache(keys, values, lengths_b)


def decode(
    model: LanguageModel, params: Params, tokens_b: jax.Array, cache: DecodeCache
) -> tuple[jax.Array, DecodeCache]:
    """Add one token to each row.

    Args:
        params: of `split_layers`.
        tokens_b: int32, the token at position `cache.lengths_b` of each row.
        cache: with room for it: `lengths_b` below its length.

    Returns:
        hidden_bd after the final norm, and the cache that holds the token.
    """
    arch, lengths_b = model.arch, cache.lengths_b
    x_btd = jnp.take(params["embed"], tokens_b[:, None], axis=0)
    rope = rope_tables(lengths_b[:, None], arch)
    kept: list[tuple[jax.Array, jax.Array]] = []
    for layer, keys, values in zip(params["layers"], cache.keys, cache.values, strict=True):
        mix = functools.partial(_write_and_attend, (keys, values), lengths_b)
        x_btd, written, _ = run_layer(model, layer, x_btd, rope, mix)
        kept.append(written)
    hidden_btd = rms_norm(x_btd, params["final_norm"], arch.norm_eps)
    all_keys, all_values = zip(*kept, strict=True)
    return hidden_btd[:, 0], DecodeCache(all_keys, all_values, lengths_b + 1)


def _write_and_attend(
    old: tuple[jax.Array, jax.Array],
    lengths_b: jax.Array,
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
) -> Mixed:
    rows_b = jnp.arange(lengths_b.shape[0])
    keys, values = (
        cache.at[rows_b, :, lengths_b].set(new[:, 0], mode="promise_in_bounds", unique_indices=True)
        for cache, new in zip(old, (k_btkh, v_btkh), strict=True)
    )
    return attend_cached(q_btnh, keys, values, lengths_b + 1), (keys, values)
