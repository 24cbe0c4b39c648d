"""What can stand behind `--fit`: TPU slices by their names or shapes, NVIDIA cards by number."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from opd_jax.errors import ConfigError
from opd_jax.fit.hardware import CARDS, TPUS, Device

EXAMPLES = "v5e-16, v5e:4x4, v5p-32, 2xv5e-16, 8xh100 or h100:8"
CORES_A_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
"""What the number in a slice's name counts: TensorCores, of which a chip has so many."""
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
}
SHAPES = {"v4": _CUBES, "v5p": _CUBES, "v5e": _FLAT, "v6e": _FLAT}
"""Chips of a slice to its shape."""
MOST_CHIPS = {"v4": 4096, "v5p": 8960, "v5e": 256, "v6e": 256}
MOST_CARDS = 4096
MOST_SLICES = 64
MOST_AUTO = 256
"""Devices of the largest target that `auto` tries."""


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        generation: a key of `TPUS` or `CARDS`.
        count: devices as JAX counts them: chips of all slices, cards.
        shape: of a slice, as libtpu writes it; empty for cards.
        slices: how many such slices, joined by the network.
    """

    name: str
    generation: str
    count: int
    shape: str = ""
    slices: int = 1

    @property
    def device(self) -> Device:
        """Figures of one of them."""
        found = TPUS.get(self.generation)
        return CARDS[self.generation].device if found is None else found

    @property
    def platform(self) -> str:
        """ "tpu" or "gpu"."""
        return "tpu" if self.generation in TPUS else "gpu"


def parse_target(text: str) -> Target:
    """A target by its name: `v5e-16`, `v5e:4x4`, `v5p-32`, `2xv5e-16`, `h100:8`, `8xh100`.

    Raises:
        ConfigError: there is no such chip, card, shape or number.
    """
    name = text.strip().lower()
    if found := re.fullmatch(r"(?:(\d+)x)?(v\d+[a-z]*)[:-]([\dx]+)", name):
        one = _slice(text, found[2], found[3], shaped=":" in name)
        return one if found[1] is None else _several(text, one, int(found[1]))
    for pattern in (r"(?P<card>[a-z]\d+(-\d+)?):(?P<count>\d+)", r"(?P<count>\d+)x(?P<card>.+)"):
        if found := re.fullmatch(pattern, name):
            return _cards(text, found["card"], int(found["count"]))
    if name in CARDS:
        return Target(name, name, 1)
    raise ConfigError(
        f"fit: unknown target '{text}'; name a TPU slice or a number of cards, such as {EXAMPLES}"
    )


def candidates(text: str) -> list[str]:
    """Targets of `auto` (TPU v5e) or `auto:h100`, the smallest first.

    Raises:
        ConfigError: there is no such chip or card.
    """
    name = text.strip().lower().removeprefix("auto").removeprefix(":") or "v5e"
    if name in CARDS:
        return [f"{name}:{count}" for count in (1, 2, 4, 8, 16, 32)]
    if name not in TPUS:
        raise ConfigError(
            f"fit: target '{text}'; after 'auto:' comes one of {', '.join([*TPUS, *CARDS])}"
        )
    return [f"{name}:{shape}" for chips, shape in SHAPES[name].items() if chips <= MOST_AUTO]


def larger(target: Target) -> str | None:
    """The next target of the same kind, `None` where it is several slices or the largest named."""
    if target.platform == "gpu":
        return f"{target.generation}:{2 * target.count}"
    shapes = SHAPES[target.generation].items()
    more = [shape for chips, shape in shapes if chips > target.count and target.slices == 1]
    return f"{target.generation}:{more[0]}" if more else None


def _slice(text: str, generation: str, size: str, *, shaped: bool) -> Target:
    if generation not in TPUS:
        known = ", ".join(TPUS)
        raise ConfigError(f"fit: target '{text}': unknown TPU '{generation}'; known: {known}")
    if not shaped:
        return _named_slice(text, generation, size)
    dims = [int(x) for x in size.split("x") if x]
    needed = len(next(iter(SHAPES[generation].values())).split("x"))
    if not re.fullmatch(r"\d+(x\d+)+", size) or len(dims) != needed or 0 in dims:
        example = next(iter(SHAPES[generation].values()))
        raise ConfigError(
            f"fit: target '{text}': a {generation} slice has {needed} sides, as in "
            f"{generation}:{example}"
        )
    if math.prod(dims) > MOST_CHIPS[generation]:
        raise ConfigError(
            f"fit: target '{text}' has {math.prod(dims)} chips; a {generation} slice has at most "
            f"{MOST_CHIPS[generation]}"
        )
    return Target(text.strip(), generation, math.prod(dims), "x".join(map(str, dims)))


def _several(text: str, one: Target, slices: int) -> Target:
    if not 1 <= slices <= MOST_SLICES:
        raise ConfigError(
            f"fit: target '{text}': {slices} slices; give 1 to {MOST_SLICES}, as in 2xv5e-16"
        )
    return dataclasses.replace(one, count=slices * one.count, slices=slices)


def _named_slice(text: str, generation: str, size: str) -> Target:
    shapes, each = SHAPES[generation], CORES_A_CHIP[generation]
    names = {str(chips * each): chips for chips in shapes}
    if size not in names:
        what = "TensorCores" if each > 1 else "chips"
        raise ConfigError(
            f"fit: target '{text}': {generation} slices have {', '.join(names)} {what}; or give a "
            f"shape, such as {generation}:{shapes[16]}"
        )
    chips = names[size]
    return Target(text.strip(), generation, chips, shapes[chips])


def _cards(text: str, card: str, count: int) -> Target:
    if card not in CARDS:
        raise ConfigError(f"fit: target '{text}': unknown card '{card}'; known: {', '.join(CARDS)}")
    node = CARDS[card].device.node
    if not 1 <= count <= MOST_CARDS or (count > node and count % node):
        raise ConfigError(
            f"fit: target '{text}': {count} cards; give 1 to {node}, or whole nodes of {node}"
        )
    return Target(text.strip(), card, count)
