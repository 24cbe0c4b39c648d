"""A checkpoint's tensors, a few rows at a time, straight into stacked and sharded arrays.

A parameter here stacks many tensors of a checkpoint: `[layers, ...]`. Its blocks, one for each
distinct part that a device of this host holds, are filled from rows of those tensors.

Host memory: where the host is the device (CPU), the blocks are handed over without a copy, and
beyond them there is only a buffer of rows per thread. Elsewhere layers, or experts of one layer,
travel in groups of `GROUP_BYTES`, written in place into the array on the device; beyond the target
the host holds one group, or one tensor if that is larger.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.model.hf_tensors import HFTensor, Shape

GROUP_BYTES = 128 * 2**20
"""Tensors of one parameter that the host gathers before they go to an accelerator."""
ROWS_BYTES = 512 * 2**10
"""Rows read at once: little enough to stay in a core's cache while they are transposed."""
_THREADS = min(4, os.cpu_count() or 1)
_ALIGNMENT = 64
"""Bytes; XLA takes over a host array that begins at a multiple of it without copying."""
Cut = tuple[slice, ...]
Window = tuple[range, ...]
"""The part of each stacked axis that is read together: layers, then experts."""


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
    """The part `cut` of a window's tensors, as unsigned integers of the dtype's size."""

    cut: Cut
    bits: np.ndarray


class _Rows(NamedTuple):
    """One piece of work: the part `start` to `stop` of a tensor's axis `tensor.in_rank`."""

    name: str
    place: tuple[int, ...]
    start: int
    stop: int


def read_parameter(source: TensorSource, tensor: HFTensor, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """One parameter on its devices.

    Args:
        tensor: where it lies in the checkpoint.
        spec: shape, dtype and `NamedSharding`; the layer axis is never sharded.
    """
    groups = _groups(tensor, spec)
    if len(groups) == 1:
        return _read_group(source, tensor, spec, groups[0])
    target = _empty(spec)
    for group in groups:
        first = tuple(part.start for part in group)
        # Waits, or groups that the device has not taken yet would pile up on the host.
        target = jax.block_until_ready(
            _writer(spec)(target, _read_group(source, tensor, spec, group), first)
        )
    return target


def _groups(tensor: HFTensor, spec: jax.ShapeDtypeStruct) -> list[Window]:
    """What is read and written together, in coordinates of a device's shard.

        experts    shard of device 0   shard of device 1      2 layers, 8 experts over 2 devices
        layer 0     [0   1]  2   3      [4   5]  6   7        [ ]: group (range(0, 1), range(0, 2))
        layer 1      0   1   2   3       4   5   6   7

    Every device writes at the same place, so that one program without communication does it.
    """
    shard = _shard_shape(spec)[: tensor.stack_rank]
    if _host_is_device(spec):
        return [tuple(map(range, shard))]
    windows: list[Window] = [()]
    below = spec.size * spec.dtype.itemsize
    for whole, here in zip(spec.shape, shard, strict=False):
        below //= whole
        # Experts are cut only where a layer is too large: of smaller ones, several go at once.
        step = max(1, min(here, GROUP_BYTES // below))
        parts = [range(start, min(start + step, here)) for start in range(0, here, step)]
        windows = [(*window, part) for window in windows for part in parts]
    return windows


def _shard_shape(spec: jax.ShapeDtypeStruct) -> Shape:
    return spec.shape if spec.sharding is None else spec.sharding.shard_shape(spec.shape)


def _host_is_device(spec: jax.ShapeDtypeStruct) -> bool:
    devices = jax.devices() if spec.sharding is None else spec.sharding.device_set
    return next(iter(devices)).platform == "cpu"


def _empty(spec: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.empty(spec.shape, spec.dtype), out_shardings=spec.sharding)()


@functools.lru_cache(maxsize=1)
def _writer(spec: jax.ShapeDtypeStruct) -> jax.stages.Wrapped:
    """Writes a group into every shard of the target, in place."""

    def write(target: jax.Array, part: jax.Array, first: tuple[jax.Array, ...]) -> jax.Array:
        start = (*first, *(0,) * (target.ndim - len(first)))
        return jax.lax.dynamic_update_slice(target, part, start)

    sharding = spec.sharding
    if sharding is None:
        return jax.jit(write, donate_argnums=0)
    assert isinstance(sharding, NamedSharding)
    specs = (sharding.spec, sharding.spec, PartitionSpec())
    shards = jax.shard_map(write, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)
    return jax.jit(shards, donate_argnums=0, out_shardings=sharding)


def _read_group(
    source: TensorSource, tensor: HFTensor, spec: jax.ShapeDtypeStruct, group: Window
) -> jax.Array:
    """A group of every shard; the host holds that of one shard of the experts at a time."""
    rank, shard = tensor.stack_rank, _shard_shape(spec)
    lead = [n // here * len(part) for n, here, part in zip(spec.shape, shard, group, strict=False)]
    shape = (*lead, *spec.shape[rank:])
    if spec.sharding is None:
        (array,) = _read_window(source, tensor, spec, group, [(slice(None),) * len(shape)])
        return jax.device_put(array)
    waves: dict[Window, dict[Any, Cut]] = {}  # window -> device -> cut
    for device, cut in spec.sharding.addressable_devices_indices_map(shape).items():
        if cut is not None:
            window = tuple(map(_window_of, cut, lead, group, shard))
            waves.setdefault(window, {})[device] = (*(slice(None),) * rank, *cut[rank:])
    arrays: list[jax.Array] = []
    for window, cuts in waves.items():
        # Not bound to a name: the host would hold it while it reads the next one.
        arrays += jax.block_until_ready(
            jax.device_put(
                _read_window(source, tensor, spec, window, list(cuts.values())), list(cuts)
            )
        )
    return jax.make_array_from_single_device_arrays(shape, spec.sharding, arrays)


def _window_of(cut: slice, size: int, part: range, shard: int) -> range:
    """Where the part of a group's axis that a device holds lies on the whole axis."""
    offset = cut.indices(size)[0] // len(part) * shard
    return range(offset + part.start, offset + part.stop)


def _read_window(
    source: TensorSource,
    tensor: HFTensor,
    spec: jax.ShapeDtypeStruct,
    window: Window,
    cuts: list[Cut],
) -> list[np.ndarray]:
    """The cuts of one window; equal ones, of devices that hold the same part, share a block."""
    shape = (*map(len, window), *spec.shape[tensor.stack_rank :])
    # Slices have no hash.
    blocks = {str(cut): _new_block(cut, shape, spec.dtype) for cut in cuts}
    work = functools.partial(_copy_rows, source, tensor, spec, list(blocks.values()))
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(work, _pieces(tensor, spec, window)):
            pass  # Raises here what a thread raised.
    return [blocks[str(cut)].bits.view(spec.dtype) for cut in cuts]


def _new_block(cut: Cut, shape: Shape, dtype: np.dtype) -> _Block:
    """Uninitialised and aligned."""
    cut = tuple(slice(*part.indices(dim)) for part, dim in zip(cut, shape, strict=True))
    size = tuple(part.stop - part.start for part in cut)
    bits = np.dtype(f"u{dtype.itemsize}")
    count = int(np.prod(size)) * bits.itemsize
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return _Block(cut, raw[begin : begin + count].view(bits).reshape(size))


def _pieces(tensor: HFTensor, spec: jax.ShapeDtypeStruct, window: Window) -> Iterator[_Rows]:
    """The work of one window: every tensor in it, a few rows at a time."""
    shape = spec.shape[tensor.stack_rank :]
    size = shape[tensor.in_rank]
    step = max(1, ROWS_BYTES * size // (int(np.prod(shape)) * spec.dtype.itemsize))
    for place in itertools.product(*window):
        name = tensor.name_at(place)
        local = tuple(at - part.start for at, part in zip(place, window, strict=True))
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
