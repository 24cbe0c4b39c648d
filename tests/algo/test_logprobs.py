import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax.algo import chosen_grads, logprobs
from opd_jax.algo.chunks import cut_time, join_time
from opd_jax.algo.logprobs import chosen_logprobs
from opd_jax.algo.top_k import top_k_logprobs
from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh, put_batch, sharding_for
from opd_jax.fit.collectives import collectives
from opd_jax.fit.hlo import parse_module


def arrays(b, t, d, v, s, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(b, t, d)).astype(np.float32)
    head = rng.normal(size=(v, d)).astype(np.float32)
    ids = rng.integers(0, v, (b, t, s)).astype(np.int32)
    weight = rng.normal(size=(b, t, s)).astype(np.float32)
    return hidden, head, ids, weight


# 151,936 and 4,288 are no powers of two and no multiples of a block.
MESHES = pytest.mark.parametrize(
    "mesh", [None, MeshConfig(fsdp=2, tensor=2)], ids=["one device", "vocabulary cut in two"]
)


def made(mesh):
    return mesh and make_mesh(mesh)


@MESHES
@pytest.mark.parametrize(
    ("v", "rows"), [(6, 1), (130, 7), (4288, None), (4288, 1000), (151_936, None)]
)
def test_chosen_logprobs_equal_the_oracle(v, rows, mesh):
    hidden, head, ids, _ = arrays(2, 9, 8, v, 3)
    out = chosen_logprobs(hidden, head, ids, made(mesh), rows)
    full = oracles.log_softmax(hidden.astype(np.float64) @ head.T)
    want = np.take_along_axis(full, ids, axis=-1)
    np.testing.assert_allclose(out.logprob_bts, want, atol=2e-5)
    np.testing.assert_allclose(out.entropy_bt, -(np.exp(full) * full).sum(-1), atol=2e-5)


@pytest.mark.first_by_default
@MESHES
@pytest.mark.parametrize(
    ("rows", "keep"), [(1, False), (4, True), (7, False), (7, True), (None, True)]
)
def test_gradient_equals_autodiff_of_the_plain_form(rows, keep, mesh, monkeypatch):
    monkeypatch.setattr(logprobs, "BLOCK_LOGITS", 100)
    for limit in ("ROWS", "MESH_ROWS"):  # the chosen rows too come in chunks
        monkeypatch.setattr(chosen_grads, limit, 100)
    hidden, head, ids, weight = arrays(3, 7, 6, 38, 2)

    def plain(hidden, head):
        every = jax.nn.log_softmax(hidden @ head.T)
        return jnp.sum(weight * jnp.take_along_axis(every, ids, axis=-1))

    def ours(hidden, head):
        found = chosen_logprobs(hidden, head, ids, made(mesh), rows, keep_logits=keep)
        return jnp.sum(weight * found.logprob_bts)

    for got, want in zip(
        jax.grad(ours, (0, 1))(hidden, head), jax.grad(plain, (0, 1))(hidden, head), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.first_by_default
@pytest.mark.parametrize("parts", [2, 4])
def test_gradient_where_a_mesh_cuts_the_tokens(parts, monkeypatch):
    monkeypatch.setattr(logprobs, "BLOCK_LOGITS", 50)
    for limit in ("ROWS", "MESH_ROWS"):  # chunks of one token of each part
        monkeypatch.setattr(chosen_grads, limit, 50)
    hidden, head, ids, weight = arrays(2, 12, 8, 38, 2)

    def total(mesh, hidden, head):
        return jnp.sum(weight * chosen_logprobs(hidden, head, ids, mesh, 7).logprob_bts)

    mesh = make_mesh(MeshConfig(fsdp=1, context=parts))
    cut = put_batch(mesh, hidden)
    for got, want in zip(
        jax.jit(jax.grad(functools.partial(total, mesh), (0, 1)))(cut, head),
        jax.grad(functools.partial(total, None), (0, 1))(hidden, head),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(("chunk", "ways"), [(5, 1), (4, 2), (6, 3), (12, 1)])
def test_every_part_gives_its_share_of_every_chunk(chunk, ways):
    x = np.arange(2 * 12 * 3).reshape(2, 12, 3)
    cut = cut_time(x, chunk, ways)
    np.testing.assert_array_equal(join_time(cut, 12, ways), x)
    parts = x.reshape(2, ways, -1, 3)[:, :, : chunk // ways]
    np.testing.assert_array_equal(cut[0], parts.reshape(2, chunk, 3))


@MESHES
def test_gradient_at_151936_tokens_equals_the_oracle(mesh):
    """With z the logits, d logprob[i] / d z = (1 at i) - softmax(z)."""
    hidden, head, ids, weight = arrays(2, 9, 8, 151_936, 3)

    def ours(hidden, head):
        return jnp.sum(weight * chosen_logprobs(hidden, head, ids, made(mesh)).logprob_bts)

    wide_hidden, wide_head = hidden.astype(np.float64), head.astype(np.float64)
    probability = np.exp(oracles.log_softmax(wide_hidden @ wide_head.T))
    logit_grad = -weight.sum(-1, keepdims=True, dtype=np.float64) * probability
    for place in np.ndindex(ids.shape):
        logit_grad[(*place[:2], ids[place])] += weight[place]
    wanted = (logit_grad @ wide_head, np.einsum("btv,btd->vd", logit_grad, wide_hidden))
    for got, want in zip(jax.grad(ours, (0, 1))(hidden, head), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.first_by_default
@MESHES
@pytest.mark.parametrize("keep", [False, True])
def test_a_certain_token_has_log_prob_0_however_products_are_rounded(mesh, keep, monkeypatch):
    """Logits of some 100,000 are off by 0.01 from a product whose terms are added otherwise."""
    monkeypatch.setattr(logprobs, "KEPT_LOGITS", 2**27 if keep else 0)
    hidden, head, _, _ = arrays(2, 9, 2048, 50, 1)
    hidden *= 1000
    ids = np.argmax(hidden @ head.T, axis=-1).astype(np.int32)
    # Through the gradient as well: its forward pass is the one that keeps logits.
    chosen, _ = jax.vjp(
        lambda h: chosen_logprobs(h, head, ids[..., None], made(mesh), 7)[0], hidden
    )
    np.testing.assert_array_equal(chosen[..., 0], 0)
    top = top_k_logprobs(hidden, head, ids, 2, made(mesh), chunk_tokens=4)
    np.testing.assert_array_equal(top.logprob_bt, 0)


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.floats(-30, 30))
def test_a_shift_of_all_logits_changes_nothing(seed, shift):
    hidden, head, ids, _ = arrays(1, 3, 4, 11, 2, seed)
    # A constant column in `hidden` with a constant column in `head` adds `shift` to every logit.
    hidden = np.concatenate([hidden, np.ones((1, 3, 1), np.float32)], axis=-1)
    zero = np.concatenate([head, np.zeros((11, 1), np.float32)], axis=1)
    moved = np.concatenate([head, np.full((11, 1), shift, np.float32)], axis=1)
    a = chosen_logprobs(hidden, zero, ids).logprob_bts
    b = chosen_logprobs(hidden, moved, ids).logprob_bts
    np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_a_frequent_token_is_a_float32_sum(dtype):
    """A sum in bfloat16 stops growing after 256 equal terms: nearly half of this one was lost."""
    t, d, v = 4096, 8, 16
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(1 + 0.1 * rng.normal(size=(1, t, d)), dtype)
    head = jnp.asarray(rng.normal(size=(v, d)), jnp.float32)
    ids = np.where(rng.random((1, t, 1)) < 0.2, 3, rng.integers(0, v, (1, t, 1))).astype(np.int32)
    got = jax.grad(lambda head: jnp.sum(chosen_logprobs(hidden, head, ids).logprob_bts))(head)
    exact, used = (np.asarray(x, np.float64) for x in (hidden, head.astype(dtype)))
    slope = np.eye(v)[ids[0, :, 0]] - np.exp(oracles.log_softmax(exact[0] @ used.T))
    want = slope.T @ exact[0]
    assert got.dtype == jnp.float32
    off = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert off.max() < (1e-5 if dtype == jnp.float32 else 4e-3)


@MESHES
@pytest.mark.parametrize(("v", "k"), [(50, 4), (50, 30), (50, 50), (151_936, 4)])
def test_top_k_is_normalised_over_the_whole_vocabulary_and_sorted(v, k, mesh):
    hidden, head, ids, _ = arrays(2, 5, 8, v, 1)
    out = top_k_logprobs(hidden, head, ids[..., 0], k, made(mesh), chunk_tokens=3)
    full = oracles.log_softmax(hidden.astype(np.float64) @ head.T)
    order = np.argsort(-full, axis=-1)[..., :k]
    np.testing.assert_allclose(out.entropy_bt, -(np.exp(full) * full).sum(-1), atol=2e-5)
    np.testing.assert_array_equal(out.ids_btk, order)
    np.testing.assert_allclose(out.logprob_btk, np.take_along_axis(full, order, -1), atol=2e-5)
    np.testing.assert_allclose(out.logprob_bt, np.take_along_axis(full, ids, -1)[..., 0], atol=2e-5)


@pytest.mark.slow
def test_kept_logits_change_nothing():
    """Few tokens keep their logits for the backward pass, in blocks and a smaller last one."""
    keys = jax.random.split(jax.random.key(5), 3)
    hidden = jax.random.normal(keys[0], (2, 3, 16))
    head = jax.random.normal(keys[1], (37, 16))
    ids = jax.random.randint(keys[2], (2, 3, 2), 0, 37)

    def run(copies: int, block_rows: int):
        many = jnp.tile(hidden, (copies, 1, 1))

        def total(many, head):
            found = chosen_logprobs(many, head, jnp.tile(ids, (copies, 1, 1)), None, block_rows)
            return jnp.sum(jnp.sin(found.logprob_bts)) / copies, found.entropy_bt[:2]

        return jax.value_and_grad(total, (0, 1), has_aux=True)(many, head)

    (kept, kept_entropy), kept_grads = run(1, 8)  # 6 tokens, fewer than the width
    (again, entropy), grads = run(4, 8)  # 24 tokens: the logits are computed again
    np.testing.assert_allclose(kept, again, rtol=1e-6)
    np.testing.assert_allclose(kept_entropy, entropy, rtol=1e-6)
    np.testing.assert_allclose(kept_grads[0], 4 * grads[0][:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kept_grads[1], grads[1], rtol=1e-5, atol=1e-5)


@pytest.mark.first_by_default
@MESHES
@pytest.mark.parametrize("used", [19, 30, 36])
@pytest.mark.parametrize(("rows", "keep"), [(7, True), (7, False), (None, True)])
def test_padded_rows_have_no_probability_and_no_gradient(rows, keep, used, mesh, monkeypatch):
    """In the middle of a block, as whole blocks, and as a whole shard of the vocabulary."""
    if not keep:
        monkeypatch.setattr(logprobs, "KEPT_LOGITS", 0)
    hidden, head, ids, weight = arrays(1, 5, 6, 38, 2)
    ids, padded = ids % used, head.copy()
    padded[used:] = 50.0  # the likeliest by far, if they counted

    def plain(hidden, head):
        every = jax.nn.log_softmax(hidden @ head.T)
        entropy = -jnp.sum(jnp.exp(every) * every, axis=-1)
        chosen = jnp.take_along_axis(every, ids, axis=-1)
        return jnp.sum(weight * chosen), (chosen, entropy)

    def ours(hidden, head):
        out = chosen_logprobs(hidden, head, ids, made(mesh), rows, padded_from=used)
        return jnp.sum(weight * out.logprob_bts), out

    got, out = jax.grad(ours, (0, 1), has_aux=True)(hidden, padded)
    want, (chosen, entropy) = jax.grad(plain, (0, 1), has_aux=True)(hidden, head[:used])
    np.testing.assert_allclose(out.logprob_bts, chosen, atol=1e-6)
    np.testing.assert_allclose(out.entropy_bt, entropy, atol=1e-6)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1][:used], want[1], atol=1e-5)
    assert not np.any(got[1][used:])
    top = top_k_logprobs(hidden, padded, ids[..., 0], used, made(mesh), padded_from=used)
    np.testing.assert_allclose(top.logprob_bt, chosen[..., 0], atol=1e-6)
    np.testing.assert_allclose(top.entropy_bt, entropy, atol=1e-6)
    assert top.ids_btk.max() == used - 1
    assert top.logprob_btk.min() > -1e3


@pytest.mark.parametrize("axes", [{"fsdp": 1, "data": 4}, {"data": 2}, {"data": 2, "tensor": 2}])
def test_copies_of_the_head_add_their_gradients_up_once(axes, monkeypatch):
    """However many parts the chosen rows come in; the gradients are those of one device."""
    hidden, head, ids, weight = arrays(8, 12, 64, 2048, 5)
    hidden /= 8  # logits of order one
    mesh = make_mesh(MeshConfig(**axes))
    cut = sharding_for(mesh, ("vocab", "embed"), head.shape, "head")

    def gradients(mesh):
        def total(hidden, head):
            return jnp.sum(weight * chosen_logprobs(hidden, head, ids, mesh).logprob_bts)

        return jax.grad(total, (0, 1))

    given = put_batch(mesh, hidden), jax.device_put(head, cut)
    summed = []
    for rows in (2**25, 1):
        monkeypatch.setattr(chosen_grads, "MESH_ROWS", rows)
        step = jax.jit(gradients(mesh), out_shardings=(given[0].sharding, cut))
        program = step.lower(*given).compile()
        sent = collectives(parse_module(program.as_text()), dict(mesh.shape))
        summed.append(sum(x.sent_bytes for x in sent if x.kind == "all-reduce"))
        for got, want in zip(program(*given), gradients(None)(hidden, head), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)
    assert summed[0] > 0
    assert summed[0] == summed[1]


def test_no_device_holds_a_whole_head_or_its_whole_gradient():
    """Both go a block at a time. With so many tokens no logits are kept."""
    hidden, head, ids, weight = arrays(4, 32, 64, 2**17, 1)
    mesh = make_mesh(MeshConfig(fsdp=4))

    def total(hidden, head):
        return jnp.sum(weight * chosen_logprobs(hidden, head, ids, mesh).logprob_bts)

    cut = sharding_for(mesh, ("vocab", "embed"), head.shape, "head")
    given = put_batch(mesh, hidden), jax.device_put(head, cut)
    step = jax.jit(jax.grad(total, (0, 1)), out_shardings=(given[0].sharding, cut))
    assert step.lower(*given).compile().memory_analysis().temp_size_in_bytes < head.nbytes / 2
