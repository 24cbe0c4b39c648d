"""The device mesh, and the one table from logical axes to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opd_jax.config import MeshConfig
from opd_jax.core.mesh_layout import device_grid, islands_of
from opd_jax.errors import ConfigError, MeshError

MESH_AXES = ("data", "fsdp", "tensor", "expert", "context")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "copies": "data",
    "time": "context",
    "layers": None,
    "norm": None,
    "head_dim": None,
    "embed": ("fsdp", "expert", "context"),
    "moe_embed": ("fsdp", "context"),
    "ffn": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "replicated": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay the devices out as `data` x `fsdp` x `tensor` x `expert` x `context`.

    Which stands where, `mesh_layout` decides by their links.

    Raises:
        ConfigError: the axes ask for more devices than there are, or do not divide them; or there
            are several TPU slices, and `data` is no multiple of their number.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    if sizes.count(-1) > 1 or 0 in sizes:
        raise ConfigError(
            f"mesh: {_axes_text(sizes)}: every axis is at least 1, and only one may be -1"
        )
    fixed = math.prod(size for size in sizes if size > 0)
    if -1 in sizes:
        if len(devices) % fixed:
            raise MeshError(
                f"mesh: {_axes_text(sizes)}: {len(devices)} devices are not divisible by {fixed}; "
                "change the axes that are not -1"
            )
        sizes[sizes.index(-1)] = len(devices) // fixed
    needed = math.prod(sizes)
    if needed > len(devices):
        raise MeshError(
            f"mesh: {_axes_text(sizes)} needs {needed} devices, {len(devices)} are here; "
            "make an axis smaller"
        )
    if jax.process_count() > 1 and needed != len(devices):
        raise MeshError(
            f"mesh: {_axes_text(sizes)} takes {needed} of {len(devices)} devices; with several "
            "processes it must take all of them"
        )
    _check_slices(devices, sizes)
    grid = device_grid(devices[:needed], dict(zip(MESH_AXES, sizes, strict=True)))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _check_slices(devices: Sequence[Any], sizes: Sequence[int]) -> None:
    """Raises ConfigError where another axis than `data` would cross TPU slices."""
    slices = len(islands_of(devices)) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return
    if sizes[0] % slices:
        raise MeshError(
            f"mesh: {_axes_text(sizes)}: between the {slices} TPU slices there is only a network, "
            f"which data alone may cross; set mesh.data={slices} or a multiple of it"
        )
    if math.prod(sizes) != len(devices):
        raise MeshError(
            f"mesh: {_axes_text(sizes)} takes {math.prod(sizes)} of {len(devices)} devices; with "
            "several TPU slices it must take all of them"
        )


def _axes_text(sizes: Sequence[int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))


def platform_of(mesh: Mesh | None) -> str:
    """ "cpu", "gpu" or "tpu": of the mesh's devices, absent ones too; without a mesh, of JAX."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def is_one_cpu(mesh: Mesh | None) -> bool:
    """Whether all is computed on a single device, and that is a CPU."""
    return platform_of(mesh) == "cpu" and (mesh is None or mesh.size == 1)


def axis_size(mesh: Mesh, logical: str) -> int:
    """How many ways a logical axis is cut on this mesh."""
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(logical))


def _mesh_axes(logical: str) -> tuple[str, ...]:
    if logical not in RULES:
        raise ConfigError(f"sharding: unknown logical axis '{logical}'; known: {', '.join(RULES)}")
    rule = RULES[logical]
    return () if rule is None else (rule,) if isinstance(rule, str) else rule


def sharding_for(mesh: Mesh, axes: Sequence[str], shape: Sequence[int], name: str) -> NamedSharding:
    """The sharding of an array by its logical axes.

    Args:
        axes: one logical axis per dimension of `shape`.
        name: what the array is called in an error.

    Raises:
        ConfigError: an unknown axis, a mesh axis used twice, or a dimension that does not divide.
    """
    used: dict[str, str] = {}
    spec: list[tuple[str, ...] | None] = []
    for logical, size in zip(axes, shape, strict=True):
        mesh_axes = _mesh_axes(logical)
        ways = axis_size(mesh, logical)
        for axis in mesh_axes:
            if mesh.shape[axis] > 1 and axis in used:
                raise MeshError(
                    f"{name}: dims '{used[axis]}' and '{logical}' both go to mesh axis '{axis}'"
                )
            used[axis] = logical
        if size % ways:
            cutting = [axis for axis in mesh_axes if mesh.shape[axis] > 1]
            largest = max(cutting, key=lambda axis: mesh.shape[axis])
            raise MeshError(
                f"{name}: dim '{logical}'={size} is not divisible by mesh axis "
                f"'{' x '.join(cutting)}'={ways}; change mesh.{largest}"
            )
        spec.append(mesh_axes or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def constrain(x: jax.Array, mesh: Mesh | None, axes: Sequence[str], name: str) -> jax.Array:
    """Fix the sharding of an intermediate value; without a mesh there is nothing to fix."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding_for(mesh, axes, x.shape, name))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Rows over `data`, `fsdp` and `expert`, their tokens over `context`, all else whole.

    Args:
        ndim: axes of the array, or the fewest of several: with 1 it has no tokens.
    """
    with_tokens = ndim > 1 and axis_size(mesh, "time") > 1
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], *[RULES["time"]] * with_tokens))


def rows_here(mesh: Mesh | None, rows: int) -> np.ndarray:
    """bool [rows]: which rows of a batch the devices of this process hold.

    All of them without a mesh, and where the mesh does not divide them (`put_batch` says so).
    """
    if mesh is None or rows % axis_size(mesh, "batch"):
        return np.ones(rows, bool)
    here = np.zeros(rows, bool)
    for index in batch_sharding(mesh, 1).addressable_devices_indices_map((rows,)).values():
        here[index] = True
    return here


def put_batch(mesh: Mesh, tree: object, *, sharded: bool = True) -> object:
    """Host arrays as global arrays; a process reads only the parts that its devices hold.

    Args:
        sharded: cut as `batch_sharding` says; else whole.

    Raises:
        ConfigError: the mesh does not divide the rows, or their tokens.
    """

    def put(path: Any, x: np.ndarray) -> jax.Array:
        host, sharding = np.asarray(x), replicated(mesh)
        if sharded:
            name = "batch " + jax.tree_util.keystr(path, simple=True, separator=".")
            sharding_for(mesh, ("batch", "time")[: host.ndim], host.shape[:2], name.strip())
            sharding = batch_sharding(mesh, host.ndim)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree_util.tree_map_with_path(put, tree)
