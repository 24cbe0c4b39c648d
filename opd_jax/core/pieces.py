"""A large array piece by piece: no device and no host but those that keep its shards hold more."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

PIECE_BYTES = 256 * 2**20
Cut = tuple[tuple[int, ...], tuple[int, ...]]
"""Starts and sizes along the leading axes."""


def pieces(array: jax.Array, limit: int | None = None) -> Iterator[jax.Array]:
    """Its values in row-major order, bit for bit (NaNs aside); each process has each piece whole.

    Called by every process. The next piece is begun when the one before is there: on a CPU with
    few cores programs of several devices that pile up can wait for each other for ever.

    Args:
        limit: bytes of a piece, `PIECE_BYTES` where it is `None`.
    """
    limit = PIECE_BYTES if limit is None else limit
    local = array.is_fully_addressable or array.is_fully_replicated
    if array.nbytes <= limit and local:
        yield array
        return
    for starts, sizes in cuts(array.shape, array.dtype.itemsize, limit):
        piece = _cutter(array.sharding, array.ndim, sizes)(array, starts)
        yield piece
        piece.block_until_ready()
        del piece


def cuts(shape: tuple[int, ...], itemsize: int, limit: int) -> Iterator[Cut]:
    """Blocks of at most `limit` bytes: one index of the first axes, a range of the next one."""
    row_bytes = [itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if not shape or row_bytes[0] * shape[0] <= limit:
        yield (), ()
        return
    axis = next((axis for axis, row in enumerate(row_bytes) if row <= limit), len(shape) - 1)
    length = shape[axis]
    parts = math.ceil(length / max(1, limit // row_bytes[axis]))
    size = math.ceil(length / parts)
    for index in np.ndindex(shape[:axis]):
        for start in range(0, length, size):
            yield (*index, start), (1,) * axis + (min(size, length - start),)


@functools.lru_cache(maxsize=256)
def _cutter(sharding: Any, rank: int, sizes: tuple[int, ...]) -> Callable[..., jax.Array]:
    """The program that cuts a block out of arrays of this sharding."""
    if not isinstance(sharding, NamedSharding):  # of one device
        return jax.jit(functools.partial(_block, axes=(None,) * len(sizes), sizes=sizes))
    mesh, given = sharding.mesh, tuple(sharding.spec)
    spec = [_split(axes, mesh.shape) for axes in (*given, *(None,) * (rank - len(given)))]
    cut, kept = spec[: len(sizes)], spec[len(sizes) :]
    mapped = jax.shard_map(
        functools.partial(_block, axes=tuple(cut), sizes=sizes),
        mesh=mesh,
        in_specs=(PartitionSpec(*spec), PartitionSpec()),
        out_specs=PartitionSpec(*(None,) * len(cut), *kept),
        check_vma=False,
    )
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _split(axes: Any, sizes: Any) -> tuple[str, ...] | None:
    """The mesh axes that do cut a dimension."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(name for name in names if sizes[name] > 1) or None


def _block(
    x: jax.Array,
    starts: tuple[jax.Array, ...],
    axes: tuple[tuple[str, ...] | None, ...],
    sizes: tuple[int, ...],
) -> jax.Array:
    """Within `shard_map`, a block of the array whose shard is `x`: along `axes`, whole everywhere.

    The compiler would gather the array first to cut an axis of which each device has a part.
    """
    inside, names = jnp.bool_(True), list[str]()
    for dim, (axis, start, size) in enumerate(zip(axes, starts, sizes, strict=True)):
        if axis is None:
            x = jax.lax.dynamic_slice_in_dim(x, start, size, dim)
    for dim, (axis, start, size) in enumerate(zip(axes, starts, sizes, strict=True)):
        if axis is not None:
            held = x.shape[dim]
            here = start - jax.lax.axis_index(axis) * held + jnp.arange(size)
            x = jnp.take(x, here, axis=dim, mode="clip")
            shape = [size if other == dim else 1 for other in range(x.ndim)]
            inside &= ((here >= 0) & (here < held)).reshape(shape)
            names += axis
    return _sum_bits(x, inside, names) if names else x


def _sum_bits(x: jax.Array, inside: jax.Array, names: list[str]) -> jax.Array:
    """The values of those devices that have them; a sum of floats would change -0 and subnormals.

    Not everywhere can integers of 16 bits be summed.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    summed = jax.lax.psum(jnp.where(inside, bits, 0).astype(jnp.uint32), tuple(names))
    return jax.lax.bitcast_convert_type(summed.astype(bits.dtype), x.dtype)
