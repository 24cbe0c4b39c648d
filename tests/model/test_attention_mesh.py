"""Attention of rows whose tokens are cut over devices, against the oracle on whole rows."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import PartitionSpec
from test_attention import inputs

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.model import attention_kernels
from opd_jax.model.attention import attend_chunked
from opd_jax.model.attention_choice import attend_rows
from opd_jax.model.attention_kernels import splash_attention
from opd_jax.model.attention_mesh import Inputs, mirrored, on_each_device, places
from opd_jax.model.remat import remat


def cut_attention(mesh, block=8):
    local = functools.partial(attend_chunked, block=block, axis="context")
    return lambda *given: on_each_device(lambda mine: local(*mine), Inputs(*given), mesh)


def with_gradients(form, q, k, v, segments, grad):
    out, pull = jax.vjp(lambda q, k, v: form(q, k, v, segments), q, k, v)
    return out, *pull(grad)


MESHES = {
    "two": MeshConfig(fsdp=1, context=2),
    "four": MeshConfig(fsdp=1, context=4),
    "rows too": MeshConfig(fsdp=2, context=2),
    "heads too": MeshConfig(fsdp=1, tensor=2, context=2),
}


@pytest.mark.parametrize("t", [96, 44], ids=["tiles", "ragged tiles"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_packed_rows_forward_and_backward(mesh, t):
    given = inputs(t)
    got = jax.jit(functools.partial(with_gradients, cut_attention(make_mesh(mesh))))(*given)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, oracles.attention(*given), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("wanted", ["auto", "xla"])
def test_every_form_reads_the_tokens_of_other_devices(wanted):
    q, k, v, segments, _ = given = inputs(40)
    form = functools.partial(attend_rows, wanted, make_mesh(MESHES["four"]))
    want = oracles.attention(*given)[0]
    np.testing.assert_allclose(jax.jit(form)(q, k, v, segments), want, atol=2e-5)


def test_one_segment_per_row():
    """Of parts with padding at the end: later queries do not read it."""
    q, k, v, segments, grad = inputs(44)
    form = cut_attention(make_mesh(MESHES["four"]))
    want = oracles.attention(q, k, v, np.zeros_like(segments), grad)[0]
    np.testing.assert_allclose(jax.jit(form)(q, k, v, None), want, atol=2e-5)


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_every_device_has_as_many_tiles(devices):
    """A block of queries at place i of the row reads i + 1 blocks of keys."""
    mesh = make_mesh(MeshConfig(fsdp=1, context=devices))
    spec = PartitionSpec("context")
    trade = jax.shard_map(
        lambda x: mirrored(x, "context", 0), mesh=mesh, in_specs=spec, out_specs=spec
    )
    blocks = jnp.arange(devices * 6)
    traded = trade(blocks)
    np.testing.assert_array_equal(trade(traded), blocks)
    told = jax.shard_map(lambda: places(6, "context"), mesh=mesh, in_specs=(), out_specs=spec)()
    np.testing.assert_array_equal(traded, told)
    assert np.unique(jnp.sum(traded.reshape(devices, 6) + 1, axis=1)).size == 1


def test_key_and_value_gradients_are_scattered_in_float32():
    """Their sum over the devices is never rounded to bfloat16."""
    given = [x if x.dtype == np.int32 else jnp.asarray(x, jnp.bfloat16) for x in inputs(32)]
    form = functools.partial(with_gradients, cut_attention(make_mesh(MESHES["four"])))
    text = jax.jit(form).lower(*given).as_text()
    scattered = re.findall(r"reduce_scatter.*?\}\) : \(tensor<(\S+)>\)", text, re.DOTALL)
    assert [x.split("x")[-1] for x in scattered] == ["f32", "f32"]


@pytest.mark.parametrize(("policy", "forwards"), [("none", 1), ("full", 2)])
def test_tiles_are_computed_again_only_where_the_policy_says_so(policy, forwards):
    q, k, v, segments, _ = inputs(32)
    form = cut_attention(make_mesh(MESHES["four"]))
    body = remat(lambda q, k, v: form(q, k, v, segments), policy)

    def products(function):
        return str(jax.make_jaxpr(function)(q, k, v)).count("dot_general[")

    once = products(lambda *qkv: form(*qkv, segments))
    both = products(jax.grad(lambda *qkv: jnp.sum(body(*qkv)), argnums=(0, 1, 2)))
    assert both == 6 + once * forwards  # 5 of the backward pass's tiles, and dO * O


@pytest.mark.parametrize(
    ("t", "mesh"),
    [
        pytest.param(600, MESHES["two"], marks=pytest.mark.slow),
        pytest.param(1200, MESHES["four"], marks=pytest.mark.slow),
        (512, MESHES["heads too"]),
    ],
    ids=["two", "four", "heads too"],
)
def test_the_kernel_of_tpus(t, mesh, monkeypatch):
    monkeypatch.setattr(attention_kernels, "SPLASH_BLOCK", 128)
    given = inputs(t)
    kernel = functools.partial(splash_attention, mesh=make_mesh(mesh), interpret=True)
    got = jax.jit(functools.partial(with_gradients, kernel))(*given)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, oracles.attention(*given), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5, err_msg=name)
