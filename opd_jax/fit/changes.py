"""What would make a program fit: changes to the config, one on top of the other, gentlest first."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from opd_jax.config import Config, MeshConfig
from opd_jax.fit.results import ProgramReport

ALL_FSDP = {"data": 1, "fsdp": -1, "tensor": 1, "expert": 1, "context": 1}
ACTIVATIONS = "activations and temporaries"
CAUTION = 0.8
"""What is left of the rows for which there should be room: not all temporaries shrink with rows."""


class Case(NamedTuple):
    """The program that does not fit, and where.

    Attributes:
        name: as its draft calls it.
        ways: into how many parts the mesh cuts rows.
        devices: of the target.
        share: of the rows of a forward pass, for which there should be room.
        slices: TPU slices of the target, which `data` has to hold.
    """

    name: str
    ways: int
    devices: int
    share: float
    slices: int = 1

    @property
    def trains(self) -> bool:
        """Whether it is a train step."""
        return self.name.partition(".")[0] in ("sft", "train")


Change = tuple[str, dict[str, Any]]
"""In words, and what the config gets."""
Step = Callable[[Config, Case], Change | None]


def steps_of(name: str) -> tuple[Step, ...]:
    """What to try for a program, in this order; a step that changes nothing gives `None`.

    Of a train step: full rematerialisation, then fewer rows a micro-batch, the fewest there can be,
    then moments in the host's memory, which costs transfers but leaves the mesh, then `fsdp` over
    all devices. Of scoring and sampling: batches or slots that are a quarter, then `fsdp`.
    """
    trains = name.partition(".")[0] in ("sft", "train")
    return (_remat, _micro, _fewest, _offload, _fsdp) if trains else (_quarter, _fsdp)


def room_share(report: ProgramReport) -> float:
    """For which share of a program's activations there is room beside what does not shrink."""
    fixed = sum(size for name, size in report.parts.items() if name != ACTIVATIONS)
    fixed += sum(report.beside.values())
    shrinks = report.needed_bytes - fixed
    return max(report.room_bytes - fixed, 0) / shrinks if shrinks > 0 else 0.0


def changed(config: Config, tree: dict[str, Any]) -> Config:
    """The config with some keys changed, validated anew."""
    return Config.model_validate_json(json.dumps(_merged(config.model_dump(mode="json"), tree)))


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    found = dict(old)
    for key, value in new.items():
        found[key] = _merged(found.get(key) or {}, value) if isinstance(value, dict) else value
    return found


def _remat(config: Config, case: Case) -> Change | None:
    del case
    if config.model.remat in ("full", "offload"):
        return None
    return "model.remat=full", {"model": {"remat": "full"}}


def _micro(config: Config, case: Case) -> Change | None:
    """As many rows as there should be room for, or the fewest that the mesh can cut."""
    rows, fewer = _fewer_rows(config, case)
    if not fewer:
        return None
    roomy = [n for n in fewer if n <= rows * case.share * CAUTION]
    return _with_micro(case.name, max(roomy, default=fewer[0]))


def _fewest(config: Config, case: Case) -> Change | None:
    """The fewest rows that the mesh can cut, where the guess before was too many."""
    _, fewer = _fewer_rows(config, case)
    return _with_micro(case.name, fewer[0]) if fewer else None


def _fewer_rows(config: Config, case: Case) -> tuple[int, list[int]]:
    """Rows of a micro-batch, and the smaller numbers that divide the batch over the mesh."""
    loop = config.sft if case.name == "sft" else config.train.runs[_run(case.name)]
    rows = loop.micro_batch_size or loop.batch_size
    return rows, [n for n in range(case.ways, rows, case.ways) if loop.batch_size % n == 0]


def _with_micro(name: str, rows: int) -> Change:
    """A config with so many rows a micro-batch."""
    block, tree = _of_block(name, {"micro_batch_size": rows})
    return f"{block}.micro_batch_size={rows}", tree


def _of_block(name: str, values: dict[str, Any]) -> Change:
    """The key of a program's training block, and the config with values in it."""
    if name == "sft":
        return name, {name: values}
    return f"train.runs.{_run(name)}", {"train": {"runs": {_run(name): values}}}


def _offload(config: Config, case: Case) -> Change | None:
    """Moments of adapters are too small to be worth it."""
    loop = config.sft if case.name == "sft" else config.train.runs[_run(case.name)]
    if loop.optim.offload or loop.lora is not None:
        return None
    block, tree = _of_block(case.name, {"optim": {"offload": True}})
    return f"{block}.optim.offload=true", tree


def _fsdp(config: Config, case: Case) -> Change | None:
    now = (config.mesh or MeshConfig()).model_dump()
    wanted = {**ALL_FSDP, "data": case.slices}
    if now in (wanted, {**wanted, "fsdp": case.devices // case.slices}):
        return None
    apart = f"mesh.data={case.slices}, " if case.slices > 1 else ""
    words, tree = f"{apart}mesh.fsdp=-1 alone", {"mesh": wanted}
    if not case.trains:
        return words, tree
    loop = config.sft if case.name == "sft" else config.train.runs[_run(case.name)]
    if loop.micro_batch_size is None or loop.micro_batch_size % case.devices == 0:
        return words, tree
    if loop.batch_size % case.devices:
        return None
    more, rows = _with_micro(case.name, case.devices)
    return f"{words}, {more}", tree | rows


def _quarter(config: Config, case: Case) -> Change:
    if case.name == "score":
        tokens = max(config.score.batch_tokens // 4, 1)
        return f"score.batch_tokens={tokens}", {"score": {"batch_tokens": tokens}}
    stage = case.name.partition(".")[0]
    slots = max(getattr(config, stage).slots // 4, 1)
    return f"{stage}.slots={slots}", {stage: {"slots": slots}}


def _run(name: str) -> str:
    return name.removeprefix("train.")
