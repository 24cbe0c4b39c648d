"""The same gradients however records are laid into rows, cut into micro-batches, or kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from opd_jax.config_train import LoopConfig, OptimConfig
from opd_jax.data.collate import Scored, best_fit
from opd_jax.data.records import Record, Scores
from opd_jax.model.gradient_sums import STACKED, sum_gradients
from opd_jax.train.optimizer import make_optimizer, result_of
from opd_jax.train.sources import Packing
from opd_jax.train.step import Objective, gradients, init_state, make_train_step

OBJECTIVES = [
    Objective("sampled"),
    pytest.param(Objective("sft"), marks=pytest.mark.slow),
    pytest.param(Objective("topk", tail=True), marks=pytest.mark.slow),
]
SUPPORT = 3


@functools.cache
def scored():
    """Eight responses of 1 to 12 tokens."""
    rng = np.random.default_rng(2)

    def one(response):
        prompt = int(rng.integers(1, 6))
        ids = rng.integers(0, 64, prompt + response).astype(np.int32)
        sampled, teacher = -rng.exponential(2, (2, response)).astype(np.float32)
        top = rng.integers(0, 64, (response, SUPPORT)).astype(np.int32)
        likely = (-1.5 - rng.exponential(1, (response, SUPPORT))).astype(np.float16)
        record = Record("p", 0, ids[:prompt], ids[prompt:], sampled, "stop")
        return Scored(record, Scores(teacher, top, likely))

    return [one(response) for response in (1, 12, 3, 8, 5, 2, 9, 4)]


def laid(rows, row_tokens, shape):
    return Packing(row_tokens, support=SUPPORT).batch(rows, scored(), shape)


def packed(shape):
    """Three rows of 20 tokens hold all; what `shape` has beyond them stays empty."""
    lengths = [len(s.record.prompt_ids) + len(s.record.response_ids) - 1 for s in scored()]
    rows = best_fit(lengths, 20)
    assert len(rows) == 3
    assert shape[0] * shape[1] >= 3
    return laid(rows, 20, shape)


@functools.cache
def gradient_of(objective, batch_name, pieces=1, remat="none"):
    batch = {
        "padded": lambda: laid([[i] for i in range(8)], 24, (1, 8)),
        "packed": lambda: packed((1, 3)),
        "with empty ones": lambda: packed((pieces, 1)),
    }[batch_name]()
    model, params = tiny()
    model = dataclasses.replace(model, remat=remat)
    run = jax.jit(gradients, static_argnums=(0, 1, 4))
    grads, loss = run(model, objective, params, batch, pieces)
    return jax.device_get(jax.tree.map(lambda g: g / loss.divisor, grads))


def assert_same(got, want):
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    assert largest > 0.01
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["sampled", "sft", "topk"])
def test_packed_rows_give_the_gradients_of_padded_ones(objective):
    assert_same(gradient_of(objective, "packed"), gradient_of(objective, "padded"))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["sampled", "sft", "topk"])
def test_micro_batches_of_which_some_are_empty_give_those_of_the_whole(objective):
    whole = gradient_of(objective, "packed")
    assert_same(gradient_of(objective, "with empty ones", pieces=6), whole)


def test_what_is_computed_again_changes_nothing():
    objective = Objective("sampled")
    full = gradient_of(objective, "packed", remat="full")
    assert_same(full, gradient_of(objective, "packed"))


DENSE = {"embed_dim": 128, "ffn_dim": 512, "num_layers": 4}
ALTERNATING = {
    "embed_dim": 128,
    "num_layers": 5,
    "sparse_layers": (0, 2, 3),
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_ffn_dim": 256,
}


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow), "dots"])
@pytest.mark.parametrize("sizes", [DENSE, ALTERNATING], ids=["dense", "alternating"])
def test_each_layer_of_each_micro_batch_is_added(sizes, remat):
    model, params = tiny(**sizes)
    model = dataclasses.replace(model, remat=remat)
    objective = Objective("sampled", router_balance=0.5 if sizes is ALTERNATING else 0.0)
    run = jax.jit(gradients, static_argnums=(0, 1, 4))
    batch = packed((3, 1))
    got, _ = run(model, objective, params, batch, 3)
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(3)]
    each = [run(model, objective, params, row, 1)[0] for row in rows]
    want = jax.tree.map(lambda *x: sum(x), *each)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        largest = np.abs(b).max()
        assert largest > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


def test_gradients_in_half_precision_are_added_in_whole():
    rng = np.random.default_rng(0)
    sums = {"layers": {"wq": jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32)}}
    layer = {"wq": jnp.asarray(rng.normal(size=(2, 4)), jnp.bfloat16)}
    rows = {"layers": jnp.int32(1)}
    _, pull = jax.vjp(lambda layer, sums: sum_gradients(layer, sums, rows), layer, sums)
    of_layer, found = pull((layer, sums))
    want = np.array(sums["layers"]["wq"])
    want[1] += np.asarray(layer["wq"], np.float32)
    np.testing.assert_array_equal(found["layers"]["wq"], want)
    assert found["layers"]["wq"].dtype == jnp.float32
    np.testing.assert_array_equal(of_layer["wq"], 0)


@pytest.mark.parametrize(
    ("sizes", "more"),
    [(DENSE, {"num_layers": 8}), (ALTERNATING, {"num_layers": 10, "sparse_layers": (0, 2, 3)})],
    ids=["dense", "alternating"],
)
def test_micro_batches_take_no_second_stack_of_gradients(sizes, more):
    """What more layers add to the temporaries is less than half of their gradients."""

    def taken(sizes):
        model, params = tiny(**sizes)
        run = jax.jit(gradients, static_argnums=(0, 1, 4))
        lowered = run.lower(model, Objective("sampled"), params, packed((1, 4)), 2)
        stacks = [x for name in STACKED for x in jax.tree.leaves(params.get(name, {}))]
        return lowered.compile().memory_analysis().temp_size_in_bytes, sum(x.nbytes for x in stacks)

    (temporary, stacks), (longer, more_stacks) = taken(sizes), taken({**sizes, **more})
    assert longer - temporary < (more_stacks - stacks) / 2


@pytest.mark.parametrize("ema", [None, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_changes_no_parameter(ema):
    """After one that is: its momentum would move them on."""
    model, params = tiny()
    loop = LoopConfig(optim=OptimConfig(learning_rate=1e-2, ema=ema))
    optimizer = make_optimizer(model, loop)
    step = make_train_step(model, Objective("sampled"), optimizer, 1)
    batch = packed((1, 3))
    state, _ = step(init_state(model, optimizer, params), batch)
    before = jax.device_get((state.params, result_of(state.params, state.opt_state)))
    bad = {**batch, "teacher_bt": np.full_like(batch["teacher_bt"], np.nan)}
    state, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss"])
    after = state.params, result_of(state.params, state.opt_state)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.opt_state))
    assert not np.array_equal(before[0]["embed"], state.params["embed"])
