import functools

import jax
import numpy as np
import optax
import pytest
from models import tiny

from opd_jax.algo import needed
from opd_jax.algo.losses import Terms
from opd_jax.config import MeshConfig
from opd_jax.config_train import LoopConfig, OptimConfig, TrainRun
from opd_jax.core.flops import count_flops
from opd_jax.core.mesh import make_mesh, put_batch
from opd_jax.errors import ConfigError
from opd_jax.train.jobs import objective_of
from opd_jax.train.optimizer import decay_mask, learning_rate, make_optimizer
from opd_jax.train.step import (
    Objective,
    abstract_state,
    batch_loss,
    gradients,
    init_state,
    make_train_step,
)

LOOP = LoopConfig(steps=8, batch_size=8, optim=OptimConfig(learning_rate=1e-3, warmup_steps=2))
OBJECTIVES = [Objective("sft"), Objective("sampled"), Objective("topk", tail=True)]


def ragged_batch(b=8, t=12, support=3, v=64):
    """Every row has a response of another length."""
    rng = np.random.default_rng(0)
    start, stop = rng.integers(1, 4, b), rng.integers(5, t + 1, b)
    columns = np.arange(t)[None]
    mask = (columns >= start[:, None]) & (columns < stop[:, None])
    return {
        "input_bt": rng.integers(0, v, (b, t)).astype(np.int32),
        "target_bt": rng.integers(0, v, (b, t)).astype(np.int32),
        "positions_bt": np.tile(np.arange(t, dtype=np.int32), (b, 1)),
        "mask_bt": mask,
        "weight_bt": (mask / mask.sum(1, keepdims=True)).astype(np.float32),
        "teacher_bt": -rng.exponential(2, (b, t)).astype(np.float32),
        "sampler_bt": -rng.exponential(2, (b, t)).astype(np.float32),
        "support_ids_bts": rng.integers(0, v, (b, t, support)).astype(np.int32),
        "support_logprob_bts": -1.5 - rng.exponential(1, (b, t, support)).astype(np.float32),
        "support_rest_bt": rng.uniform(0.1, 0.4, (b, t)).astype(np.float32),
    }


@functools.cache
def run(objective, mesh=None, pieces=1, steps=3):
    model, params = tiny(mesh=None if mesh is None else make_mesh(mesh))
    optimizer = make_optimizer(model, LOOP)
    state = init_state(model, optimizer, params)
    step = make_train_step(model, objective, optimizer, pieces)
    batch = ragged_batch()
    losses = []
    for _ in range(steps):
        placed = batch if model.mesh is None else put_batch(model.mesh, batch)
        state, metrics = step(state, placed)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


def assert_same(got, want, atol):
    np.testing.assert_allclose(got[0], want[0], atol=atol)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize(
    "objective",
    [pytest.param(o, marks=[] if o.kind == "sampled" else pytest.mark.slow) for o in OBJECTIVES],
    ids=lambda o: o.kind,
)
def test_accumulated_equals_whole(objective):
    # Adam divides by the gradient's own size: parameters differ by more than the gradients do.
    assert_same(run(objective, pieces=4), run(objective), atol=2e-5)


WITH_ALL = Terms(
    reward_scale=1.5, kl_anchor=0.1, weight_cap=2.0, position_gamma=1.0, ratio_clip=0.2
)


@pytest.mark.first_by_default
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize(
    "objective",
    [*OBJECTIVES, Objective("sampled", WITH_ALL), Objective("topk", WITH_ALL)],
    ids=["sft", "sampled", "topk", "sampled with all terms", "topk without tail, with all terms"],
)
def test_logits_that_nobody_reads_can_be_left_out(objective, pieces, monkeypatch):
    model, params = tiny()
    batch = ragged_batch()

    def found():
        def both(params, batch):
            return gradients(model, objective, params, batch, pieces)

        given = jax.tree.leaves((params, batch))
        operations = count_flops(jax.make_jaxpr(both)(params, batch), given)
        return operations, jax.jit(both)(params, batch)

    all_operations, every = found()
    monkeypatch.setattr(needed, "FEWEST", 1)
    monkeypatch.setattr(needed, "LEAST", 1)
    operations, some = found()
    assert operations < all_operations
    for got, want in zip(jax.tree.leaves(some), jax.tree.leaves(every), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.first_by_default
@pytest.mark.exact
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)
def test_four_devices_equal_one(objective):
    losses, _ = run(objective, MeshConfig(fsdp=2, tensor=2))
    np.testing.assert_allclose(losses, run(objective)[0], atol=1e-5)


@pytest.mark.first_by_default
@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=4), MeshConfig(data=2, tensor=2)])
def test_other_meshes_equal_one_device(mesh):
    objective = Objective("sampled")
    np.testing.assert_allclose(run(objective, mesh)[0], run(objective)[0], atol=1e-5)


@pytest.mark.exact
def test_accumulation_on_a_mesh_equals_whole():
    objective = Objective("sampled")
    losses, _ = run(objective, MeshConfig(fsdp=2, tensor=2), pieces=4)
    np.testing.assert_allclose(losses, run(objective)[0], atol=1e-5)


def test_the_loss_falls_and_parameters_move():
    losses, params = run(Objective("sft"), steps=8)
    assert losses[-1] < losses[0] - 0.01
    assert not np.array_equal(params["embed"], tiny()[1]["embed"])


def test_state_is_sharded_like_its_parameters():
    model, _ = tiny(mesh=make_mesh(MeshConfig(fsdp=2, tensor=2)))
    state = abstract_state(model, make_optimizer(model, LOOP))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (64, 32)]
    assert len(moments) == 2
    for moment in moments:
        assert moment.sharding == state.params["embed"].sharding
        assert moment.sharding.shard_shape((64, 32)) == (32, 16)


def test_weight_decay_spares_norms_and_biases():
    model, _ = tiny(qkv_bias=True)
    mask = decay_mask(model)
    assert mask["embed"]
    assert mask["layers"]["wq"]
    for name in ("attn_norm", "mlp_norm", "q_norm", "bq", "bv"):
        assert not mask["layers"][name], name
    assert not mask["final_norm"]


def test_the_optimizer_is_that_of_optax_with_clipping():
    """Gradients beyond the norm, then within it: Adam's moments tell a clipped one from others."""
    model, params = tiny()
    mine = make_optimizer(model, LOOP)
    config = LOOP.optim
    plain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, LOOP.steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask(model),
        ),
    )
    states = [mine.init(params), plain.init(params)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for size in (3.0, 1e-4):
        grads = jax.tree.map(lambda x, size=size: size * x, params)
        found, states[0] = mine.update(grads, states[0], params)
        expected, states[1] = plain.update(grads, states[1], params)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


def test_learning_rate_schedule():
    constant = learning_rate(OptimConfig(learning_rate=1.0, warmup_steps=4), 100)
    assert [float(constant(s)) for s in (0, 1, 3, 4, 99)] == pytest.approx([0.25, 0.5, 1, 1, 1])
    cosine = learning_rate(OptimConfig(learning_rate=1.0, warmup_steps=10, schedule="cosine"), 110)
    assert float(cosine(10)) == pytest.approx(1.0)
    assert float(cosine(60)) == pytest.approx(0.5, abs=0.01)
    assert float(cosine(110)) == pytest.approx(0.001)


MIXTURE = {
    "family": "qwen3_moe",
    "sparse_layers": (1,),
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_ffn_dim": 12,
}


def one_step(objective, mesh=None, pieces=1):
    model, params = tiny(mesh=None if mesh is None else make_mesh(mesh), **MIXTURE)
    optimizer = make_optimizer(model, LOOP)
    step = make_train_step(model, objective, optimizer, pieces)
    batch = ragged_batch()
    placed = batch if mesh is None else put_batch(model.mesh, batch)
    state, metrics = step(init_state(model, optimizer, params), placed)
    return jax.device_get((state.params, metrics))


@pytest.mark.slow
def test_router_figures_and_balance_loss_of_a_mixture():
    _, plain = one_step(Objective("sft"))
    params, balanced = one_step(Objective("sft", router_balance=0.5))
    tokens = plain["tokens"]
    assert 0.5 <= plain["router_max_load"] / tokens <= 1.0  # even: 2 of 4 experts
    assert 0 < plain["router_entropy"] / tokens <= np.log(4) + 1e-6
    balance = plain["router_balance"] / tokens
    assert balance >= 1.9
    np.testing.assert_allclose(balanced["loss"], plain["loss"] + 0.5 * balance, rtol=1e-6)
    assert not np.array_equal(
        params["moe"]["router"], one_step(Objective("sft"))[0]["moe"]["router"]
    )
    _, sharded = one_step(Objective("sft", router_balance=0.5), MeshConfig(fsdp=2, expert=2))
    for name, value in balanced.items():
        np.testing.assert_allclose(sharded[name], value, rtol=1e-4, err_msg=name)


def test_padding_leaves_the_router_figures_alone():
    model, params = tiny(**MIXTURE)
    batch = ragged_batch()
    changed = {**batch, "input_bt": batch["input_bt"].copy()}
    last = batch["mask_bt"].shape[1] - batch["mask_bt"][:, ::-1].argmax(1)
    for row, stop in enumerate(last):
        changed["input_bt"][row, stop:] = 3
    assert (changed["input_bt"] != batch["input_bt"]).any()
    loss = jax.jit(batch_loss, static_argnums=(0, 1))
    a, b = (loss(model, Objective("sft"), params, x).sums for x in (batch, changed))
    for name in ("router_max_load", "router_entropy", "router_balance"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-6)


def test_a_balance_loss_without_experts_is_refused():
    model, _ = tiny()
    with pytest.raises(ConfigError, match=r"router_balance=0.1: .*no experts"):
        make_train_step(model, Objective("sft", router_balance=0.1), make_optimizer(model, LOOP), 1)


def test_every_option_of_a_run_reaches_its_objective():
    values = {
        "tau": 2.0,
        "reward_scale": 1.5,
        "kl_anchor": 0.3,
        "weight_cap": 3.0,
        "position_gamma": 0.5,
    }
    assert objective_of(TrainRun(**values)).terms == Terms(**values)
    online = TrainRun(algorithm="opd", ratio_clip=0.2)
    assert objective_of(online).terms == Terms(ratio_clip=0.2)
    topk = objective_of(TrainRun(objective="topk", tail=True, router_balance=0.01))
    assert (topk.kind, topk.tail, topk.router_balance) == ("topk", True, 0.01)
    assert objective_of(TrainRun(algorithm="sft")).kind == "sft"
