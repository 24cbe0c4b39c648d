"""Which device stands where in a mesh: neighbours on fast links, islands joined by `data`.

An island is what fast links join: a TPU slice, or a GPU node (all nodes that share NVLink). Between
islands there is only the network of the data center, a tenth to a thirtieth as fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

OVER_THE_NETWORK = ("data", "fsdp")
"""Axes that may cross islands, the one that sends least first: gradients of a micro-batch, not
parameters in every layer."""


def island_of(device: Any) -> int:
    """The TPU slice or GPU node that a device is in; CPUs are all in one.

    Source: PJRT's devices. `slice_index` counts TPU slices; one slice alone may not have it. Of
    GPUs the first of the `coords` counts nodes, also of absent ones, whose `slice_index` is 0.
    """
    if device.platform == "tpu":
        return getattr(device, "slice_index", 0)
    if device.platform in ("gpu", "cuda", "rocm"):
        coords = getattr(device, "coords", None)
        return coords[0] if coords else getattr(device, "slice_index", 0)
    return 0


def islands_of(devices: Sequence[Any]) -> list[list[Any]]:
    """Devices by their island, in the order in which they are given."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(island_of(device), []).append(device)
    return [found[number] for number in sorted(found)]


def across_islands(sizes: Mapping[str, int], islands: int) -> dict[str, int] | None:
    """Into how many parts islands cut each axis: `data` as far as it goes, then `fsdp`.

    `None` where these two cannot hold all islands.
    """
    outer = dict.fromkeys(sizes, 1)
    left = islands
    for axis in OVER_THE_NETWORK:
        outer[axis] = math.gcd(sizes[axis], left)
        left //= outer[axis]
    return outer if left == 1 else None


def device_grid(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """Devices in the shape of a mesh, as many as it takes.

    Within an island they follow the links (`jax.experimental.mesh_utils`). Where islands differ
    in size, or `data` and `fsdp` cannot hold them, the devices stay in their order.

    Args:
        sizes: of the axes, in their order.
    """
    shape = tuple(sizes.values())
    islands = islands_of(devices)
    outer = across_islands(sizes, len(islands))
    if outer is None or len({len(island) for island in islands}) > 1:
        return _in_order(devices, shape)
    inner = tuple(sizes[axis] // outer[axis] for axis in sizes)
    grids = np.stack([_within(island, inner) for island in islands])
    apart = grids.reshape(*outer.values(), *inner)
    paired = [axis for pair in zip(range(len(shape)), _second(shape), strict=True) for axis in pair]
    return apart.transpose(paired).reshape(shape)


def _second(shape: Sequence[int]) -> range:
    return range(len(shape), 2 * len(shape))


def _within(island: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """One island's devices, axes along its links; in their order where that cannot be."""
    try:
        return mesh_utils.create_device_mesh(shape, island, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):
        return _in_order(island, shape)


def _in_order(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    return np.array(devices).reshape(shape)
