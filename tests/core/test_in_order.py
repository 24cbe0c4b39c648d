"""What waits for other arrays keeps its values and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.config import MeshConfig
from opd_jax.core.in_order import after, complete_first
from opd_jax.core.mesh import make_mesh


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2))


@pytest.mark.parametrize("first", [0.0, -2.5, jnp.inf, -jnp.inf, jnp.nan])
def test_values_stay(mesh, first):
    x = jnp.array([1.5, -3.25, 0.0])
    other = jnp.array([[first, 1.0]])
    wait = jax.jit(lambda x, other: after(x, (other,), mesh))
    np.testing.assert_array_equal(wait(x, other), x * jnp.nan if np.isnan(first) else x)
    np.testing.assert_array_equal(wait(x.astype(jnp.int32), other), x.astype(jnp.int32))


def test_a_program_waits_on_several_cpus_alone(mesh):
    def operations(mesh):
        return str(jax.make_jaxpr(lambda x: after(x, (x,), mesh))(1.0))

    one = make_mesh(MeshConfig(), jax.devices()[:1])
    assert "add" in operations(mesh)
    assert "add" not in operations(one)
    assert "add" not in operations(None)


def test_gradients_wait_and_are_those_without_waiting(mesh):
    x, scale = jnp.arange(1.0, 5.0), jnp.array(3.0)

    def loss(x, scale, mesh):
        x, (scale,) = complete_first(jnp.sin(x), (scale,), mesh)
        return jnp.sum(x * scale)

    programs = [
        str(jax.make_jaxpr(jax.grad(loss), static_argnums=2)(x, scale, m)) for m in (mesh, None)
    ]
    assert [" min " in program for program in programs] == [True, False]
    found = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, scale, mesh)
    wanted = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, scale, None)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
