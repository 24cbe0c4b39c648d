"""An estimate of how long a program takes, from what it computes, reads and sends.

    seconds = max(compute, memory, links) + host
    compute = FLOPs of a device / (peak FLOP/s x 0.6)
    memory  = bytes read and written / (memory bandwidth x 0.8)
    links   = bytes sent inside a node or slice / (link bandwidth x 0.8)
              + bytes sent between slices or nodes / (network bandwidth x 0.8)
    host    = bytes from and to the host's memory / (host link bandwidth x 0.8)

The largest of three, not their sum: compilers and kernels overlap them; optimizer state comes from
the host when the gradients are done, and nothing runs beside it. The efficiencies are
what good programs reach; they are assumptions, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence

from opd_jax.core.peak import peak_flops
from opd_jax.fit.collectives import Collective
from opd_jax.fit.hardware import Device
from opd_jax.fit.results import StepTime

COMPUTE, MEMORY, LINKS = 0.6, 0.8, 0.8
"""Shares of peak FLOP/s, memory bandwidth and link bandwidth that programs are taken to reach."""


def step_time(
    device: Device, flops: float, traffic: float, sent: Sequence[Collective], moved: float = 0.0
) -> StepTime:
    """The estimate for one device.

    Args:
        flops: of this device.
        traffic: bytes that it reads from and writes to its memory.
        sent: its collectives.
        moved: bytes between it and its host's memory, both ways.
    """
    peak = peak_flops(device.kind)
    assert peak is not None, device.kind
    between = sum(x.network_bytes for x in sent)
    inside = sum(x.sent_bytes for x in sent) - between
    links = inside / (device.link * LINKS)
    if between:
        links += between / (device.network * LINKS)
    host = moved / (device.host * LINKS)
    return StepTime(flops / (peak * COMPUTE), traffic / (device.bandwidth * MEMORY), links, host)
