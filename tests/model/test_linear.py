"""Products with weights against `tensordot`, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.model.linear import linear


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "contracted"),
    [((2, 3, 4), (4, 5), 1), ((2, 3, 4), (4, 2, 5), 1), ((2, 3, 4, 5), (4, 5, 6), 2)],
)
def test_equals_tensordot(x_shape, weight_shape, contracted):
    keys = jax.random.split(jax.random.key(0), 2)
    x, weight = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], weight_shape)

    def total(product):
        def run(x, weight):
            found = product(x, weight, contracted)
            return jnp.sum(jnp.sin(found)), found

        return jax.value_and_grad(run, (0, 1), has_aux=True)(x, weight)

    (_, mine), grads = total(linear)
    (_, plain), plain_grads = total(jnp.tensordot)
    np.testing.assert_allclose(mine, plain, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, plain_grads, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
