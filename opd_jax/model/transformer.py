"""The decoder of the Llama, Qwen2 and Qwen3 families: one forward for training and sampling.

Each parameter is declared once, with shape, logical axes and initialiser side by side; abstract
shapes, initial values and shardings follow from it. Attention and norms of all layers are stacked
in `layers`, the MLPs of dense layers in `dense`, the experts of sparse layers in `moe`. Runs of
layers of one kind are scanned, so depth costs no compile time. At the border of every jitted
function parameters are a plain nested dict of arrays.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from opd_jax.core.in_order import complete_first
from opd_jax.core.mesh import constrain, sharding_for
from opd_jax.model.architecture import Architecture
from opd_jax.model.attention_choice import attend_rows
from opd_jax.model.embedding import embed
from opd_jax.model.gradient_sums import sum_gradients
from opd_jax.model.linear import linear
from opd_jax.model.moe import RouterSums, moe_mlp
from opd_jax.model.norm import rms_norm
from opd_jax.model.remat import LAYER_INPUT, remat
from opd_jax.model.rope import RopeTables, rope_tables, rotate

Params = dict[str, Any]
Mixed = tuple[jax.Array, Any]
"""The attention output, and what to keep of keys and values."""
Carry = tuple[jax.Array, Params | None]
"""Of the layers: hidden states, and `sums`."""
HIDDEN_AXES = ("batch", "time", "replicated")


class ForwardOutput(NamedTuple):
    """Hidden states after the final norm, the new tokens' keys and values, and router sums."""

    hidden_btd: jax.Array
    keys: jax.Array  # [l, b, t, k, h]
    values: jax.Array  # [l, b, t, k, h]
    router: RouterSums | None  # with sparse layers
    head_vd: jax.Array
    """`LanguageModel.head_parameter`. A loss reads it from here: a tied embedding's gradients as
    input and as head are then one array."""
    sums: Params | None  # those given


def _weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int
) -> nnx.Param[jax.Array]:
    value = jax.random.normal(rngs.params(), shape) * fan_in**-0.5
    return nnx.Param(value, axes=axes, decay=True)


def _constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param[jax.Array]:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes, decay=False)


class Layers(nnx.Module):
    """Attention and norms of all layers, stacked: every parameter has a leading axis `l`."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs) -> None:
        depth, d = arch.num_layers, arch.embed_dim
        n, k, h = arch.num_heads, arch.num_kv_heads, arch.head_dim
        q_axes = ("layers", "embed", "heads", "head_dim")
        kv_axes = ("layers", "embed", "kv_heads", "head_dim")
        self.attn_norm = _constant(1.0, (depth, d), ("layers", "norm"))
        self.wq = _weight(rngs, (depth, d, n, h), q_axes, d)
        self.wk = _weight(rngs, (depth, d, k, h), kv_axes, d)
        self.wv = _weight(rngs, (depth, d, k, h), kv_axes, d)
        self.wo = _weight(rngs, (depth, n, h, d), ("layers", "heads", "head_dim", "embed"), n * h)
        if arch.qkv_bias:
            self.bq = _constant(0.0, (depth, n, h), ("layers", "heads", "head_dim"))
            self.bk = _constant(0.0, (depth, k, h), ("layers", "kv_heads", "head_dim"))
            self.bv = _constant(0.0, (depth, k, h), ("layers", "kv_heads", "head_dim"))
        if arch.qk_norm:
            self.q_norm = _constant(1.0, (depth, h), ("layers", "head_dim"))
            self.k_norm = _constant(1.0, (depth, h), ("layers", "head_dim"))
        self.mlp_norm = _constant(1.0, (depth, d), ("layers", "norm"))


class DenseMLPs(nnx.Module):
    """The MLPs of the dense layers, stacked."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs) -> None:
        depth, d, f = len(arch.dense_layers), arch.embed_dim, arch.ffn_dim
        self.w_gate = _weight(rngs, (depth, d, f), ("layers", "embed", "ffn"), d)
        self.w_up = _weight(rngs, (depth, d, f), ("layers", "embed", "ffn"), d)
        self.w_down = _weight(rngs, (depth, f, d), ("layers", "ffn", "embed"), f)


class Experts(nnx.Module):
    """Routers and experts of the sparse layers, stacked."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs) -> None:
        depth, d, f = len(arch.sparse_layers), arch.embed_dim, arch.expert_ffn_dim
        e = arch.num_experts
        in_axes = ("layers", "experts", "moe_embed", "ffn")
        self.router = _weight(rngs, (depth, d, e), ("layers", "embed", "replicated"), d)
        self.w_gate = _weight(rngs, (depth, e, d, f), in_axes, d)
        self.w_up = _weight(rngs, (depth, e, d, f), in_axes, d)
        self.w_down = _weight(rngs, (depth, e, f, d), ("layers", "experts", "ffn", "moe_embed"), f)


class Decoder(nnx.Module):
    """Embedding, layers with their MLPs, final norm and (untied) output head."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs) -> None:
        v, d = arch.vocab_size, arch.embed_dim
        # A tied embedding is the output head too: at this scale initial logits have unit variance.
        self.embed = _weight(rngs, (v, d), ("vocab", "embed"), d)
        self.layers = Layers(arch, rngs)
        if arch.dense_layers:
            self.dense = DenseMLPs(arch, rngs)
        if arch.sparse_layers:
            self.moe = Experts(arch, rngs)
        self.final_norm = _constant(1.0, (d,), ("norm",))
        if not arch.tie_embeddings:
            self.head = _weight(rngs, (v, d), ("vocab", "embed"), d)


@functools.lru_cache(maxsize=64)
def _declaration(arch: Architecture) -> nnx.State[str, Any]:
    return nnx.state(nnx.eval_shape(lambda: Decoder(arch, nnx.Rngs(0))), nnx.Param)


@dataclass(frozen=True)
class LanguageModel:
    """A decoder's program without its parameters: hashable, static in jitted functions."""

    arch: Architecture
    compute_dtype: str = "float32"
    remat: str = "none"
    mesh: Mesh | None = None
    attention: str = "auto"
    padded_from: int | None = None
    """First row of the vocabulary that is no token and never predicted; `None`: there is none."""

    @property
    def vocabulary(self) -> int:
        """How many tokens can be predicted."""
        return self.arch.vocab_size if self.padded_from is None else self.padded_from

    def _map(self, leaf: Any) -> Params:
        """Apply `leaf(name, param)` to every declared parameter."""
        tree: Params = {}
        for path, param in nnx.to_flat_state(_declaration(self.arch)):
            *parents, name = map(str, path)
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[name] = leaf("." + ".".join([*parents, name]), param)
        return tree

    def declaration(self) -> Params:
        """The declared parameters: shape, and metadata `axes` and `decay`, without values."""
        return self._map(lambda _, param: param)

    def abstract(self, dtype: str = "float32") -> Params:
        """Shape, dtype and (with a mesh) sharding of every parameter.

        Raises:
            ConfigError: the mesh does not divide a parameter.
        """

        def leaf(name: str, param: nnx.Param[jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct:
            axes, shape = param.get_metadata("axes"), param.get_value().shape
            sharding = self.mesh and sharding_for(self.mesh, axes, shape, name)
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

        return self._map(leaf)

    def init(self, key: jax.Array, dtype: str = "float32") -> Params:
        """Random parameters, made in place on the mesh."""

        def make(key: jax.Array) -> Params:
            state = nnx.to_pure_dict(nnx.state(Decoder(self.arch, nnx.Rngs(params=key)), nnx.Param))
            return jax.tree.map(lambda x: x.astype(dtype), state)

        shardings = None
        if self.mesh is not None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract(dtype))
        return jax.jit(make, out_shardings=shardings)(key)

    def head(self, params: Params) -> jax.Array:
        """[v, d]: logits are `hidden_btd @ head.T`. Tied models use the embedding.

        On a mesh its rows are gathered here, once, not in the loops that read it.
        """
        head = self.head_parameter(params).astype(self.compute_dtype)
        return constrain(head, self.mesh, ("vocab", "replicated"), "head")

    def head_parameter(self, params: Params) -> jax.Array:
        """[v, d]: the parameter behind `head`, in its own dtype and as it is sharded."""
        return params["embed"] if self.arch.tie_embeddings else params["head"]

    def forward(
        self,
        params: Params,
        tokens_bt: jax.Array,
        positions_bt: jax.Array,
        segments_bt: jax.Array | None = None,
        counted_bt: jax.Array | None = None,
        sums: Params | None = None,
    ) -> ForwardOutput:
        """Run the decoder on whole sequences (`model.decode` adds single tokens to a cache).

        Args:
            params: as `abstract` describes them.
            tokens_bt: int32.
            positions_bt: int32, their positions in their sequences.
            segments_bt: int32; tokens attend within their segment, where they lie in the order of
                their positions. `None`: one segment per row.
            counted_bt: bool, tokens that the router's sums count. `None`: all.
            sums: arrays as the stacked layers, not read: their cotangents gather the gradients of
                these (`sum_gradients`), which then have none of their own.
        """
        x_btd, table_vd = embed(params["embed"], tokens_bt, self.compute_dtype, self.mesh)
        head_vd = self.head_parameter(params | {"embed": table_vd})
        params = cast(params, self.compute_dtype)
        x_btd = constrain(x_btd, self.mesh, HIDDEN_AXES, "hidden")
        rope = rope_tables(positions_bt, self.arch)

        def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> Mixed:
            return attend_rows(self.attention, self.mesh, q, k, v, segments_bt), (k, v)

        def one(x: jax.Array, layer: Params) -> tuple[jax.Array, Any]:
            x = checkpoint_name(x, LAYER_INPUT)
            x, new, router = run_layer(self, layer, x, rope, mix, counted_bt)
            return constrain(x, self.mesh, HIDDEN_AXES, "hidden"), (new, router)

        def body(carry: Carry, xs: tuple[Params, Any]) -> tuple[Carry, Any]:
            (x, sums), (layer, rows) = carry, xs
            if sums is not None:
                layer, sums = sum_gradients(layer, sums, rows)
            x, kept = remat(one, self.remat)(x, layer)
            return (x, sums), kept

        new, routers = [], []
        for run, places in layer_runs(self.arch, params):
            rows = {group: jnp.arange(at.start, at.stop) for group, at in places.items()}
            xs = run, None if sums is None else rows  # with rows `count_flops` sees no layer twice
            (x_btd, sums), (kept, router) = jax.lax.scan(body, (x_btd, sums), xs)
            new.append(kept)
            routers += [] if router is None else [router]
        keys, values = _joined(new)
        behind = params["final_norm"], head_vd
        x_btd, (norm_d, head_vd) = complete_first(x_btd, behind, self.mesh)
        hidden_btd = rms_norm(x_btd, norm_d, self.arch.norm_eps)
        router = _joined(routers) if routers else None
        return ForwardOutput(hidden_btd, keys, values, router, head_vd, sums)


def layer_runs(arch: Architecture, params: Params) -> Iterator[tuple[Params, dict[str, range]]]:
    """Stacked parameters of every longest run of layers of one kind, from the first layer on.

    With each its rows in the stacks of `layers`, and in those of `dense` or `moe`.
    """
    sparse, used = set(arch.sparse_layers), {"dense": 0, "moe": 0}
    kinds = itertools.groupby("moe" if i in sparse else "dense" for i in range(arch.num_layers))
    for kind, group in kinds:
        length, own, start = len(list(group)), used[kind], sum(used.values())
        rows = {"layers": range(start, start + length), kind: range(own, own + length)}
        run: Params = {}
        for name, at in rows.items():
            run |= jax.tree.map(lambda x, at=at: x[at.start : at.stop], params[name])
        yield run, rows
        used[kind] += length


def _joined(runs: list[Any]) -> Any:
    """Stacks of several runs as one."""
    return jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *runs) if runs[1:] else runs[0]


def cast(params: Params, dtype: str) -> Params:
    """Every parameter in the compute dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def run_layer(
    model: LanguageModel,
    layer: Params,
    x_btd: jax.Array,
    rope: RopeTables,
    mix: Callable[[jax.Array, jax.Array, jax.Array], Mixed],
    counted_bt: jax.Array | None = None,
    times: Callable[..., jax.Array] = linear,
    spread: tuple[str, ...] | None = None,
) -> tuple[jax.Array, Any, RouterSums | None]:
    """One decoder layer.

    Args:
        layer: this layer's parameters; a sparse layer has a `router`. Instead of the weights of
            queries, keys and values, and of gate and up, it may have them joined: `w_qkv`,
            `w_gate_up`.
        rope: `rope_tables` of the tokens' positions.
        mix: from queries, keys and values of these tokens to the attention output, and to the keys
            and values to keep.
        counted_bt: bool, tokens that the router's sums count. `None`: all.
        times: the product with dense weights, called as `linear` is; `spread`: of `moe_mlp`.

    Returns:
        the new hidden states, what `mix` kept, and a sparse layer's router sums.
    """
    arch = model.arch
    with jax.named_scope("attention"):
        y = rms_norm(x_btd, layer["attn_norm"], arch.norm_eps)
        q, k, v = _project(arch, layer, y, times)
        mixed, kept = mix(rotate(q, rope), rotate(k, rope), v)
        # Not einsum: it contracts in alphabetical order (h, n), which copies the weight transposed.
        x_btd = checkpoint_name(x_btd + times(mixed, layer["wo"], 2), "attended")
    with jax.named_scope("mlp"):
        y = rms_norm(x_btd, layer["mlp_norm"], arch.norm_eps)
        if "router" in layer:
            out, router = moe_mlp(arch, layer, y, model.mesh, counted_bt, spread)
            return x_btd + out, kept, router
        if "w_gate_up" in layer:
            gate, up = jnp.split(times(y, layer["w_gate_up"]), 2, axis=-1)
        else:
            gate = checkpoint_name(times(y, layer["w_gate"]), "gate")
            up = checkpoint_name(times(y, layer["w_up"]), "up")
        x_btd = x_btd + times(jax.nn.silu(gate) * up, layer["w_down"])
    return x_btd, kept, None


def _project(
    arch: Architecture, layer: Params, y_btd: jax.Array, times: Callable[..., jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if "w_qkv" in layer:
        heads, more = arch.num_heads, arch.num_heads + arch.num_kv_heads
        q, k, v = jnp.split(times(y_btd, layer["w_qkv"]), (heads, more), axis=2)
    else:
        q, k, v = (times(y_btd, layer[name]) for name in ("wq", "wk", "wv"))
    if arch.qkv_bias:
        q, k, v = (x + layer[b][None, None] for x, b in ((q, "bq"), (k, "bk"), (v, "bv")))
    if arch.qk_norm:
        q = rms_norm(q, layer["q_norm"], arch.norm_eps)
        k = rms_norm(k, layer["k_norm"], arch.norm_eps)
    return q, k, v
