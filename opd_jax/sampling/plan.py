"""How many slots of which length, and whether the memory for them is there.

A slot that holds the longest prompt and the longest response costs the most; few responses get so
long. With several tiers, a quarter or so of the slots is full-sized, the others have half or a
quarter of that, and a sample moves to a longer slot when it outgrows its own. XLA sums over another
length in another order: a sample's log-probs then depend, in their last bits, on the slots it was
in. As a run that goes on after a kill has to give the bits of one that was not killed, all slots
are full-sized unless asked for otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from opd_jax.core.mesh import axis_size, platform_of
from opd_jax.errors import ConfigError
from opd_jax.model.decode import Tiers, cache_token_bytes
from opd_jax.model.transformer import LanguageModel

LENGTH_STEP = 64  # slots have a multiple of it as length


@dataclass(frozen=True)
class CachePlan:
    """Slots and their lengths, and what they cost."""

    tiers: Tiers
    token_bytes: int  # of keys and values in all layers

    @property
    def total_bytes(self) -> int:
        """Of all slots, over all devices."""
        return self.tiers.tokens * self.token_bytes

    def __str__(self) -> str:
        shards = self.tiers.shards
        sizes = ", ".join(
            f"{shards * n:,} of {s:,}"
            for n, s in zip(self.tiers.rows, self.tiers.lengths, strict=True)
        )
        each = self.total_bytes / self.tiers.total
        return (
            f"{self.tiers.total:,} slots ({sizes} tokens) x {self.token_bytes:,} bytes a token = "
            f"{_size(self.total_bytes)} of keys and values, {_size(each)} a slot"
        )


def plan_cache(
    model: LanguageModel,
    slots: int,
    prompts: Sequence[int],
    limits: Sequence[int],
    tiers: int = 1,
) -> CachePlan:
    """Slots for some requests, given the length of each prompt and the limit of each response.

    A response's length is taken to be anything up to its limit with equal chance; the slots of each
    length are then as many as samples of such a length will be under way at once.

    Args:
        tiers: at most this many lengths, each half as long as the next.
    """
    shards = 1 if model.mesh is None else axis_size(model.mesh, "batch")
    rows = -(-min(slots, 1 << (len(prompts) - 1).bit_length()) // shards)
    prompt_r, limit_r = np.asarray(prompts, np.float64), np.asarray(limits, np.float64)
    longest = int((prompt_r + limit_r).max())
    lengths = sorted({_rounded(longest / 2**i) for i in range(tiers)})
    lengths = [s for s in lengths if s > prompt_r.min()] or [_rounded(longest)]
    beyond = [1.0, *(_share_beyond(s, prompt_r, limit_r) for s in lengths[:-1])]
    at_least = [max(1, math.ceil(rows * share)) for share in beyond] + [0]
    counts = [a - b for a, b in itertools.pairwise(at_least)]
    kept = [(n, s) for n, s in zip(counts, lengths, strict=True) if n]
    chosen = Tiers(tuple(n for n, _ in kept), tuple(s for _, s in kept), shards)
    return CachePlan(chosen, cache_token_bytes(model))


def _rounded(length: float) -> int:
    return math.ceil(length / LENGTH_STEP) * LENGTH_STEP


def _share_beyond(length: int, prompt_r: np.ndarray, limit_r: np.ndarray) -> float:
    """Share of the samples under way that are longer than this.

    At a random moment of its life, a sample with limit m has x tokens with density 2 (1 - x/m) / m.
    """
    left_r = np.clip(1 - (length - prompt_r) / limit_r, 0, 1)
    return float(np.sum(limit_r * left_r**2) / np.sum(limit_r))


def check_memory(plan: CachePlan, model: LanguageModel) -> None:
    """Raises ConfigError, with the arithmetic, if the slots do not fit the free memory."""
    mesh = model.mesh
    ways = 1
    if mesh is not None and platform_of(mesh) != "cpu":
        kv_ways = axis_size(mesh, "kv_heads")
        ways = plan.tiers.shards * kv_ways
    need, free = plan.total_bytes / ways, free_bytes(mesh)
    if free is not None and need > free:
        where = f", {_size(need)} a device" if ways > 1 else ""
        raise ConfigError(
            f"sampling: {plan}{where}, but {_size(free)} are free; lower slots or max_new_tokens"
        )


def free_bytes(mesh: Mesh | None) -> float | None:
    """Memory to be had on the fullest device here, or on this machine; `None`: not known."""
    if platform_of(mesh) == "cpu":
        return _host_bytes()
    devices = jax.local_devices() if mesh is None else mesh.local_devices
    stats = [device.memory_stats() or {} for device in devices]
    if any("bytes_limit" not in s for s in stats):
        return None
    return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)


def _host_bytes() -> float | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines())
    return float(fields["MemAvailable"].split()[0]) * 1024


def _size(count: float) -> str:
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = next(i for i in range(len(units)) if count < 1024 ** (i + 1) or i == len(units) - 1)
    return f"{count / 1024**power:,.{min(power, 1)}f} {units[power]}"
