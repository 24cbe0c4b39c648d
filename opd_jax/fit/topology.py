"""Devices that are not here, for XLA to compile for: TPU slices and NVIDIA nodes.

Both need the packages of the extra `fit`, and a process of their own that starts with
`environment()`: the compilers' plugins print, and settle what JAX sees, at its first use.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.experimental import topologies

from opd_jax.errors import ConfigError

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's `GpuTargetConfigProto` of the card, as text."""

GPUS = {"h100": H100}


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables for a process that compiles for absent devices.

    Args:
        base: what to start from; by default, this process's environment.
    """
    own = dict(os.environ if base is None else base)
    # Fake CPU devices and other flags of this process are none of the compilers' business.
    own.pop("XLA_FLAGS", None)
    return own | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        # Nothing runs on a TPU here, so two of these may compile at a time.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def devices_of(target: str) -> Sequence[Any]:
    """The absent devices of `v5e:4x4` (libtpu's name of a slice) or `h100:8` (a node's cards).

    Raises:
        ConfigError: an unknown target, or a package of the extra `fit` is not installed.
    """
    kind, _, size = target.partition(":")
    if kind in GPUS and size.isdecimal():
        _require("jax_plugins.xla_cuda12", target)  # registers itself when imported
        description = topologies.get_topology_desc(
            platform="cuda", target_config=GPUS[kind], topology=f"1x{size}x1"
        )
        return description.devices
    if re.fullmatch(r"v\d+[a-z]*:\d+x\d+(x\d+)?", target):
        _require("libtpu", target)
        return topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    raise ConfigError(
        f"fit: unknown target '{target}'; name a TPU slice such as v5e:4x4, or one of "
        f"{', '.join(GPUS)} with a number of cards such as h100:8"
    )


def _require(module: str, target: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"fit: compiling for '{target}' needs {module}, which is not installed; "
            "pip install 'opd_jax[fit]'"
        ) from error
