"""Log-probs that nobody reads are left out, and change nothing of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.algo import needed
from opd_jax.algo.logprobs import chosen_logprobs
from opd_jax.algo.needed import over_the_first, to_the_front
from opd_jax.config import MeshConfig
from opd_jax.core.flops import count_flops
from opd_jax.core.mesh import make_mesh

B, T, D, V, S = 3, 100, 8, 70, 2


@pytest.fixture
def arrays(monkeypatch):
    monkeypatch.setattr(needed, "LEAST", 1)
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(B, T, D)), rng.normal(size=(B, T, S))
    ids = rng.integers(0, V, (B, T, S)).astype(np.int32)
    return hidden.astype(np.float32), rng.normal(size=(V, D)).astype(np.float32), ids, weight


def some(count):
    mask = np.zeros(B * T, bool)
    mask[np.random.default_rng(1).permutation(B * T)[:count]] = True
    return mask.reshape(B, T)


@pytest.mark.first_by_default
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("count", [231, 0, 1, 160, 161, 299, 300])
def test_the_needed_are_what_they_are_with_all_and_the_others_are_0(arrays, count, keep):
    hidden, head, ids, weight = arrays
    mask = some(count)
    weight = np.where(mask[..., None], weight, 0)

    def total(hidden, head, mask):
        found = chosen_logprobs(hidden, head, ids, None, 32, keep_logits=keep, needed_bt=mask)
        return jnp.sum(weight * found.logprob_bts), found

    gradients = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    grads, found = gradients(hidden, head, mask)
    want_grads, want = gradients(hidden, head, None)
    for got, expected in zip(found, want, strict=True):
        shown = mask[..., None] if got.ndim == 3 else mask
        np.testing.assert_allclose(got, np.where(shown, expected, 0), atol=2e-5)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_the_smallest_number_that_holds_them_runs():
    ran = jax.jit(lambda count: over_the_first(count, 512, jnp.int32))
    counts = [0, 1, 256, 257, 320, 321, 384, 385, 448, 449, 512]
    expected = [256, 256, 256, 320, 320, 384, 384, 448, 448, 512, 512]
    assert [int(ran(count)) for count in counts] == expected
    assert over_the_first(None, 512, lambda n: n) == 512
    odd = jax.jit(lambda count: over_the_first(count, 261, jnp.int32))
    assert [int(odd(count)) for count in (144, 145, 256, 261)] == [144, 176, 261, 261]


def test_fewer_are_fewer_operations(arrays):
    hidden, head, ids, _ = arrays

    def total(hidden, head, mask):
        return jnp.sum(chosen_logprobs(hidden, head, ids, None, 32, needed_bt=mask).logprob_bts)

    def operations(count):
        given = (hidden, head, some(count))
        return count_flops(jax.make_jaxpr(jax.grad(total, (0, 1)))(*given), given)

    half, most, every = map(operations, (100, 230, 300))
    assert half < most < every
    assert half == pytest.approx(every * 160 / 300, rel=0.01)


def test_only_one_cpu_with_enough_positions_and_a_large_head_chooses():
    mask = some(10)
    one = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    head = jax.ShapeDtypeStruct((2**15, 32), jnp.float32)
    assert to_the_front(mask, head, None) is not None
    assert to_the_front(mask, head, one) is not None
    assert to_the_front(None, head, None) is None
    assert to_the_front(mask[:, : needed.FEWEST // B], head, None) is None
    assert to_the_front(mask, jax.ShapeDtypeStruct((2**14, 63), jnp.float32), None) is None
    assert to_the_front(mask, head, make_mesh(MeshConfig(fsdp=2, tensor=2))) is None
