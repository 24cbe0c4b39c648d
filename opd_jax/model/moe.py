"""Mixture of experts: routing, the experts over a mesh, and what balances them.

Every token reaches all its experts: there is no capacity and nothing is dropped. `model.experts`
has the products, in the form that the platform computes well.

On a mesh the experts lie over the axis `expert`, over which batch rows are cut as well (attention
would be repeated otherwise). Around the experts, the rows of one `expert` group are gathered; each
device multiplies the pairs of its own experts; the sum over the group is scattered back to rows. On
TPUs the buffers hold every pair of the group, for all may choose one device; elsewhere there are
none, and a device's work follows the pairs that chose it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from opd_jax.core.mesh import platform_of, sharding_for
from opd_jax.model.architecture import Architecture
from opd_jax.model.experts import Product, Weights, product_on

_ROWS = ("batch", "time", "replicated")
_IN_AXES = ("experts", "replicated", "ffn")
_OUT_AXES = ("experts", "ffn", "replicated")


class Routing(NamedTuple):
    """Where tokens go. Experts of one token are distinct."""

    prob_bte: jax.Array  # float32, over all experts
    weight_bts: jax.Array  # float32, of the chosen ones (s: experts_per_token)
    expert_bts: jax.Array  # int32


class RouterSums(NamedTuple):
    """Plain sums over counted tokens, float32, one row per sparse layer."""

    assigned_le: jax.Array  # tokens that chose each expert
    probability_le: jax.Array
    entropy_l: jax.Array  # nats
    tokens_l: jax.Array


def route(arch: Architecture, router_de: jax.Array, x_btd: jax.Array) -> Routing:
    """Softmax over all experts in float32, then the likeliest `experts_per_token`."""
    logit_bte = jnp.einsum("btd,de->bte", x_btd, router_de, preferred_element_type=jnp.float32)
    prob_bte = jax.nn.softmax(logit_bte, axis=-1)
    weight_bts, expert_bts = jax.lax.top_k(prob_bte, arch.experts_per_token)
    if arch.norm_topk_prob:
        weight_bts = weight_bts / jnp.sum(weight_bts, axis=-1, keepdims=True)
    return Routing(prob_bte, weight_bts, expert_bts)


def moe_mlp(
    arch: Architecture,
    layer: dict[str, jax.Array],
    x_btd: jax.Array,
    mesh: Mesh | None,
    counted_bt: jax.Array | None,
    spread: tuple[str, ...] | None = None,
) -> tuple[jax.Array, RouterSums]:
    """The experts' weighted outputs, and this layer's `RouterSums` (without the axis `l`).

    Args:
        layer: `router` [d, e], `w_gate` and `w_up` [e, d, f], `w_down` [e, f, d].
        counted_bt: bool, tokens that the sums count; `None`: all.
        spread: mesh axes that cut the hidden units of an expert; rows are then cut over `data`
            alone. `None`: everything lies as in training.

    Raises:
        ConfigError: the mesh does not divide the rows.
    """
    routing = route(arch, layer["router"], x_btd)
    weights = (layer["w_gate"], layer["w_up"], layer["w_down"])
    pairs = (x_btd, routing.weight_bts, routing.expert_bts)
    if mesh is None or mesh.size == 1:
        product = product_on(platform_of(mesh), routing.expert_bts.size, arch.num_experts)
        out_btd = _experts(product, pairs, Weights(*weights), first=0)
    else:
        on_mesh = _experts_on_mesh if spread is None else functools.partial(_spread_experts, spread)
        out_btd = on_mesh(mesh, pairs, weights)
    return out_btd.astype(x_btd.dtype), router_sums(routing, counted_bt)


def _experts_on_mesh(
    mesh: Mesh, pairs: tuple[jax.Array, ...], weights: tuple[jax.Array, ...]
) -> jax.Array:
    experts = weights[0].shape[0]

    def body(*local: jax.Array) -> jax.Array:
        gathered = [jax.lax.all_gather(x, "expert", axis=0, tiled=True) for x in local[:3]]
        first = jax.lax.axis_index("expert") * local[3].shape[0]
        product = product_on(platform_of(mesh), gathered[2].size, experts)
        out_btd = jax.lax.psum(_experts(product, gathered, Weights(*local[3:]), first), "tensor")
        return jax.lax.psum_scatter(out_btd, "expert", scatter_dimension=0, tiled=True)

    def spec(x: jax.Array, axes: tuple[str, ...], name: str) -> PartitionSpec:
        return sharding_for(mesh, axes, x.shape, name).spec

    rows = [spec(x, _ROWS, "tokens of the experts") for x in pairs]
    cuts = (_IN_AXES, _IN_AXES, _OUT_AXES)
    held = [spec(x, axes, "experts") for x, axes in zip(weights, cuts, strict=True)]
    return jax.shard_map(body, mesh=mesh, in_specs=(*rows, *held), out_specs=rows[0])(
        *pairs, *weights
    )


def _spread_experts(
    cuts: tuple[str, ...], mesh: Mesh, pairs: tuple[jax.Array, ...], weights: tuple[jax.Array, ...]
) -> jax.Array:
    """Few rows, that every device of an `expert` group has already: no weight is sent."""
    experts = weights[0].shape[0]

    def body(*local: jax.Array) -> jax.Array:
        first = jax.lax.axis_index("expert") * local[3].shape[0]
        product = product_on(platform_of(mesh), local[2].size, experts)
        out_btd = _experts(product, local[:3], Weights(*local[3:]), first)
        return jax.lax.psum(out_btd, (*cuts, "expert"))

    rows = PartitionSpec("data")
    into, out_of = PartitionSpec("expert", None, cuts), PartitionSpec("expert", cuts)
    return jax.shard_map(
        body, mesh=mesh, in_specs=(rows, rows, rows, into, into, out_of), out_specs=rows
    )(*pairs, *weights)


def _experts(
    product: Product, pairs: Sequence[jax.Array], weights: Weights, first: int | jax.Array
) -> jax.Array:
    """float32 [b, t, d]: what the held experts, `first` and those after it, add to each token."""
    x_btd, weight_bts, expert_bts = pairs
    s = expert_bts.shape[-1]
    x_td, weight_ts = x_btd.reshape(-1, x_btd.shape[-1]), weight_bts.reshape(-1, s)
    return product(x_td, weight_ts, expert_bts.reshape(-1, s) - first, weights).reshape(x_btd.shape)


def router_sums(routing: Routing, counted_bt: jax.Array | None) -> RouterSums:
    """Sums over the counted tokens of one layer."""
    prob_bte = routing.prob_bte
    experts = prob_bte.shape[-1]
    every = jnp.ones(prob_bte.shape[:2], bool)
    keep_bt1 = (every if counted_bt is None else counted_bt)[..., None]
    weight_bt1 = keep_bt1.astype(jnp.float32)
    chosen_bte = jnp.sum(jax.nn.one_hot(routing.expert_bts, experts, dtype=jnp.float32), axis=2)
    entropy_bte = -prob_bte * jnp.log(jnp.maximum(prob_bte, jnp.finfo(jnp.float32).tiny))
    return RouterSums(
        jnp.sum(chosen_bte * weight_bt1, axis=(0, 1)),
        jnp.sum(jnp.where(keep_bt1, prob_bte, 0), axis=(0, 1)),
        jax.lax.stop_gradient(jnp.sum(jnp.where(keep_bt1, entropy_bte, 0))),
        jnp.sum(weight_bt1),
    )


def balance_loss(sums: RouterSums) -> jax.Array:
    """experts * sum_e(share of tokens at e * mean probability of e); experts_per_token when even.

    Layers are pooled, as transformers' `load_balancing_loss_func` does.

    Source: Switch Transformer, arXiv 2101.03961, equations 4 to 6.
    """
    tokens = jnp.maximum(jnp.sum(sums.tokens_l), 1.0)
    share_e = jax.lax.stop_gradient(jnp.sum(sums.assigned_le, axis=0) / tokens)
    probability_e = jnp.sum(sums.probability_le, axis=0) / tokens
    return share_e.shape[0] * jnp.sum(share_e * probability_e)


def router_metrics(sums: RouterSums) -> dict[str, jax.Array]:
    """Means over layers: share of tokens at the most loaded expert, and entropy in nats."""
    tokens_l = jnp.maximum(sums.tokens_l, 1.0)
    load_l = jnp.max(sums.assigned_le, axis=-1) / tokens_l
    metrics = {
        "router_max_load": jnp.mean(load_l),
        "router_entropy": jnp.mean(sums.entropy_l / tokens_l),
        "router_balance": balance_loss(sums),
    }
    return jax.tree.map(jax.lax.stop_gradient, metrics)
