"""What a compiled program sends between devices: kind, mesh axes, how often, bytes.

XLA for TPUs compiles a program of several slices for one of them: its collectives count the devices
of a slice, and what goes between slices are `send`s to the hosts, which exchange it:

    %send.2 = (...) send(%x, %after-all), channel_id=4, is_host_transfer=true, frontend_attributes={
      _xla_megascale_target="{1,2}x{0:3}", _xla_megascale_transfer_type="ALL_REDUCE"}
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd_jax.fit.hlo import Computation, Instruction, Module, array_bytes, executed

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
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same mesh axes.

    Attributes:
        axes: joined by `+`, such as `data+fsdp`.
        count: how often they run.
        sent_bytes: what a device sends in all of these, as on a ring: of n devices an all-gather
            sends a shard n - 1 times, a reduce-scatter (n - 1) / n of its input, an all-reduce
            twice that.
        network_bytes: of these, what goes over the network between slices or nodes.
    """

    kind: str
    axes: str
    count: int
    sent_bytes: float
    network_bytes: float = 0.0


def collectives(
    module: Module,
    mesh: Mapping[str, int],
    unknown_trips: int = 1,
    islands: Sequence[int] = (),
) -> list[Collective]:
    """The collectives of a program, the largest first.

    Args:
        mesh: sizes of the axes in their order; device i of the program is the i-th of the mesh.
        unknown_trips: as `executed` takes it.
        islands: of each device, its slice or node; without them, all are in one.
    """
    # Of a collective that runs beside other work, XLA for TPUs repeats the line in each part of it.
    seen: set[tuple[str, str, int]] = set()
    counts: dict[tuple[str, str, int], int] = defaultdict(int)
    sent: dict[tuple[str, str, int], float] = defaultdict(float)
    shares: dict[tuple[str, str, int], float] = {}
    for computation, instruction, times in executed(module, unknown_trips, into_fusions=True):
        kind = _kind(computation, instruction)
        channel = _CHANNEL.search(instruction.attributes)
        if not kind or (channel is not None and (instruction.opcode, channel[1], times) in seen):
            continue
        if channel is not None:
            seen.add((instruction.opcode, channel[1], times))
        whole = instruction.opcode == "send"
        group = _one_of_each(islands) if whole else group_of(instruction, mesh)
        if len(group) < 2:
            continue
        given = [computation.instructions.get(name) for name in instruction.operands]
        size = sum(array_bytes(x.result) for x in given if x is not None)
        spread = len({islands[device] for device in group}) if islands else 1
        key = kind, axes_of(group, mesh), spread
        counts[key] += times
        sent[key] += times * sent_bytes(kind, size, len(group))
        shares[key] = network_share(kind, len(group), spread)
    found = [Collective(*k[:2], counts[k], sent[k], sent[k] * shares[k]) for k in counts]
    return sorted(found, key=lambda x: -x.sent_bytes)


def _kind(computation: Computation, instruction: Instruction) -> str:
    """One of `KINDS`, or nothing."""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "send" and (found := _BETWEEN_SLICES.search(instruction.attributes)):
        kind = found[1].lower().replace("_", "-")
        return kind if kind in KINDS else "collective-permute"
    if kind in KINDS and computation.name.startswith("all-reduce-scatter"):
        return "reduce-scatter"  # XLA for TPUs names a fusion so that does no more than that
    return kind if kind in KINDS else ""


def _one_of_each(islands: Sequence[int]) -> list[int]:
    """The first device of each island: those that exchange where slices do."""
    return [islands.index(island) for island in sorted(set(islands))]


def network_share(kind: str, ways: int, islands: int) -> float:
    """Of the bytes that `ways` devices send, the part between the islands that they are in.

    As an exchange in two steps has it: among the devices of an island, and among those that have
    the same place in different islands. All-gather, reduce-scatter and all-reduce then send
    (islands - 1) / (ways - 1) of their bytes between islands; a permutation is taken to cross.
    """
    if islands == 1:
        return 0.0
    if kind in ("all-to-all", "ragged-all-to-all"):
        return (ways - ways / islands) / (ways - 1)
    return (islands - 1) / (ways - 1) if kind in _IN_TWO_STEPS else 1.0


_IN_TWO_STEPS = ("all-gather", "all-reduce", "reduce-scatter")


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
