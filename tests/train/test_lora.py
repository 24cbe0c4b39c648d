import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import tiny

from opd_jax.algo import needed
from opd_jax.config import MeshConfig
from opd_jax.config_train import LoopConfig, LoraConfig, OptimConfig
from opd_jax.core.mesh import make_mesh, put_batch
from opd_jax.errors import ConfigError
from opd_jax.model.linear import CONTRACTED
from opd_jax.model.lora import Adapters
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.step import Objective, abstract_state, batch_loss, init_state, make_train_step

LOOP = LoopConfig(steps=8, batch_size=4, optim=OptimConfig(learning_rate=1e-2))
SFT = Objective("sft")
MIXTURE = {
    "family": "qwen3_moe",
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_ffn_dim": 12,
}


def batch_of(b=4, t=8):
    rng = np.random.default_rng(0)
    return {
        "input_bt": rng.integers(0, 64, (b, t)).astype(np.int32),
        "target_bt": rng.integers(0, 64, (b, t)).astype(np.int32),
        "positions_bt": np.tile(np.arange(t, dtype=np.int32), (b, 1)),
        "mask_bt": rng.random((b, t)) < 0.8,
    }


def random_like(tree):
    """Adapters whose B is not zero."""
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(tree))))
    return jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), tree)


def forward(model, params):
    batch = batch_of()
    out = jax.jit(model.forward)(params, batch["input_bt"], batch["positions_bt"])
    return jax.jit(lambda: out.hidden_btd @ model.head(params).T)()


def test_merged_is_unmerged_and_at_the_start_the_model_is_itself():
    model, params = tiny(num_layers=1)
    adapters = Adapters(model, LoraConfig(rank=3, alpha=5.0))
    fresh = adapters.init(0)
    assert set(fresh["layers"]) | set(fresh["dense"]) == set(CONTRACTED)
    plain = forward(model, params)
    np.testing.assert_allclose(forward(model, adapters.attach(params, fresh)), plain, atol=1e-6)
    some = random_like(fresh)
    merged = adapters.merge(params, some)
    np.testing.assert_allclose(
        forward(model, adapters.attach(params, some)), forward(model, merged), atol=1e-5
    )
    assert np.abs(forward(model, merged) - plain).max() > 0.1
    wo, pair = params["layers"]["wo"], some["layers"]["wo"]
    want = wo + 5.0 / 3 * np.einsum("lnhr,lrd->lnhd", pair["a"], pair["b"])
    np.testing.assert_allclose(merged["layers"]["wo"], want, atol=1e-5)
    assert merged["embed"] is params["embed"]


def test_the_gradient_is_that_through_merged_weights():
    model, params = tiny(num_layers=1)
    adapters = Adapters(model, LoraConfig(rank=2))
    some = random_like(adapters.init(0))

    def total(whole, adapter):
        return batch_loss(model, SFT, whole(params, adapter), batch_of()).total

    found = jax.jit(jax.grad(functools.partial(total, adapters.attach)))(some)
    wanted = jax.jit(jax.grad(functools.partial(total, adapters.merge)))(some)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-6)


@functools.cache
def trained(mesh=None, steps=3, pieces=1):
    """(losses, adapters) of some steps; the adapters start from one seed on any mesh."""
    model, params = tiny(mesh and make_mesh(mesh), num_layers=1)
    adapters = Adapters(model, LoraConfig(rank=2))
    optimizer = make_optimizer(adapters, LOOP)
    state = init_state(adapters, optimizer, adapters.init(5))
    step = make_train_step(model, SFT, optimizer, pieces, adapters)
    before = jax.device_get(params)
    losses = []
    for _ in range(steps):
        batch = batch_of() if model.mesh is None else put_batch(model.mesh, batch_of())
        state, metrics = step(state, batch, params)
        losses.append(float(metrics["loss"]))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    return losses, jax.device_get(state.params)


def test_the_adapters_learn():
    losses, adapters = trained()
    assert losses[-1] < losses[0] - 0.01
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(adapters))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=2, context=2)])
def test_four_devices_train_the_adapters_of_one(mesh):
    losses, adapters = trained()
    four, same = trained(mesh)
    np.testing.assert_allclose(four, losses, atol=1e-5)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_accumulated_equals_whole():
    losses, adapters = trained()
    in_pieces, same = trained(pieces=2)
    np.testing.assert_allclose(in_pieces, losses, atol=1e-5)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_adapters_are_cut_as_their_weights():
    model, _ = tiny(make_mesh(MeshConfig(fsdp=2, tensor=2)))
    adapters = Adapters(model, LoraConfig(rank=3))
    state = abstract_state(adapters, make_optimizer(adapters, LOOP))
    cut = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), state.params["layers"])
    assert cut["wq"] == {"a": (2, 16, 3), "b": (2, 3, 2, 8)}
    assert cut["wo"] == {"a": (2, 2, 8, 3), "b": (2, 3, 16)}
    moment = optax.tree.get(state.opt_state, "mu")["layers"]["wo"]["a"]
    assert moment.sharding == state.params["layers"]["wo"]["a"].sharding


def compiled(adapters, model):
    trains = adapters or model
    optimizer = make_optimizer(trains, LOOP)
    step = make_train_step(model, SFT, optimizer, 1, adapters)
    frozen = (model.abstract(),) if adapters else ()
    return step.lower(abstract_state(trains, optimizer), batch_of(b=1), *frozen).compile()


@pytest.mark.first_by_default
@pytest.mark.parametrize("fewest", [needed.FEWEST, 1])
def test_frozen_weights_have_no_gradient_and_no_moment(fewest, monkeypatch):
    """Figures of the compiled step: neither bytes nor operations for what is not trained."""
    monkeypatch.setattr(needed, "FEWEST", fewest)  # with 1, the head's products choose
    monkeypatch.setattr(needed, "LEAST", 1)
    model, params = tiny(num_layers=1, ffn_dim=4096)
    adapters = Adapters(model, LoraConfig(rank=2, targets=("wq", "w_down")))
    state = abstract_state(adapters, make_optimizer(adapters, LOOP))
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert sum(sizes) < 4 * 2 * (32 + 32 + 4096 + 32) + 10
    whole, part = compiled(None, model), compiled(adapters, model)
    base = sum(x.nbytes for x in jax.tree.leaves(params))
    a, b = whole.memory_analysis(), part.memory_analysis()
    assert a.argument_size_in_bytes > 3 * base
    assert base < b.argument_size_in_bytes < 1.2 * base
    assert b.output_size_in_bytes < 0.1 * base  # nothing frozen is given back, or copied
    assert b.temp_size_in_bytes < a.temp_size_in_bytes - base
    assert part.cost_analysis()["flops"] < 0.6 * whole.cost_analysis()["flops"]


@pytest.mark.slow
def test_targets_that_a_mixture_has_in_experts_only_are_refused():
    every, _ = tiny(sparse_layers=(0, 1), **MIXTURE)
    assert set(Adapters(every, LoraConfig()).targets()) == {"wq", "wk", "wv", "wo"}
    with pytest.raises(ConfigError, match=r"lora.targets names 'w_up'.*experts only") as caught:
        Adapters(every, LoraConfig(targets=("wq", "w_up"))).abstract()
    assert "\n" not in str(caught.value)
    some, params = tiny(sparse_layers=(1,), **MIXTURE)
    adapters = Adapters(some, LoraConfig(rank=2))
    assert adapters.abstract()["dense"]["w_up"]["a"].shape == (1, 32, 2)
    out = forward(some, adapters.attach(params, adapters.init(0)))
    np.testing.assert_allclose(out, forward(some, params), atol=1e-6)


def test_adapters_are_float32_and_follow_the_seed():
    model, _ = tiny()
    adapters = Adapters(model, LoraConfig(rank=4, targets=("w_down",)))
    one, same, other = (adapters.init(seed)["dense"]["w_down"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one["a"], same["a"])
    assert not np.array_equal(one["a"], other["a"])
    assert not np.asarray(one["b"]).any()
    assert one["a"].dtype == jnp.float32
    assert float(jnp.std(one["a"])) == pytest.approx(48**-0.5, rel=0.2)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny()[1])
    merged = adapters.merge(half, adapters.init(0))
    assert merged["dense"]["w_down"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["dense"]["w_down"], half["dense"]["w_down"])
