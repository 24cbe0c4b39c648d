"""FLOPs against hand counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from opd_jax.config import MeshConfig
from opd_jax.core import flops
from opd_jax.core.flops import count_flops
from opd_jax.core.mesh import make_mesh
from opd_jax.model.attention import attend_chunked
from opd_jax.model.attention_mesh import Inputs, on_each_device

A, B = jnp.zeros((3, 5)), jnp.zeros((5, 7))
SQUARE = jnp.zeros((4, 4))


def counted(fn, *args, given=None):
    return count_flops(jax.make_jaxpr(fn)(*args), given)


def test_a_product():
    assert counted(jnp.matmul, A, B) == 2 * 3 * 5 * 7
    batched = jnp.zeros((2, 3, 5)), jnp.zeros((2, 5, 7))
    assert counted(lambda x, y: jnp.einsum("bij,bjk->bki", x, y), *batched) == 2 * 2 * 3 * 5 * 7


def test_its_gradient_under_jit_is_twice_as_much():
    grad = jax.grad(lambda x, y: jnp.sum((x @ y) ** 2), argnums=(0, 1))
    assert counted(jax.jit(grad), A, B) == 3 * 2 * 3 * 5 * 7


def test_layers_are_looked_at_once_however_many_there_are(monkeypatch):
    """At long rows a layer has thousands of products."""
    seen, product = [], flops.PRODUCTS["dot_general"]
    monkeypatch.setitem(flops.PRODUCTS, "dot_general", lambda eqn: seen.append(0) or product(eqn))

    def looked_at(layers):
        seen.clear()
        model, params = tiny(num_layers=layers)
        tokens = np.zeros((1, 8), np.int32)
        counted(functools.partial(model.forward, params), tokens, tokens, given=[None, None])
        return len(seen)

    assert looked_at(6) == looked_at(2) > 0


def test_a_scan_of_products():
    def stacked(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    weights = jnp.zeros((6, 4, 4))
    assert counted(stacked, SQUARE, weights) == 6 * 2 * 4**3
    # Nothing but the inputs is kept: forward twice, and two products for the gradients.
    again = jax.grad(lambda x, w: jnp.sum(jax.checkpoint(stacked)(x, w)), argnums=1)
    assert counted(again, SQUARE, weights) == 4 * 6 * 2 * 4**3


def test_a_loop_within_a_scan_that_depends_on_its_trip():
    """Tiles on and below the diagonal."""

    def triangle(x):
        def row(x, i):
            return jax.lax.fori_loop(0, i + 1, lambda _, x: x @ x, x), None

        return jax.lax.scan(row, x, jnp.arange(5))[0]

    assert counted(triangle, SQUARE) == 15 * 2 * 4**3


def test_tiles_of_rows_that_a_mesh_cuts():
    """What a device does is the same on all of them: together, what one does."""
    shape = jnp.zeros((1, 96, 2, 8))

    def loss(axis, q, k, v):
        tiles = functools.partial(attend_chunked, block=12, axis=axis)
        mesh = make_mesh(MeshConfig(fsdp=1, context=4)) if axis else None
        return jnp.sum(on_each_device(lambda mine: tiles(*mine), Inputs(q, k, v, None), mesh))

    whole, part = (
        counted(jax.grad(functools.partial(loss, axis), (0, 1, 2)), shape, shape, shape)
        for axis in (None, "context")
    )
    assert part == whole / 4


def test_a_loop_whose_end_follows_from_an_input():
    def used(x, mask):
        return jax.lax.fori_loop(0, jnp.sum(mask, dtype=jnp.int32), lambda _, x: x @ x, x)

    mask = np.array([True, False, True, True])
    assert counted(used, SQUARE, mask, given=[None, mask]) == 3 * 2 * 4**3
    with pytest.raises(ValueError, match="trip count does not follow"):
        counted(used, SQUARE, mask)


def test_a_choice():
    def chosen(i, x):
        return jax.lax.cond(i > 2, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert counted(chosen, 0, SQUARE) == 2 * 2 * 4**3
    assert counted(chosen, 0, SQUARE, given=[np.int32(1), None]) == 2 * 4**3


def test_products_by_groups_of_rows():
    rows, groups, sizes = jnp.zeros((6, 5)), jnp.zeros((3, 5, 7)), jnp.array([1, 2, 3])
    assert counted(jax.lax.ragged_dot, rows, groups, sizes) == 2 * 6 * 5 * 7
