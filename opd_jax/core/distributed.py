"""Several processes as one program."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from opd_jax.errors import ConfigError

TEXT_BYTES = 256


def start(coordinator: str | None, processes: int | None, rank: int | None) -> None:
    """Join the other processes, if there are any. Must come before any device is touched.

    Raises:
        ConfigError: the three flags are not given together, or do not fit together.
    """
    given = [value is not None for value in (coordinator, processes, rank)]
    if not any(given):
        return
    if not all(given) or processes is None or rank is None:
        raise ConfigError("--coordinator, --processes and --rank belong together: give all three")
    if not 0 <= rank < processes:
        raise ConfigError(f"--rank {rank} is not below --processes {processes}")
    jax.distributed.initialize(coordinator, processes, rank)


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def is_first() -> bool:
    """Whether this process writes the shared files."""
    return jax.process_index() == 0


def from_first(text: str) -> str:
    """Process 0's value of a short text, on every process."""
    if jax.process_count() == 1:
        return text
    padded = np.zeros(TEXT_BYTES, np.uint8)
    data = np.frombuffer(text.encode(), np.uint8)
    padded[: len(data)] = data
    shared = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    return bytes(shared).rstrip(b"\0").decode()
