"""How many slots and pages of the cache, and whether the memory for them is there.

A slot for the longest prompt and the longest response costs the most; few responses get so long. So
slots get pages as their samples grow, and there are as many pages as samples of unknown lengths
will need: a sample that finds none waits until another one ends.

Samples of one prompt share its keys and values where that saves enough memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from opd_jax.core.mesh import axis_size, platform_of
from opd_jax.errors import ConfigError
from opd_jax.model.cache import Pages, PromptPages, cache_token_bytes
from opd_jax.model.transformer import LanguageModel

SHORTEST_PAGE = {True: 128, False: 256}  # on CPUs and elsewhere, if the longest sample is longer
MOST_PLACES = 2  # for readers of shared prompts, for each slot
COARSE = 4  # numbers of pages, where these are rounded up
MOST_LEVELS = 8  # pages of the longest sample
SHARED = 0.9  # prompts are shared if all pages then hold at most this share of the tokens
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CachePlan:
    """Slots and pages, and what they cost."""

    pages: Pages
    token_bytes: int  # of keys and values in all layers

    @property
    def total_bytes(self) -> int:
        """Of all pages, over all devices."""
        return self.pages.tokens * self.token_bytes

    def __str__(self) -> str:
        pages, prompts = self.pages, self.pages.prompts
        shared = ""
        if prompts is not None:
            count = pages.shards * prompts.count
            shared = f"and {count:,} of {prompts.length:,} tokens for prompts that samples share "
        return (
            f"{pages.rows:,} slots, {sum(pages.sizes):,} pages of {pages.length:,} tokens {shared}"
            f"x {self.token_bytes:,} bytes a token = {_size(self.total_bytes)} of keys and "
            f"values, {_size(self.total_bytes / pages.rows)} a slot"
        )


def plan_cache(
    model: LanguageModel,
    slots: int,
    prompts: Sequence[int],
    leasts: Sequence[int],
    limits: Sequence[int],
    samples: Sequence[int] = (1,),
    *,
    coarse: bool = False,
) -> CachePlan:
    """Slots for some requests, given the length of each prompt, the least length of each response
    and its limit, and for each prompt its samples.

    Of each level there are pages for the samples that can get so long, or for the square root of
    the share that will, if a response's length is anything from its least to its limit with equal
    chance: more than that, because to wait for pages costs whole steps.

    Args:
        coarse: the counts of pages are rounded up, so that other requests find programs compiled.
    """
    shards = 1 if model.mesh is None else axis_size(model.mesh, "batch")
    rows = -(-min(slots, 1 << (len(prompts) - 1).bit_length()) // shards)
    cpu = platform_of(model.mesh) == "cpu"
    pages = replace(_rows_pages(cpu, rows, (prompts, leasts, limits)), shards=shards)
    each = sum(samples) / len(samples) / shards  # a slot of any shard takes the next sample
    if each > 1:
        shared = _rows_pages(cpu, rows, ([0] * len(prompts), leasts, limits))
        shape = _prompt_pages(cpu, rows, max(prompts), each)
        shared = replace(shared, shards=shards, prompts=shape)
        pages = shared if shared.tokens <= SHARED * pages.tokens else pages
    if coarse:
        step = max(rows // COARSE, 1)
        counts = (min(-(-count // step) * step, rows) for count in pages.counts)
        pages = replace(pages, counts=tuple(counts))
    return CachePlan(pages, cache_token_bytes(model))


def _prompt_pages(cpu: bool, rows: int, longest: int, n: float) -> PromptPages:
    """Pages for the prompts of all rows of a shard, where each has n samples there.

    A prompt stays until the longest sample ends: if lengths are exponential, the harmonic number
    of n times as long as one sample on average. With n / that of its samples in slots at a time,
    this many prompts fill the slots.
    """
    lasts = sum(1 / i for i in range(1, round(n) + 1))
    count = max(min(math.ceil(rows * lasts / n) + 1, rows), 2)
    readers = min(math.ceil(n), rows, -(-MOST_PLACES * rows // count))
    step = 16 if cpu else 128
    return PromptPages(count, readers, math.ceil(longest / step) * step)


def _rows_pages(cpu: bool, rows: int, lengths: tuple[Sequence[int], ...]) -> Pages:
    """Pages for prompts, and responses of least and largest lengths, in one shard."""
    prompt_r, least_r, limit_r = (np.asarray(x, np.float64) for x in lengths)
    longest = int((prompt_r + limit_r).max())
    levels = min(max(longest // SHORTEST_PAGE[cpu], 1), MOST_LEVELS)
    step = 16 if cpu else 64 if levels == 1 else 128
    length = math.ceil(longest / levels / step) * step
    counts = [rows]
    for start in range(length, longest, length):
        share = _share_beyond(start, prompt_r, least_r, limit_r)
        counts.append(min(max(math.ceil(rows * share), 1), rows))
    return Pages(tuple(counts), length)


def _share_beyond(
    length: int, prompt_r: np.ndarray, least_r: np.ndarray, limit_r: np.ndarray
) -> float:
    """Share of the slots that get pages for tokens beyond this length.

    Samples with more to say are longer in their slots and count for more.
    """
    spread_r = np.maximum(limit_r - least_r, 1)
    longer_r = np.clip((prompt_r + limit_r - length) / spread_r, 0, 1)
    can, will = (float(np.sum(limit_r * x) / np.sum(limit_r)) for x in (longer_r > 0, longer_r))
    return min(can, math.sqrt(will))


def check_memory(
    plan: CachePlan, model: LanguageModel, waiting: int = 0, *, copies: bool = True
) -> None:
    """Raises ConfigError, with the arithmetic, if the slots do not fit the free memory.

    Args:
        waiting: tokens of the largest prefill, whose keys and values wait for slots.
        copies: the weights in the order of decoding, a second copy, are still to be made.
    """
    mesh = model.mesh
    ways = whole = 1
    if mesh is not None and platform_of(mesh) != "cpu":
        kv_ways = axis_size(mesh, "kv_heads")
        # Rows are cut over the copies, weights are not.
        ways, whole = plan.pages.shards * kv_ways, mesh.size // axis_size(mesh, "copies")
    free = free_bytes(mesh)
    if free is None:
        return
    cache, logits = plan.total_bytes / ways, 4 * plan.pages.rows * model.arch.vocab_size / ways
    prompts = waiting * plan.token_bytes / ways
    weights = _weight_bytes(model) / whole if copies else 0
    if cache + prompts + logits + weights > free:
        where = f", {_size(cache)} a device" if ways > 1 else ""
        copy = f", {_size(weights)} for weights in the order of decoding" if copies else ""
        copy += f", {_size(prompts)} for prompts that wait" if waiting else ""
        raise ConfigError(
            f"sampling: {plan}{where}, {_size(logits)} of logits{copy}, but {_size(free)} are free;"
            " lower slots or max_new_tokens, or use more devices"
        )


def _weight_bytes(model: LanguageModel) -> int:
    """Of all parameters in the compute dtype."""
    leaves = jax.tree.leaves(model.abstract(model.compute_dtype))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def free_bytes(mesh: Mesh | None) -> float | None:
    """Memory to be had on the fullest device here, or on this machine; `None`: not known."""
    if platform_of(mesh) == "cpu":
        return _host_bytes()
    devices = jax.local_devices() if mesh is None else mesh.local_devices
    try:
        stats = [device.memory_stats() or {} for device in devices]
    except jax.errors.JaxRuntimeError:  # they are absent: only compiled for
        return None
    if any("bytes_limit" not in s for s in stats):
        return None
    return min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)


def _host_bytes() -> float | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines())
    free = float(fields["MemAvailable"].split()[0]) * 1024
    return min(free, container_bytes(CGROUP))


def container_bytes(folder: Path) -> float:
    """What a container's limit (control group, version 2) leaves; infinite where there is none."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = float((folder / "memory.current").read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    if limit == "max":
        return math.inf
    # Files that were read lie there until the memory is asked for.
    return float(limit) - used + float(dict(map(str.split, lines)).get("inactive_file", 0))


def _size(count: float) -> str:
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = next(i for i in range(len(units)) if count < 1024 ** (i + 1) or i == len(units) - 1)
    return f"{count / 1024**power:,.{min(power, 1)}f} {units[power]}"
