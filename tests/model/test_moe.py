import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import filled
from models import tiny
from oracles import mixture_of_experts

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.errors import ConfigError
from opd_jax.model.cache import Pages
from opd_jax.model.decode import decode, split_layers
from opd_jax.model.moe import (
    RouterSums,
    Routing,
    balance_loss,
    moe_mlp,
    router_metrics,
    router_sums,
)
from opd_jax.model.transformer import LanguageModel, layer_runs

EXPERTS = {
    "family": "qwen3_moe",
    "num_layers": 4,
    "sparse_layers": (1, 2),
    "num_experts": 8,
    "experts_per_token": 3,
    "expert_ffn_dim": 12,
}
MESHES = [{"expert": 4}, {"expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 2}, {"fsdp": 4}]
forward = jax.jit(LanguageModel.forward, static_argnums=0)


@functools.cache
def model_on(mesh=None, **changes):
    config = None if mesh is None else make_mesh(MeshConfig(**{"fsdp": 1, **dict(mesh)}))
    return tiny(mesh=config, **EXPERTS | changes)


def inputs(b=4, t=6):
    tokens = np.random.default_rng(0).integers(0, 64, (b, t)).astype(np.int32)
    return tokens, np.tile(np.arange(t, dtype=np.int32), (b, 1))


def one_layer(scale=1.0):
    _, params = model_on()
    layer = {name: leaf[0] for name, leaf in params["moe"].items()}
    layer["router"] = layer["router"] * scale
    x_btd = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 32)), jnp.float32)
    return layer, x_btd


# At scale 40 nearly all probability is at one expert, and some experts get no token at all.
@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize("normed", [False, True])
def test_grouped_products_are_the_loop_over_tokens_and_experts(normed, scale):
    arch = dataclasses.replace(model_on()[0].arch, norm_topk_prob=normed)
    layer, x_btd = one_layer(scale)
    out, sums = jax.jit(lambda: moe_mlp(arch, layer, x_btd, None, None))()
    expected, experts = mixture_of_experts(x_btd.reshape(10, 32), layer, 3, normed=normed)
    np.testing.assert_allclose(out.reshape(10, 32), expected, atol=1e-5)
    assigned = np.bincount(np.concatenate(experts), minlength=8)
    assert sums.assigned_le.tolist() == assigned.tolist()  # all of them: none is dropped
    assert sums.tokens_l == 10


def test_all_tokens_at_one_expert_are_all_computed():
    arch = dataclasses.replace(model_on()[0].arch, experts_per_token=1)
    layer, x_btd = one_layer()
    x_btd = jnp.abs(x_btd)
    layer["router"] = jnp.zeros((32, 8)).at[:, 5].set(1.0)
    out, sums = moe_mlp(arch, layer, x_btd, None, None)
    expected, _ = mixture_of_experts(x_btd.reshape(10, 32), layer, 1, normed=False)
    np.testing.assert_allclose(out.reshape(10, 32), expected, atol=1e-5)
    assert sums.assigned_le.tolist() == [0, 0, 0, 0, 0, 10, 0, 0]


def loss(model, params, tokens, positions):
    out = model.forward(params, tokens, positions)
    return jnp.sum(jnp.sin(out.hidden_btd)) + balance_loss(out.router)


value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_sharded_equals_unsharded_with_gradients(mesh):
    model, params = model_on()
    sharded, on_mesh = model_on(mesh=tuple(mesh.items()))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(on_mesh), strict=True):
        np.testing.assert_array_equal(a, b)
    want, got = (
        value_and_grad(model, params, *inputs()),
        value_and_grad(sharded, on_mesh, *inputs()),
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True
    ):
        atol = 2e-6 * np.abs(np.asarray(b)).max()  # rounding: gradients are sums of large terms
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(path))
        assert np.abs(np.asarray(b)).max() > 1e-4, path


def test_experts_lie_over_their_axis_and_a_mesh_must_divide_them():
    model, params = model_on(mesh=(("expert", 4),))
    assert params["moe"]["w_gate"].sharding.shard_shape((2, 8, 32, 12)) == (2, 2, 32, 12)
    cut = LanguageModel(dataclasses.replace(model.arch, num_experts=6), mesh=model.mesh)
    message = r"\.moe\.w_down: dim 'experts'=6 is not divisible by mesh axis 'expert'=4"
    with pytest.raises(ConfigError, match=message):
        cut.abstract()
    with pytest.raises(ConfigError, match=r"'batch'=3 .*mesh axis 'expert'=4"):
        forward(model, params, *inputs(3))


@pytest.mark.parametrize(
    "mesh",
    [None, pytest.param((("expert", 2), ("tensor", 2)), marks=pytest.mark.slow)],
    ids=str,
)
def test_prefix_in_a_cache_then_single_tokens_equal_the_whole(mesh):
    model, params = model_on(mesh=mesh)
    tokens, positions = inputs()
    whole = forward(model, params, tokens, positions)
    first = forward(model, params, tokens[:, :3], positions[:, :3])
    rows, lengths = np.arange(4, dtype=np.int32), np.full(4, 3, np.int32)
    pages = Pages((4,), 8) if mesh is None else Pages((2, 2), 4, shards=2)
    cache, table = filled(model, pages, (first.keys, first.values), rows, lengths, 6)
    split = split_layers(model, params)
    step = jax.jit(lambda token_b, cache: decode(model, pages, split, token_b, cache, table))
    for t in range(3, 6):
        hidden_bd, cache = step(tokens[:, t], cache)
        np.testing.assert_allclose(hidden_bd, whole.hidden_btd[:, t], atol=1e-5)


def test_runs_give_every_layer_its_own_weights():
    model, params = model_on(sparse_layers=(0, 2, 3), num_layers=5)
    runs, rows = zip(*layer_runs(model.arch, params), strict=True)
    assert [("router" in run, len(run["attn_norm"])) for run in runs] == [
        (True, 1),
        (False, 1),
        (True, 2),
        (False, 1),
    ]
    np.testing.assert_array_equal(runs[2]["w_up"], params["moe"]["w_up"][1:])
    np.testing.assert_array_equal(runs[3]["w_up"], params["dense"]["w_up"][1:])
    np.testing.assert_array_equal(runs[2]["wq"], params["layers"]["wq"][2:4])
    assert rows[2] == {"layers": range(2, 4), "moe": range(1, 3)}
    assert rows[3] == {"layers": range(4, 5), "dense": range(1, 2)}


def test_the_balance_loss_is_switch_transformers():
    share, probability = np.array([0.9, 0.4, 0.7]), np.array([0.5, 0.2, 0.3])
    sums = RouterSums(
        *(jnp.asarray(x, jnp.float32) for x in ([share * 10], [probability * 10])),
        jnp.zeros(1),
        jnp.full(1, 10.0),
    )
    assert float(balance_loss(sums)) == pytest.approx(3 * sum(share * probability))
    even = RouterSums(jnp.full((2, 4), 5.0), jnp.full((2, 4), 2.5), jnp.zeros(2), jnp.full(2, 10.0))
    assert float(balance_loss(even)) == pytest.approx(2)  # two experts per token


def test_padding_counts_in_no_sum():
    rng = np.random.default_rng(0)
    prob = jax.nn.softmax(jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32))
    weight, expert = jax.lax.top_k(prob, 2)
    counted = jnp.arange(4)[None] < jnp.array([[3], [1]])
    bad = jnp.where(counted[..., None], prob, jnp.nan)
    sums = router_sums(Routing(bad, weight, expert), counted)
    picked = np.concatenate([np.asarray(expert)[0, :3].ravel(), np.asarray(expert)[1, 0]])
    assert sums.assigned_le.tolist() == np.bincount(picked, minlength=5).tolist()
    assert sums.tokens_l == 4
    kept = np.asarray(prob)[np.asarray(counted)]
    np.testing.assert_allclose(sums.probability_le, kept.sum(0), rtol=1e-6)
    np.testing.assert_allclose(sums.entropy_l, -(kept * np.log(kept)).sum(), rtol=1e-5)
    metrics = router_metrics(jax.tree.map(lambda x: x[None], sums))
    assert float(metrics["router_max_load"]) == pytest.approx(max(np.bincount(picked)) / 4)
