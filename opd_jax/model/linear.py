"""Products with weights whose gradient is written in the weight's own layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import jax

CONTRACTED = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w_gate": 1, "w_up": 1, "w_down": 1}
"""The dense weights of a layer, with how many of their leading axes are inputs."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """Stands for `weight + scale * a b`, a product of low rank; `weight` has no gradient.

    A leaf of the parameters can be replaced by it where `linear` is what uses the leaf.
    """

    weight: jax.Array
    a: jax.Array  # [inputs, rank]
    b: jax.Array  # [rank, outputs]
    scale: float = field(metadata={"static": True})


def linear(x: jax.Array, weight: jax.Array | Adapted, contracted: int = 1) -> jax.Array:
    """`jnp.tensordot(x, weight, contracted)`: the last axes of `x` with the first of `weight`.

    The gradient that JAX derives for a weight comes transposed, and XLA for CPUs then copies the
    large operand of that product, element by element across its rows.
    """
    if isinstance(weight, Adapted):
        low = linear(linear(x, weight.a, contracted), weight.b)
        # Not `_linear`, which would make the frozen weight's gradient, too.
        return _product(x, jax.lax.stop_gradient(weight.weight), contracted) + weight.scale * low
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
