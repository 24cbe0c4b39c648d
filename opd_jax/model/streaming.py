"""A checkpoint's tensors, a few rows at a time, straight into stacked and sharded arrays.

A parameter here stacks many tensors of a checkpoint: `[layers, ...]`. Its blocks, one for each
distinct part that a device of this host holds, are filled from rows of those tensors.

Host memory: where the host is the device (CPU), the blocks are handed over without a copy, and
beyond them there is only a buffer of rows per thread. Elsewhere layers travel in groups of
`GROUP_BYTES`, written in place into the array on the device; beyond the target the host holds one
group, or one layer (all experts of it) if that is larger.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.model.hf_tensors import HFTensor, Shape

GROUP_BYTES = 128 * 2**20
"""Layers of one parameter that the host gathers before they go to an accelerator."""
ROWS_BYTES = 512 * 2**10
"""Rows read at once: little enough to stay in a core's cache while they are transposed."""
_THREADS = min(4, os.cpu_count() or 1)
_ALIGNMENT = 64
"""Bytes; XLA takes over a host array that begins at a multiple of it without copying."""
Cut = tuple[slice, ...]


class TensorSource(Protocol):
    """A checkpoint seen as tensors with Hugging Face names and layouts."""

    def shapes(self) -> dict[str, Shape]:
        """Every tensor in the checkpoint."""
        ...

    def file_of(self, name: str) -> str:
        """The file that holds a tensor, or where it should have been."""
        ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of one tensor, as stored or dequantised. Called from threads."""
        ...


class _Block(NamedTuple):
    """The part `cut` of a group of layers, as unsigned integers of the dtype's size."""

    cut: Cut
    bits: np.ndarray


class _Rows(NamedTuple):
    """One piece of work: the part `start` to `stop` of a layer's axis `tensor.in_rank`."""

    name: str
    place: tuple[int, ...]
    start: int
    stop: int


def read_parameter(source: TensorSource, tensor: HFTensor, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """One parameter on its devices.

    Args:
        tensor: where it lies in the checkpoint.
        spec: shape, dtype and sharding; the layer axis is never sharded.
    """
    groups = _layer_groups(tensor, spec)
    if len(groups) == 1:
        return _read_group(source, tensor, spec, groups[0])
    target = _empty(spec)
    for layers in groups:
        part = _read_group(source, tensor, spec, layers)
        # Waits, or groups that the device has not taken yet would pile up on the host.
        target = jax.block_until_ready(_writer(spec)(target, part, layers.start))
    return target


def _layer_groups(tensor: HFTensor, spec: jax.ShapeDtypeStruct) -> list[range]:
    """Runs of layers that are read together."""
    depth = spec.shape[0] if tensor.stack_rank else 1
    step = depth
    if not _host_is_device(spec):
        layer_bytes = spec.size * spec.dtype.itemsize // depth
        step = max(1, min(depth, GROUP_BYTES // layer_bytes))
    return [range(start, min(start + step, depth)) for start in range(0, depth, step)]


def _host_is_device(spec: jax.ShapeDtypeStruct) -> bool:
    devices = jax.devices() if spec.sharding is None else spec.sharding.device_set
    return next(iter(devices)).platform == "cpu"


def _empty(spec: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.empty(spec.shape, spec.dtype), out_shardings=spec.sharding)()


@functools.lru_cache(maxsize=1)
def _writer(spec: jax.ShapeDtypeStruct) -> jax.stages.Wrapped:
    """Writes a group of layers into the target, in place."""

    def write(target: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(target, part, first, axis=0)

    return jax.jit(write, donate_argnums=0, out_shardings=spec.sharding)


def _read_group(
    source: TensorSource, tensor: HFTensor, spec: jax.ShapeDtypeStruct, layers: range
) -> jax.Array:
    shape = (len(layers), *spec.shape[1:]) if tensor.stack_rank else spec.shape
    cuts: list[Cut | None] = [(slice(None),) * len(shape)]
    if spec.sharding is not None:
        cuts = list(spec.sharding.addressable_devices_indices_map(shape).values())
    # Devices that hold the same part share a block; slices have no hash.
    distinct = {str(cut): cut for cut in cuts if cut is not None}
    blocks = {key: _new_block(cut, shape, spec.dtype) for key, cut in distinct.items()}
    work = functools.partial(_copy_rows, source, tensor, spec, list(blocks.values()))
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(work, _pieces(tensor, spec, layers)):
            pass  # Raises here what a thread raised.
    arrays = {key: block.bits.view(spec.dtype) for key, block in blocks.items()}
    if spec.sharding is None:
        return jax.device_put(*arrays.values())
    return jax.make_array_from_callback(shape, spec.sharding, lambda cut: arrays[str(cut)])


def _new_block(cut: Cut, shape: Shape, dtype: np.dtype) -> _Block:
    """Uninitialised and aligned."""
    cut = tuple(slice(*part.indices(dim)) for part, dim in zip(cut, shape, strict=True))
    size = tuple(part.stop - part.start for part in cut)
    bits = np.dtype(f"u{dtype.itemsize}")
    count = int(np.prod(size)) * bits.itemsize
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return _Block(cut, raw[begin : begin + count].view(bits).reshape(size))


def _pieces(tensor: HFTensor, spec: jax.ShapeDtypeStruct, layers: range) -> Iterator[_Rows]:
    """The work of one group: every tensor in it, a few rows at a time."""
    shape = spec.shape[tensor.stack_rank :]
    size = shape[tensor.in_rank]
    step = max(1, ROWS_BYTES * size // (int(np.prod(shape)) * spec.dtype.itemsize))
    for name, place in tensor.places(spec.shape):
        if place and place[0] not in layers:
            continue
        local = (place[0] - layers.start, *place[1:]) if place else ()
        for start in range(0, size, step):
            yield _Rows(name, local, start, min(start + step, size))


def _copy_rows(
    source: TensorSource,
    tensor: HFTensor,
    spec: jax.ShapeDtypeStruct,
    blocks: list[_Block],
    rows: _Rows,
) -> None:
    """Read rows once and copy them into every block that holds some of them."""
    shape, axis = spec.shape[tensor.stack_rank :], tensor.in_rank
    targets = [found for block in blocks if (found := _target(block, rows, axis))]
    if not targets:
        return
    # One index of our axis is several rows there if it is the first of several output dims.
    ratio = tensor.hf_shape(shape)[0] // shape[axis]
    array = source.read(rows.name, rows.start * ratio, rows.stop * ratio)
    bits = array.astype(spec.dtype, copy=False).view(blocks[0].bits.dtype)
    if tensor.in_rank:
        bits = _spaced(bits)
    ours = tensor.from_hf(bits, (*shape[:axis], rows.stop - rows.start, *shape[axis + 1 :]))
    for target, cut in targets:
        target[...] = ours[cut]


def _target(block: _Block, rows: _Rows, axis: int) -> tuple[np.ndarray, Cut] | None:
    """Where in a block these rows go, and which of them; None if none do."""
    lead, cut = block.cut[: len(rows.place)], block.cut[len(rows.place) :]
    if not all(part.start <= at < part.stop for at, part in zip(rows.place, lead, strict=True)):
        return None
    start, stop = max(rows.start, cut[axis].start), min(rows.stop, cut[axis].stop)
    if start >= stop:
        return None
    layer = block.bits[tuple(at - part.start for at, part in zip(rows.place, lead, strict=True))]
    into = (*(slice(None),) * axis, slice(start - cut[axis].start, stop - cut[axis].start))
    inside = slice(start - rows.start, stop - rows.start)
    return layer[into], (*cut[:axis], inside, *cut[axis + 1 :])


def _spaced(matrix: np.ndarray) -> np.ndarray:
    """A copy whose rows lie a little apart.

    Rows of a power of two bytes meet in the same few cache lines when a column is read: apart,
    transposing them takes a third of the time.
    """
    rows, columns = matrix.shape
    buffer = np.empty((rows, columns + _ALIGNMENT // matrix.itemsize), matrix.dtype)
    buffer[:, :columns] = matrix
    return buffer[:, :columns]
