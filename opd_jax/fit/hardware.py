"""What the roofline and the compilers know of devices: one table of chips, one of cards.

Figures are the vendors' public ones: Google Cloud's pages on TPU v4, v5e, v5p and v6e with the
link rates of "How to Scale Your Model" (jax-ml.github.io/scaling-book), and NVIDIA's data sheets of
A100, H100, H200 and B200 (SXM), whose boost clocks and sizes of caches XLA's cost models use.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from opd_jax.core.peak import TPU_MEMORY

GIB = 2**30
RESERVE = 0.05
"""Share of a device's memory left to the runtime, communication buffers and fragmentation."""


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        kind: as JAX names it; the key of its peak in `core.peak`.
        memory: bytes.
        bandwidth: of that memory, bytes/s.
        link: what a device sends to its neighbours, bytes/s in one direction: on a TPU both links
            of one axis of the torus, on a GPU all of NVLink.
        network: bytes/s a device between nodes or slices: the hosts' network over their devices.
        node: devices that share the links; 0: all.
        host: PCIe between a device and its host, bytes/s in one direction.
    """

    kind: str
    memory: int
    bandwidth: float
    link: float
    network: float
    node: int = 0
    host: float = 1.6e10


@dataclass(frozen=True)
class Card:
    """An NVIDIA card, as XLA's `GpuTargetConfigProto` describes it."""

    device: Device
    capability: tuple[int, int]
    cores: int
    lanes: int
    """float32 units of a core."""
    clock_ghz: float
    l2: int
    shared: int
    """Shared memory of a core; a block can have all but 1 KiB of it."""


def _nvidia(kind: str, memory: int, bandwidth: float, link: float, network: float) -> Device:
    """With PCIe 4 (A100) or 5, 16 lanes."""
    host = 3.2e10 if "A100" in kind else 6.4e10
    return Device(kind, memory, bandwidth, link, network, 8, host)


def _tpu(kind: str, bandwidth: float, link: float, network: float, host: float = 1.6e10) -> Device:
    return Device(kind, TPU_MEMORY[kind], bandwidth, link, network, host=host)


TPUS = {
    "v4": _tpu("TPU v4", 1.228e12, 9e10, 6.25e9),
    "v5e": _tpu("TPU v5 lite", 8.19e11, 9e10, 3.125e9),
    "v5p": _tpu("TPU v5", 2.765e12, 1.8e11, 6.25e9),
    "v6e": _tpu("TPU v6 lite", 1.638e12, 1.8e11, 1.25e10, host=3.2e10),
}
_A100_40 = Card(
    _nvidia("NVIDIA A100-SXM4-40GB", 42_331_013_120, 1.5552e12, 3e11, 2.5e10),
    capability=(8, 0),
    cores=108,
    lanes=64,
    clock_ghz=1.41,
    l2=40 * 2**20,
    shared=164 * 2**10,
)
_A100_80 = _nvidia("NVIDIA A100-SXM4-80GB", 84_986_691_584, 2.039e12, 3e11, 2.5e10)
_H100 = Card(
    _nvidia("NVIDIA H100 80GB HBM3", 84_978_434_048, 3.35232e12, 4.5e11, 5e10),
    capability=(9, 0),
    cores=132,
    lanes=128,
    clock_ghz=1.98,
    l2=50 * 2**20,
    shared=228 * 2**10,
)
_H200 = _nvidia("NVIDIA H200", 150_121_545_728, 4.8e12, 4.5e11, 5e10)
_B200 = Card(
    _nvidia("NVIDIA B200", 191_510_347_776, 7.7e12, 9e11, 5e10),
    capability=(10, 0),
    cores=148,
    lanes=128,
    clock_ghz=1.965,
    l2=126 * 2**20,
    shared=228 * 2**10,
)
CARDS = {
    "a100-40": _A100_40,
    "a100-80": dataclasses.replace(_A100_40, device=_A100_80),
    "h100": _H100,
    "h200": dataclasses.replace(_H100, device=_H200),
    "b200": _B200,
}


def card_text(card: Card) -> str:
    """The `GpuTargetConfigProto` of a card, as text."""
    major, minor = card.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {card.shared}
  shared_memory_per_block_optin: {card.shared - 1024}
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {card.cores}
  fpus_per_core: {card.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(card.device.bandwidth)}
  l2_cache_size: {card.l2}
  clock_rate_ghz: {card.clock_ghz}
  device_memory_size: {card.device.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{card.device.kind}"
"""
