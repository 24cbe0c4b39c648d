"""Gradients of stacked layers, added to their sums where they arise.

The gradient of a scan over layers is a stack of its own, as large as the parameters; to add it to
that of the micro-batches before takes a pass over both. Here each layer's gradient is added to its
row of the sums instead. These travel with the scan in a second carry, which the forward pass hands
through: its cotangent at the scan's end is what was summed before, at its beginning the new sum.
"""

from __future__ import annotations

from typing import Any, cast

import jax

Params = dict[str, Any]
STACKED = ("layers", "dense", "moe")
"""The groups of parameters with a leading axis of layers."""


def sum_gradients(layer: Params, sums: Params, rows: dict[str, jax.Array]) -> tuple[Params, Params]:
    """Both as they are; going backwards, the cotangent of `layer` is added to that of `sums`.

    Args:
        layer: parameters of one layer, in any dtype. They get no cotangent of their own.
        sums: by group, stacks as those that the layer was cut from. Their values do not matter.
        rows: int32, by group of the layer's parameters: the layer's row in the group's stacks.
    """
    return cast(tuple[Params, Params], _sum_gradients(layer, sums, rows))  # hidden by `custom_vjp`


@jax.custom_vjp
def _sum_gradients(
    layer: Params, sums: Params, rows: dict[str, jax.Array]
) -> tuple[Params, Params]:
    return layer, sums


def _forward(
    layer: Params, sums: Params, rows: dict[str, jax.Array]
) -> tuple[tuple[Params, Params], dict[str, jax.Array]]:
    return (layer, sums), rows


def _backward(
    rows: dict[str, jax.Array], cotangents: tuple[Params, Params]
) -> tuple[None, Params, None]:
    layer, sums = cotangents
    added = {
        group: {
            name: _added(stack, rows[group], layer[name]) for name, stack in sums[group].items()
        }
        for group in rows
    }
    return None, {**sums, **added}, None


def _added(stack: jax.Array, row: jax.Array, x: jax.Array) -> jax.Array:
    return stack.at[row].add(x.astype(stack.dtype), mode="promise_in_bounds")


_sum_gradients.defvjp(_forward, _backward)
