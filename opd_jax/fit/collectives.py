"""What a compiled program sends between devices: kind, mesh axes, how often, bytes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd_jax.fit.hlo import Instruction, Module, array_bytes, executed

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})?\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<dims>[^\]]*)\](?:, device_ids=\(\[(?P<ids>[\d,]+)\]"
    r"(?:T\((?P<turn>[\d,]+)\))?\))? \{(?P<along>[^}]*)\}"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")
_GROUP = re.compile(r"\{([\d, ]+)\}")


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same mesh axes.

    Attributes:
        axes: joined by `+`, such as `data+fsdp`.
        count: how often they run.
        sent_bytes: what a device sends in all of these, as on a ring: of n devices an all-gather
            sends a shard n - 1 times, a reduce-scatter (n - 1) / n of its input, an all-reduce
            twice that.
        across_nodes: over the network between nodes, not over their links.
    """

    kind: str
    axes: str
    count: int
    sent_bytes: float
    across_nodes: bool = False


def collectives(
    module: Module, mesh: Mapping[str, int], unknown_trips: int = 1, node: int = 0
) -> list[Collective]:
    """The collectives of a program, the largest first.

    Args:
        mesh: sizes of the axes in their order; device i of the program is the i-th of the mesh.
        unknown_trips: as `executed` takes it.
        node: devices of a node; 0: all are in one.
    """
    # Of a collective that runs beside other work, XLA for TPUs repeats the line in each part of it.
    seen: set[tuple[str, int]] = set()
    counts: dict[tuple[str, str, bool], int] = defaultdict(int)
    sent: dict[tuple[str, str, bool], float] = defaultdict(float)
    for computation, instruction, times in executed(module, unknown_trips, into_fusions=True):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # XLA for TPUs names a fusion so that does no more than that
        channel = _CHANNEL.search(instruction.attributes)
        if channel is not None and (channel[1], times) in seen:
            continue
        if channel is not None:
            seen.add((channel[1], times))
        group = group_of(instruction, mesh)
        if len(group) < 2:
            continue
        given = [computation.instructions.get(name) for name in instruction.operands]
        size = sum(array_bytes(x.result) for x in given if x is not None)
        across = node > 0 and len({device // node for device in group}) > 1
        key = kind, axes_of(group, mesh), across
        counts[key] += times
        sent[key] += times * sent_bytes(kind, size, len(group))
    found = [Collective(k[0], k[1], counts[k], sent[k], k[2]) for k in counts]
    return sorted(found, key=lambda x: -x.sent_bytes)


def sent_bytes(kind: str, size: int, ways: int) -> float:
    """What one of `ways` devices sends for a collective over inputs of `size` bytes each."""
    share = (ways - 1) / ways
    return size * {
        "all-gather": ways - 1,
        "all-reduce": 2 * share,
        "reduce-scatter": share,
        "all-to-all": share,
        "ragged-all-to-all": share,
    }.get(kind, 1)


def group_of(instruction: Instruction, mesh: Mapping[str, int]) -> list[int]:
    """Devices that exchange with each other: the first such group of a collective.

    Of a permutation, the first device and all that it reaches step by step.
    """
    text = instruction.attributes
    everyone = list(range(int(np.prod(list(mesh.values())))))
    if found := _PAIRS.search(text):
        pairs = [_numbers(pair) for pair in _GROUP.findall(found[1])]
        return _reached({pair[0]: pair[1] for pair in pairs})
    if found := _MESH.search(text):
        return _along_mesh(found, len(everyone))
    if found := _IOTA.search(text):
        return _order(found[2], found[3]).reshape(_numbers(found[1]))[0].tolist()
    if (found := _LISTED.search(text)) and found[1]:
        return _numbers(_GROUP.findall(found[1])[0])
    return everyone


def _order(dims: str, turn: str | None) -> np.ndarray:
    """Device numbers, counted over `dims`, whose axes are then put in the order `turn`."""
    order = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
    return order.transpose(_numbers(turn)) if turn else order


def _along_mesh(found: re.Match[str], devices: int) -> list[int]:
    """`mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}`: the devices along some axes."""
    named = [x.partition("=") for x in found["dims"].split(",")]
    sizes = {name.strip(" '"): int(size) for name, _, size in named}
    order = _order(found["ids"] or str(devices), found["turn"]).reshape(list(sizes.values()))
    along = {name.strip(" '") for name in found["along"].split(",")}
    if not along <= set(sizes):  # parts of axes
        return list(range(devices))
    return order[tuple(slice(None) if name in along else 0 for name in sizes)].reshape(-1).tolist()


def _reached(pairs: Mapping[int, int]) -> list[int]:
    """A device and those behind it, for the first that sends to another."""
    start = next((a for a, b in pairs.items() if a != b), None)
    if start is None:
        return []
    chain = [start]
    while (after := pairs.get(chain[-1])) is not None and after not in chain:
        chain.append(after)
    return chain


def axes_of(group: Sequence[int], mesh: Mapping[str, int]) -> str:
    """The mesh axes along which the devices of a group differ."""
    places = np.unravel_index(np.asarray(group), tuple(mesh.values()))
    differing = [
        axis for axis, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1
    ]
    return "+".join(differing)


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x.strip()]
