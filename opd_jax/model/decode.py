"""One new token per row against a key-value cache, written in place.

The layers are unrolled over separate arrays. A scan over stacked weights and a stacked cache would
copy each layer's slice of both at every step, which costs more than reading them once. Within a
layer the new token is written before the cache is read: only in this order can XLA reuse the
cache's memory.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.core.mesh import platform_of
from opd_jax.model.cache import Layer, PagedCache, Pages, PageTable, write_and_attend
from opd_jax.model.linear import CONTRACTED
from opd_jax.model.norm import rms_norm
from opd_jax.model.rope import rope_tables
from opd_jax.model.spread import hidden_cuts, spread_experts, spread_rows, spread_weight
from opd_jax.model.transformer import (
    LanguageModel,
    Mixed,
    Params,
    cast,
    layer_runs,
    run_layer,
)

FEW_ROWS = 16  # with no more, weights are left factors on CPUs: XLA's library copies right ones
PADDED = -1e30  # without probability, but finite: an infinite logit would mean a broken model
GROUPS = 4  # a product of one row with a weight is cut so on CPUs, which then use all their cores


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
        if name not in CONTRACTED:
            return x
        ins = CONTRACTED[name]
        order = (*range(ins, x.ndim), *range(ins))
        return spread_weight(model.mesh, name, jnp.transpose(x, order))

    layers = tuple(
        _joined(model.mesh, {name: leaf(name, x[i]) for name, x in run.items()})
        for run, _ in layer_runs(model.arch, params)
        for i in range(len(run["attn_norm"]))
    )
    tables = {n: spread_weight(model.mesh, n, params[n]) for n in ("embed", "head") if n in params}
    return {**tables, "final_norm": params["final_norm"], "layers": layers}


def _joined(mesh: Mesh | None, layer: Params) -> Params:
    """Weights of the same input as one, where no mesh cuts them: large products read faster."""
    if mesh is not None and mesh.size > 1:
        return layer
    layer = dict(layer)
    layer["w_qkv"] = jnp.concatenate([layer.pop(name) for name in ("wq", "wk", "wv")])
    if "router" not in layer:
        layer["w_gate_up"] = jnp.concatenate([layer.pop(name) for name in ("w_gate", "w_up")])
    return layer


def product(mesh: Mesh | None, x: jax.Array, weight: jax.Array, contracted: int = 1) -> jax.Array:
    """The last axes of `x` with the last of `weight`, [outputs, inputs]; sums are float32."""
    kept, outs = x.shape[: x.ndim - contracted], weight.shape[: weight.ndim - contracted]
    # As matrices: products of other ranks make XLA copy the weight for CPUs.
    x_bd = x.reshape(math.prod(kept), -1)
    weight_fd = weight.reshape(math.prod(outs), -1)
    if platform_of(mesh) != "cpu" or len(x_bd) > FEW_ROWS:
        out_bf = _dot(x_bd, weight_fd, _LAST)
    elif len(x_bd) > 1 or len(weight_fd) % GROUPS:
        # The barrier keeps XLA from turning the factors round again.
        out_bf = jax.lax.optimization_barrier(_dot(weight_fd, x_bd, _LAST)).T
    else:
        weight_gfd = weight_fd.reshape(GROUPS, -1, weight_fd.shape[1])
        x_gd = jnp.broadcast_to(x_bd, (GROUPS, x_bd.shape[1]))
        out_bf = _dot(weight_gfd, x_gd, (((2,), (1,)), ((0,), (0,))))
    return out_bf.reshape(*kept, *outs)


_LAST: jax.lax.DotDimensionNumbers = (((1,), (1,)), ((), ()))


def _dot(x: jax.Array, y: jax.Array, numbers: jax.lax.DotDimensionNumbers) -> jax.Array:
    return jax.lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)


def logits(model: LanguageModel, params: Params, hidden_bd: jax.Array) -> jax.Array:
    """float32 [b, v]; `PADDED` where the vocabulary is only padded.

    Args:
        params: of `split_layers`.
    """
    head_vd = params["embed"] if model.arch.tie_embeddings else params["head"]
    logits_bv = spread_rows(
        model.mesh, product(model.mesh, spread_rows(model.mesh, hidden_bd), head_vd), 1
    )
    if model.padded_from is None:
        return logits_bv
    token_v = jnp.arange(logits_bv.shape[1]) < model.padded_from
    return jnp.where(token_v[None, :], logits_bv, PADDED)


def decode(
    model: LanguageModel,
    pages: Pages,
    params: Params,
    tokens_b: jax.Array,
    cache: PagedCache,
    table: PageTable,
) -> tuple[jax.Array, PagedCache]:
    """Add one token to each row.

    Args:
        params: of `split_layers`.
        tokens_b: int32, the token at position `cache.lengths_b` of each row.
        cache: what lies beyond `lengths_b` is overwritten.
        table: a row without a page for its token stores nothing, and its output means nothing.

    Returns:
        hidden_bd after the final norm, and the cache that holds the token.
    """
    arch, lengths_b = model.arch, cache.lengths_b
    x_btd = jnp.take(params["embed"], tokens_b[:, None], axis=0)
    rope = rope_tables(lengths_b[:, None], arch)

    def times(x: jax.Array, weight: jax.Array, contracted: int = 1) -> jax.Array:
        return product(model.mesh, x, weight, contracted).astype(x.dtype)

    spread = None if model.mesh is None else hidden_cuts(model.mesh, arch.expert_ffn_dim)
    kept: list[tuple[Layer, Layer]] = []
    for layer, keys, values in zip(params["layers"], cache.keys, cache.values, strict=True):

        def mix(
            q_btnh: jax.Array,
            k_btkh: jax.Array,
            v_btkh: jax.Array,
            old: tuple[Layer, Layer] = (keys, values),
        ) -> Mixed:
            new = (q_btnh, k_btkh, v_btkh)
            mixed, written = write_and_attend(pages, table, old, lengths_b, new)
            return spread_rows(model.mesh, mixed, 2), written

        x_btd = spread_rows(model.mesh, x_btd)
        x_btd, written, _ = run_layer(model, layer, x_btd, rope, mix, times=times, spread=spread)
        kept.append(written)
    hidden_btd = rms_norm(x_btd, params["final_norm"], arch.norm_eps)
    all_keys, all_values = zip(*kept, strict=True)
    return hidden_btd[:, 0], PagedCache(all_keys, all_values, lengths_b + 1)
