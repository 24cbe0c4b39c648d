"""Flags of the compilers and runtimes, by platform: the one place that sets them.

They are environment variables that JAX and its plugins read when they start, so this imports
neither. A flag that the user has set keeps the user's value; on a CPU nothing is set. An unknown
flag ends a process, so each is tried by the compilers (tests/fit/test_flags_compile.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Literal

Platform = Literal["cpu", "gpu", "tpu"]

GPU_FLAGS = {
    # Gathers the weights of a layer while the one before it computes: of the bytes of all-gathers
    # 87% travel beside matrix products instead of 48%, in less memory (docs/log.md).
    # Source: "Tips for High-Performance LLMs with JAX and XLA", NVIDIA JAX-Toolbox.
    "xla_gpu_enable_pipelined_all_gather": "true",
}
TPU_FLAGS: dict[str, str] = {}
"""None: what MaxText's benchmarks/xla_flags_library.py sets for asynchronous collectives, reduce-
scatters and several slices makes the same programs as libtpu 0.0.42.1 by itself (docs/log.md)."""
MEMORY_FRACTION = "0.95"
"""Of a GPU's memory that JAX takes, 0.75 by default; `--fit` counts on this much."""

_MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""JAX's name and its older one; JAX refuses both together."""
_READ_BY = {"gpu": ("XLA_FLAGS", GPU_FLAGS), "tpu": ("LIBTPU_INIT_ARGS", TPU_FLAGS)}
_NAMES: dict[str, Platform] = {"gpu": "gpu", "cuda": "gpu", "tpu": "tpu"}
_GPU_FILES = ("dev/nvidia[0-9]*", "dev/nvidiactl", "dev/dxg")
_TPU_FILES = ("dev/accel[0-9]*", "dev/vfio/[0-9]*")
_TPU_VARIABLES = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")
_FLAG = re.compile(r"(?:^|\s)--?(\w+)")


def platform_here(environ: Mapping[str, str], root: Path = Path("/")) -> Platform:
    """What JAX will find here, by JAX_PLATFORMS, or else by device files and variables of TPU VMs.

    Args:
        root: of the file system.
    """
    asked = environ.get("JAX_PLATFORMS") or environ.get("JAX_PLATFORM_NAME")
    if asked:
        return _NAMES.get(asked.split(",")[0].strip().lower(), "cpu")
    if _any_file(root, _GPU_FILES):
        return "gpu"
    told = any(environ.get(name) for name in _TPU_VARIABLES)
    return "tpu" if told or _any_file(root, _TPU_FILES) else "cpu"


def _any_file(root: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in root.glob(pattern))


def variables(platform: Platform, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables to set on a platform, the user's own flags among them."""
    if platform == "cpu":
        return {}
    name, flags = _READ_BY[platform]
    text = with_flags(environ.get(name, ""), flags)
    found = {name: text} if text else {}
    if platform == "gpu" and not any(environ.get(name) for name in _MEMORY):
        found[_MEMORY[0]] = MEMORY_FRACTION
    return found


def with_flags(given: str, flags: Mapping[str, str]) -> str:
    """What the user gives, and those flags that it does not set.

    Text that does not begin with a dash names a file of flags, to which nothing can be added.
    """
    if given.strip() and not given.lstrip().startswith("-"):
        return given
    own = set(_FLAG.findall(given))
    added = [
        f"--{name}={value}"
        for name, value in flags.items()
        if name not in own and f"no{name}" not in own
    ]
    return " ".join([given.strip(), *added]).strip()


def set_flags(environ: MutableMapping[str, str] | None = None) -> None:
    """Set this process's variables. Must come before JAX is imported."""
    environ = os.environ if environ is None else environ
    environ.update(variables(platform_here(environ), environ))
