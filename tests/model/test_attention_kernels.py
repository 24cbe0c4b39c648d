"""The kernels themselves, interpreted on CPU; `tests/fit` compiles them for their real targets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.errors import ConfigError
from opd_jax.model import attention_kernels
from opd_jax.model.attention_kernels import splash_attention, splash_block, triton_attention
from opd_jax.model.remat import remat

KERNELS = [splash_attention, triton_attention]
names = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks in few tokens: 128, the least of splash, and 16, the least of Triton."""
    monkeypatch.setattr(attention_kernels, "SPLASH_BLOCK", 128)
    small = attention_kernels.triton.BlockSizes(16, 16, 16, 16, 16, 16)
    monkeypatch.setattr(attention_kernels, "triton_blocks", lambda *_: small)


def inputs(kernel, head_dim, heads=4, kv_heads=2):
    """q, k, v, segments and the gradient of the output; no whole number of blocks, packed rows."""
    t = 150 if kernel is splash_attention else 39
    rng = np.random.default_rng(0)
    q, k, v, grad = (
        rng.normal(size=(2, t, n, head_dim)).astype(np.float32)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    segments = np.sort(rng.integers(0, 3, (2, t)), axis=1).astype(np.int32)
    return q, k, v, segments, grad


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(kernel, mesh, q, k, v, segments, grad):
    def run(q, k, v):
        return kernel(q, k, v, segments, mesh, interpret=True)

    out, pull = jax.vjp(run, q, k, v)
    return out, *pull(grad)


@names
@pytest.mark.parametrize(
    ("head_dim", "mesh"),
    [(64, None), (128, MeshConfig(fsdp=2, tensor=2))],
    ids=["one device, h=64", "four devices, h=128"],
)
def test_packed_rows_forward_and_backward(kernel, head_dim, mesh):
    mesh = mesh and make_mesh(mesh)
    given = inputs(kernel, head_dim)
    got = with_gradients(kernel, mesh, *given)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, oracles.attention(*given), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5, err_msg=name)


@names
def test_one_segment_per_row_in_bfloat16(kernel):
    q, k, v, segments, grad = inputs(kernel, 64, heads=2, kv_heads=1)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, grad)]
    *half_inputs, half_grad = half
    got = with_gradients(kernel, None, *half_inputs, None, half_grad)
    exact = (np.asarray(x, np.float64) for x in half_inputs)
    want = oracles.attention(*exact, np.zeros_like(segments), np.asarray(half_grad, np.float64))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert error < 0.01, f"{name}: relative error {error}"


@names
def test_a_mesh_that_does_not_divide_the_kv_heads(kernel):
    q, k, v, segments, _ = inputs(kernel, 64, kv_heads=1)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    with pytest.raises(ConfigError, match=r"attention\.k_btkh: dim 'kv_heads'=1 is not divisible"):
        kernel(q, k, v, segments, mesh, interpret=True)


def test_blocks_are_whole_lanes_and_no_longer_than_the_row(monkeypatch):
    monkeypatch.undo()
    assert [splash_block(t) for t in (1, 128, 129, 500, 513, 16384)] == [128, 128, 256] + [512] * 3


@pytest.mark.parametrize(("policy", "forwards"), [("none", 1), ("full", 2)])
def test_the_kernel_runs_again_only_where_the_policy_says_so(policy, forwards):
    """Triton's; `tests/fit/test_step_compiles.py` counts both kernels in compiled programs."""
    q, k, v, segments, _ = inputs(triton_attention, 64)
    attend = functools.partial(triton_attention, mesh=None, interpret=True)
    body = remat(lambda q, k, v: attend(q, k, v, segments), policy)

    def calls(function):
        return str(jax.make_jaxpr(function)(q, k, v)).count("pallas_call[")

    once = calls(lambda *qkv: attend(*qkv, segments))
    both = calls(jax.grad(lambda *qkv: jnp.sum(body(*qkv)), argnums=(0, 1, 2)))
    assert both - 2 == forwards * once  # the backward pass is two kernels
