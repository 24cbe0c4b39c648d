"""Attention on a mesh: each device computes its own rows, heads and queries.

Where the mesh axis `context` cuts the tokens of rows, a device's queries read the keys and values
of all devices of that axis. They are gathered, layer by layer; their gradients are summed and
scattered back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from opd_jax.core.mesh import sharding_for


class Inputs(NamedTuple):
    """What every implementation takes."""

    q_btnh: jax.Array
    k_btkh: jax.Array
    v_btkh: jax.Array
    segments_bt: jax.Array | None


def on_each_device(
    local: Callable[..., jax.Array], inputs: Inputs, mesh: Mesh | None, *more: tuple[Any, Any]
) -> jax.Array:
    """`local` of each device's part of the inputs, under `shard_map`.

    Args:
        more: further arguments of `local`, each with the `PartitionSpec` of its arrays.

    Raises:
        ConfigError: the mesh does not divide rows, tokens, heads or kv heads.
    """
    if mesh is None or mesh.size == 1:
        return local(inputs, *(x for x, _ in more))
    kv_axes = ("batch", "time", "kv_heads", "head_dim")
    axes = (("batch", "time", "heads", "head_dim"), kv_axes, kv_axes, ("batch", "time"))
    specs = tuple(
        PartitionSpec()  # stands for no array
        if x is None
        else sharding_for(mesh, logical, x.shape, f"attention.{name}").spec
        for name, x, logical in zip(Inputs._fields, inputs, axes, strict=True)
    )

    def run(mine: tuple[Any, ...], *others: Any) -> jax.Array:
        return local(Inputs(*mine), *others)

    in_specs = (specs, *(spec for _, spec in more))
    # Pallas calls do not say over which mesh axes their results vary, so that check is off.
    mapped = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=specs[0], check_vma=False)
    return mapped(tuple(inputs), *(x for x, _ in more))


def mirrored(x: jax.Array, axis: str | None, dim: int) -> jax.Array:
    """Within `shard_map`, the second half of `dim` from the device at the mirrored place of `axis`.

    Later queries read more keys. With these halves every device has as many pairs to compute, and
    the same again gives each half back. Four devices, with eight halves of a row:

        of the row    0 1 | 2 3 | 4 5 | 6 7
        to compute    0 7 | 2 5 | 4 3 | 6 1
    """
    if axis is None:
        return x
    first, second = jnp.split(x, 2, dim)
    last = jax.lax.axis_size(axis) - 1
    second = jax.lax.ppermute(second, axis, [(i, last - i) for i in range(last + 1)])
    return jnp.concatenate([first, second], dim)


def mirrored_halves(parts: int) -> np.ndarray:
    """[parts, 2]: which halves of a row's parts each device has after `mirrored`."""
    halves = np.arange(2 * parts).reshape(parts, 2)
    return np.stack([halves[:, 0], halves[::-1, 1]], axis=1)


def places(count: int, axis: str | None) -> jax.Array:
    """int32 [count]: where in the row this device's blocks of tokens lie after `mirrored`."""
    if axis is None:
        return jnp.arange(count)
    halves = jnp.asarray(mirrored_halves(jax.lax.axis_size(axis)), jnp.int32)
    mine = halves[jax.lax.axis_index(axis)]
    return (mine[:, None] * (count // 2) + jnp.arange(count // 2)[None]).reshape(count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def whole_rows(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Within `shard_map`: all devices' parts of `dim`.

    Gradients are summed in float32, unless the compiler rounds its sums as it likes.
    """
    return jax.lax.all_gather(x, axis, axis=dim, tiled=True)


def _whole_rows_fwd(x: jax.Array, axis: str, dim: int) -> tuple[jax.Array, None]:
    return cast(jax.Array, whole_rows(x, axis, dim)), None  # `custom_vjp` hides the type


def _whole_rows_bwd(axis: str, dim: int, _: None, grad: jax.Array) -> tuple[jax.Array]:
    wide = grad.astype(jnp.float32)
    mine = jax.lax.psum_scatter(wide, axis, scatter_dimension=dim, tiled=True)
    return (mine.astype(grad.dtype),)


whole_rows.defvjp(_whole_rows_fwd, _whole_rows_bwd)
