"""Devices that are not here, for XLA to compile for: TPU slices and NVIDIA nodes.

Both need the packages of the extra `fit`, and a process of their own that starts with
`environment()`: the compilers' plugins print, and settle what JAX sees, at its first use.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from opd_jax.core.platform_flags import variables
from opd_jax.errors import ConfigError
from opd_jax.fit.hardware import CARDS, card_text
from opd_jax.fit.targets import Target, parse_target


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables for a process that compiles for absent devices.

    With the flags that a run would have there, the user's own for GPUs and TPUs included.

    Args:
        base: what to start from; by default, this process's environment.
    """
    own = dict(os.environ if base is None else base)
    # Fake CPU devices and other flags of this process are none of the compilers' business.
    given = own.pop("XLA_FLAGS", "").split()
    own["XLA_FLAGS"] = " ".join(flag for flag in given if flag.startswith("--xla_gpu_"))
    own |= {**variables("gpu", own), **variables("tpu", own)}
    return own | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        # Nothing runs on a TPU here, so two of these may compile at a time.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def devices_of(target: str) -> Sequence[Any]:
    """The absent devices of a target, named as `targets.parse_target` takes it.

    Raises:
        ConfigError: an unknown target, or a package of the extra `fit` is not installed.
    """
    import jax  # here: who only wants `environment` is spared what plugins print
    from jax.experimental import topologies

    found = parse_target(target)
    if found.platform == "gpu":
        _require("jax_plugins.xla_cuda12", target)  # registers itself when imported
        card = CARDS[found.generation]
        nodes = max(found.count // card.device.node, 1)
        description = topologies.get_topology_desc(
            platform="cuda",
            target_config=card_text(card),
            topology=f"{nodes}x{found.count // nodes}x1",
        )
        return description.devices
    _require("libtpu", target)
    name = f"{found.generation}:{found.shape}"
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name, **_layout(found)
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"fit: target '{target}': libtpu knows no slice {name}; {str(error)[:200]}"
        ) from error


def _layout(target: Target) -> dict[str, Any]:
    """What libtpu has to be told besides a slice's name: slices, one chip a host, two cores a
    device."""
    several: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
    if target.count == target.slices:
        return several | {"chips_per_host_bounds": [1, 1, 1]}
    return several | ({"chip_config_name": "megacore"} if target.generation == "v4" else {})


def _require(module: str, target: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"fit: compiling for '{target}' needs {module}, which is not installed; "
            "pip install 'opd_jax[fit]'"
        ) from error
