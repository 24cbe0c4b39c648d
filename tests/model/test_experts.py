import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax.model.experts import (
    Weights,
    block_rows,
    cut_blocks,
    in_blocks,
    in_groups,
    product_on,
)

T, S, D, F = 40, 3, 16, 12


def weights_of(experts, d=D, f=F):
    rng = np.random.default_rng(0)
    shapes = ((experts, d, f), (experts, d, f), (experts, f, d))
    return Weights(*(jnp.asarray(rng.normal(size=s) * s[1] ** -0.5, jnp.float32) for s in shapes))


def chosen(experts, *, always=(), never=(), t=T, s=S):
    """[t, s]: distinct experts of each token."""
    score_te = np.random.default_rng(1).random((t, experts))
    score_te[:, list(always)], score_te[:, list(never)] = 2, -1
    return jnp.asarray(np.argsort(-score_te, axis=1)[:, :s], jnp.int32)


def value_and_gradients(product, expert_ts, weights):
    rng = np.random.default_rng(2)
    t, s = expert_ts.shape
    x_td = jnp.asarray(rng.normal(size=(t, weights.gate_edf.shape[1])), jnp.float32)
    weight_ts = jnp.asarray(rng.random((t, s)), jnp.float32)

    def loss(x_td, weight_ts, weights):
        out_td = product(x_td, weight_ts, expert_ts, weights)
        return jnp.sum(jnp.sin(out_td)), out_td

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(run)(x_td, weight_ts, weights)


CASES = {
    "one expert gets none, one gets all": chosen(6, always=[2], never=[4]),
    "some are held elsewhere": chosen(12) - 4,
    "all are held elsewhere": chosen(6) + 6,
    "one expert of one token": chosen(6, t=1, s=1),
}


@pytest.mark.first_by_default
@pytest.mark.parametrize("rows", [4, 16, 64])
@pytest.mark.parametrize("case", CASES)
def test_blocks_give_what_groups_give(case, rows):
    def blocks(*args):
        return in_blocks(*args, rows=rows)

    weights = weights_of(6)
    got = value_and_gradients(blocks, CASES[case], weights)
    want = value_and_gradients(in_groups, CASES[case], weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    held = np.isin(np.arange(6), CASES[case])
    for gradient in got[1][2]:
        assert (np.abs(gradient).max(axis=(1, 2)) > 0).tolist() == held.tolist()


def test_groups_that_hold_every_expert_mask_nothing():
    weights, expert_ts = weights_of(6), CASES["one expert gets none, one gets all"]
    whole = functools.partial(in_groups, experts=6)
    got = value_and_gradients(whole, expert_ts, weights)
    want = value_and_gradients(in_groups, expert_ts, weights)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    masks = [
        str(jax.make_jaxpr(product)(jnp.ones((T, D)), jnp.ones((T, S)), expert_ts, weights)).count(
            "name=_where"
        )
        for product in (whole, in_groups)
    ]
    assert masks[1] - masks[0] == 4


def test_groups_that_are_computed_again_leave_the_last_product_out():
    weights, expert_ts = weights_of(6), CASES["one expert gets none, one gets all"]

    @jax.checkpoint
    def layer(x_td, weight_ts, weights):
        return x_td + in_groups(x_td, weight_ts, expert_ts, weights)

    def loss(*args):
        return jnp.sum(jnp.sin(layer(*args)))

    gradients = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))
    text = str(gradients(jnp.ones((T, D)), jnp.ones((T, S)), weights))
    assert text.count("ragged_dot_general[") == 3 + 2 + 6  # forward, again, of both operands


def test_the_drawing():
    expert_ts = jnp.array([[1], [0], [1], [1], [1], [0], [1], [0], [1], [2]])
    blocks = cut_blocks(jnp.arange(10.0)[:, None] + 1, expert_ts, 3, rows=4)
    assert blocks.used == 4
    assert blocks.expert_c.tolist()[:4] == [0, 1, 1, 2]
    empty = [10, 11, 12, 13]  # past the last token
    assert blocks.token_cr.tolist()[:4] == [
        [1, 5, 7, empty[3]],
        [0, 2, 3, 4],
        [6, 8, *empty[2:]],
        [9, *empty[1:]],
    ]
    assert blocks.weight_cr.tolist()[2] == [7, 9, 0, 0]


@pytest.mark.slow
@settings(max_examples=30)
@given(
    st.lists(st.integers(-2, 7), min_size=1, max_size=30),
    st.integers(1, 6),
    st.sampled_from([2, 8]),
)
def test_blocks_hold_every_held_pair_once(expert_t, experts, rows):
    expert_ts = jnp.array(expert_t, jnp.int32)[:, None]
    blocks = cut_blocks(jnp.ones(expert_ts.shape), expert_ts, experts, rows)
    token_cr, used = np.asarray(blocks.token_cr), int(blocks.used)
    assert used <= len(token_cr)
    pairs = [
        (int(token), int(expert))
        for row, expert in zip(token_cr, blocks.expert_c, strict=True)
        for token in row[row < len(expert_t)]
    ]
    held = [(token, e) for token, e in enumerate(expert_t) if 0 <= e < experts]
    assert sorted(pairs) == held
    assert (token_cr[used:] >= len(expert_t)).all()
    np.testing.assert_array_equal(blocks.weight_cr, token_cr < len(expert_t))


def test_blocks_follow_an_experts_share():
    assert block_rows(16384, 64) == 128
    assert block_rows(16384, 8) == 256  # the largest
    assert block_rows(8, 128) == 8  # the smallest
    assert block_rows(3000, 32) == 32


def test_tpus_alone_have_grouped_products():
    assert product_on("tpu", 100, 4).func is in_groups
    assert product_on("tpu", 100, 4).keywords == {"experts": 4}
    for platform in ("cpu", "gpu"):
        assert product_on(platform, 16384, 64).keywords == {"rows": 128, "each": 2.5}


def temporary_bytes(experts, dtype):
    t, s, d, f = 512, 8, 64, 32
    weights = jax.tree.map(lambda x: x.astype(dtype), weights_of(experts, d, f))
    product = product_on("cpu", t * s, experts)

    def loss(x_td, weight_ts, expert_ts, weights):
        return jnp.sum(product(x_td, weight_ts, expert_ts, weights) ** 2)

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 3)))
    args = (jnp.ones((t, d), dtype), jnp.ones((t, s)), chosen(experts, t=t, s=s), weights)
    memory = run.lower(*args).compile().memory_analysis()
    return memory.temp_size_in_bytes, sum(w.nbytes for w in weights)


@pytest.fixture
def optimized():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.first_by_default
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_number_of_experts(dtype):
    (few, few_bytes), (many, many_bytes) = (temporary_bytes(e, dtype) for e in (8, 64))
    # float32 gradients are summed where they are given back; others are copied there in the end.
    copied = 0 if dtype == "float32" else many_bytes - few_bytes
    assert many < 1.3 * few + copied
