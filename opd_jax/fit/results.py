"""What `--fit` finds, as data: `fit.json` holds a `FitReport`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from opd_jax.fit.collectives import Collective

Bytes = dict[str, int]


@dataclass(frozen=True)
class StepTime:
    """Seconds that each resource is needed for."""

    compute: float
    memory: float
    links: float
    host: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the whole program; nothing else is left to do while state comes from the host."""
        return max(self.compute, self.memory, self.links) + self.host

    @property
    def bound(self) -> str:
        """The resource that decides."""
        parts = {"compute": self.compute, "memory": self.memory, "links": self.links}
        parts["host"] = self.host
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class ProgramReport:
    """One compiled program.

    Attributes:
        name: the stage that runs it, and which of its programs it is.
        what: its shapes, in words.
        stage: whose device-hours it counts to.
        runs: how often the whole config runs it.
        tokens: of one run, over all devices: trained, scored, read or drawn.
        flops: of the matrix products of one run, over all devices, loops by their trip counts.
        model_flops: what the mathematics asks for: 6 (forward alone: 2) for each weight and token,
            and causal attention.
        peak_bytes: of a device, this program alone: arguments + temporaries + outputs - aliases.
        parts: what that consists of.
        beside: what else lies in a device's memory while it runs.
        room_bytes: a device's memory less the reserve.
        traffic_bytes: read from and written to a device's memory in one run.
        time: estimated; `None` of a program that the compiler refused.
        problem: what the compiler said when it refused; else empty.
        host: bytes of a device's state that lie in the host's memory and visit it in every run.
    """

    name: str
    what: str
    stage: str
    runs: float
    tokens: int
    flops: float
    model_flops: float
    peak_bytes: int
    parts: Bytes
    beside: Bytes
    room_bytes: int
    compile_seconds: float
    traffic_bytes: int = 0
    collectives: list[Collective] = field(default_factory=list)
    time: StepTime | None = None
    mfu: float | None = None
    problem: str = ""
    host: Bytes = field(default_factory=dict)

    @property
    def needed_bytes(self) -> int:
        """With what lies beside it."""
        return self.peak_bytes + sum(self.beside.values())

    @property
    def free_bytes(self) -> int:
        """What is left of the room; below 0: what is lacking."""
        return self.room_bytes - self.needed_bytes

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return not self.problem and self.free_bytes >= 0

    @property
    def tokens_per_second(self) -> float | None:
        """Over all devices."""
        return self.tokens / self.time.seconds if self.time and self.time.seconds else None


@dataclass(frozen=True)
class Try:
    """A change that may make a program fit."""

    program: str
    change: str
    fits: bool
    needed_bytes: int
    compile_seconds: float


@dataclass(frozen=True)
class MeshTry:
    """A mesh that `--fit auto` compiled.

    Attributes:
        needed_bytes: of a device, by the program that needs most; of those compiled.
        hours: device-hours of all programs, if they fit.
    """

    mesh: dict[str, int]
    fits: bool
    needed_bytes: int
    hours: float | None


@dataclass(frozen=True)
class FitReport:
    """A config on a target.

    Attributes:
        hours: device-hours of each stage, of what could be estimated.
        assumed: what the numbers take for granted, in words.
        meshes: what `auto` compared; empty if there was nothing to compare.
    """

    target: str
    kind: str
    devices: int
    mesh: dict[str, int]
    memory_bytes: int
    programs: list[ProgramReport]
    hours: dict[str, float]
    tries: list[Try]
    assumed: list[str]
    meshes: list[MeshTry] = field(default_factory=list[MeshTry])

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return all(program.fits for program in self.programs)

    def to_json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        found: dict[str, Any] = {**asdict(self), "fits": self.fits}
        for program, entry in zip(self.programs, found["programs"], strict=True):
            entry |= {
                "fits": program.fits,
                "needed_bytes": program.needed_bytes,
                "free_bytes": program.free_bytes,
                "tokens_per_second": program.tokens_per_second,
            }
            if program.time is not None:
                entry["time"] |= {"seconds": program.time.seconds, "bound": program.time.bound}
        return found

    @staticmethod
    def from_json(found: dict[str, Any]) -> FitReport:
        """The report that `to_json` wrote."""
        own = {name: found[name] for name in FitReport.__dataclass_fields__}
        own["programs"] = [_program(entry) for entry in found["programs"]]
        own["tries"] = [Try(**entry) for entry in found["tries"]]
        own["meshes"] = [MeshTry(**entry) for entry in found["meshes"]]
        return FitReport(**own)


def _program(found: dict[str, Any]) -> ProgramReport:
    own = {name: found[name] for name in ProgramReport.__dataclass_fields__}
    own["collectives"] = [Collective(**entry) for entry in found["collectives"]]
    if (time := found["time"]) is not None:
        own["time"] = StepTime(*(time[x] for x in ("compute", "memory", "links", "host")))
    return ProgramReport(**own)
