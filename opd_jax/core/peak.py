"""What a device can do at most: how fast it multiplies matrices, and how much it can hold.

Model FLOPs utilisation is measured against the first.
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 products, FLOP/s a device, by the start of its kind; from the vendors' data."""
TPU_MEMORY = {
    "TPU v4": 32 * 2**30,
    "TPU v5 lite": 16 * 2**30,
    "TPU v5e": 16 * 2**30,
    "TPU v5": 95 * 2**30,
    "TPU v5p": 95 * 2**30,
    "TPU v6 lite": 32 * 2**30,
    "TPU v6e": 32 * 2**30,
}
"""Bytes of a chip, by its kind; from Google Cloud's pages."""
SIZE, ROUNDS = 1536, 3


def peak_flops(kind: str) -> float | None:
    """FLOP/s of a device of that kind, `None` for one that is not in the table."""
    found = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(found, key=len)] if found else None


@functools.cache
def total_peak_flops() -> float | None:
    """FLOP/s of all devices together: from the table, on CPUs measured; `None` if unknown."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return _measured() * jax.process_count()  # devices of one process share its cores
    each = peak_flops(devices[0].device_kind)
    return None if each is None else each * len(devices)


def _measured() -> float:
    """The fastest of a few float32 products."""
    x = jnp.ones((SIZE, SIZE), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    fastest = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        product(x).block_until_ready()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * SIZE**3 / fastest
