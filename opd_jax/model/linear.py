"""Products with weights whose gradient is written in the weight's own layout."""

from __future__ import annotations

from typing import cast

import jax


def linear(x: jax.Array, weight: jax.Array, contracted: int = 1) -> jax.Array:
    """`jnp.tensordot(x, weight, contracted)`: the last axes of `x` with the first of `weight`.

    The gradient that JAX derives for a weight comes transposed, and XLA for CPUs then copies the
    large operand of that product, element by element across its rows.
    """
    return cast(jax.Array, _linear(x, weight, contracted))  # `custom_vjp` hides the type


def _product(x: jax.Array, weight: jax.Array, contracted: int) -> jax.Array:
    last = tuple(range(x.ndim - contracted, x.ndim))
    return jax.lax.dot_general(x, weight, ((last, tuple(range(contracted))), ((), ())))


_linear = jax.custom_vjp(_product, nondiff_argnums=(2,))


def _fwd(
    x: jax.Array, weight: jax.Array, contracted: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, weight, contracted), (x, weight)


def _bwd(
    contracted: int, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    rows = tuple(range(x.ndim - contracted))
    out = tuple(range(len(rows), grad.ndim)), tuple(range(contracted, weight.ndim))
    x_grad = jax.lax.dot_general(grad, weight, (out, ((), ())))
    return x_grad, jax.lax.dot_general(x, grad, ((rows, rows), ((), ())))


_linear.defvjp(_fwd, _bwd)
