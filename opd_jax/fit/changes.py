"""What would make a program fit: changes to the config, one on top of the other, gentlest first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from opd_jax.config import Config

ALL_FSDP = {"data": 1, "fsdp": -1, "tensor": 1, "expert": 1}


def changes(config: Config, name: str, ways: int, devices: int) -> Iterator[tuple[str, Config]]:
    """Configs to try for a program that does not fit: what changed so far, in words, and all.

    Of a train step: full rematerialisation, then the fewest rows a micro-batch can have, then
    `fsdp` over all devices. Of scoring and sampling: batches or slots that are a quarter, then
    `fsdp`.

    Args:
        name: of the program, as its draft calls it.
        ways: into how many parts the mesh cuts rows.
    """
    said: list[str] = []
    trains = name.partition(".")[0] in ("sft", "train")
    for step in (_remat, _micro, _fsdp) if trains else (_quarter, _fsdp):
        found = step(config, name, ways, devices)
        if found is not None:
            words, tree = found
            said.append(words)
            config = _with(config, tree)
            yield ", ".join(said), config


Step = tuple[str, dict[str, Any]]


def _with(config: Config, tree: dict[str, Any]) -> Config:
    """The config with some keys changed, validated anew."""
    return Config.model_validate_json(json.dumps(_merged(config.model_dump(mode="json"), tree)))


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    found = dict(old)
    for key, value in new.items():
        found[key] = _merged(found.get(key) or {}, value) if isinstance(value, dict) else value
    return found


def _remat(config: Config, name: str, ways: int, devices: int) -> Step | None:
    del name, ways, devices
    if config.model.remat in ("full", "offload"):
        return None
    return "model.remat=full", {"model": {"remat": "full"}}


def _micro(config: Config, name: str, ways: int, devices: int) -> Step | None:
    """As few rows as there are parts of a batch."""
    del devices
    loop = config.sft if name == "sft" else config.train.runs[_run(name)]
    rows = loop.micro_batch_size or loop.batch_size
    if rows <= ways or loop.batch_size % ways:
        return None
    return f"{_key(name)}.micro_batch_size={ways}", _at(name, {"micro_batch_size": ways})


def _fsdp(config: Config, name: str, ways: int, devices: int) -> Step | None:
    del ways
    now = {axis: getattr(config.mesh, axis) for axis in ALL_FSDP}
    if now in (ALL_FSDP, {**ALL_FSDP, "fsdp": devices}):
        return None
    words, tree = "mesh.fsdp=-1 alone", {"mesh": dict(ALL_FSDP)}
    if name.partition(".")[0] in ("sft", "train"):
        loop = config.sft if name == "sft" else config.train.runs[_run(name)]
        if loop.micro_batch_size is not None and loop.micro_batch_size % devices:
            if loop.batch_size % devices:
                return None
            words += f", {_key(name)}.micro_batch_size={devices}"
            tree |= _at(name, {"micro_batch_size": devices})
    return words, tree


def _quarter(config: Config, name: str, ways: int, devices: int) -> Step:
    del ways, devices
    if name == "score":
        tokens = max(config.score.batch_tokens // 4, 1)
        return f"score.batch_tokens={tokens}", {"score": {"batch_tokens": tokens}}
    stage = name.partition(".")[0]
    slots = max(getattr(config, stage).slots // 4, 1)
    return f"{stage}.slots={slots}", {stage: {"slots": slots}}


def _run(name: str) -> str:
    return name.removeprefix("train.")


def _key(name: str) -> str:
    return "sft" if name == "sft" else f"train.runs.{_run(name)}"


def _at(name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"sft": values} if name == "sft" else {"train": {"runs": {_run(name): values}}}
