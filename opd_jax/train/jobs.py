"""From a config's training runs to what they compute, whatever their data are."""

from __future__ import annotations

from typing import TypeVar

from opd_jax.algo.losses import Terms
from opd_jax.config import Config
from opd_jax.config_train import LoopConfig, TrainRun
from opd_jax.errors import MeshError
from opd_jax.train.step import Objective

Loop = TypeVar("Loop", bound=LoopConfig)


def loops_of(config: Config) -> dict[str, LoopConfig]:
    """The training loops of a config by their keys."""
    runs = {f"train.runs.{name}": config.train.runs[name] for name in config.train.enabled}
    return {"sft": config.sft, **runs}


def spread_batches(config: Config, ways: int) -> tuple[Config, list[str]]:
    """The config with a row of every forward pass of training for each device, and what changed.

    A micro-batch of too few rows is raised, for the gradient does not depend on it; where it does,
    because a balance loss is that of each micro-batch, it is refused. Without `micro_batch_size`
    OPD rounds its packed rows up; SFT has `batch_size` of them.

    Raises:
        MeshError: rows cannot be divided over the devices.
    """
    told: list[str] = []
    sft, runs = _spread("sft", config.sft, ways, told), dict(config.train.runs)
    for name in config.train.enabled:
        runs[name] = _spread(f"train.runs.{name}", runs[name], ways, told)
    train = config.train.model_copy(update={"runs": runs})
    return config.model_copy(update={"sft": sft, "train": train}), told


def _spread(key: str, loop: Loop, ways: int, told: list[str]) -> Loop:
    micro, whole = loop.micro_batch_size, loop.batch_size
    packed = isinstance(loop, TrainRun) and loop.algorithm != "sft"
    over = f"over {ways} devices (mesh.data x mesh.fsdp x mesh.expert); change it, or the mesh"
    if not packed and whole % ways:
        raise MeshError(f"{key}.batch_size={whole} is not divisible {over}")
    if micro is None or micro % ways == 0:
        return loop
    if loop.router_balance:
        raise MeshError(f"{key}.micro_batch_size={micro} is not divisible {over}")
    rows = -(-micro // ways) * ways
    while not packed and whole % rows:
        rows += ways
    told.append(f"{key}.micro_batch_size: {rows} for {micro}, to give {ways} devices a row each")
    return loop.model_copy(update={"micro_batch_size": rows})


def check_row_tokens(config: Config, parts: int) -> None:
    """Raises MeshError if rows of a wanted length cannot be cut into `parts`.

    Where the config leaves it open, a length that can be is chosen.
    """
    rows = {key: getattr(loop, "row_tokens", None) for key, loop in loops_of(config).items()}
    for key, tokens in rows.items():
        if tokens is not None and tokens % parts:
            raise MeshError(
                f"{key}.row_tokens={tokens} is not divisible over {parts} devices (mesh.context); "
                f"set it to {-(-tokens // parts) * parts}, or change the mesh"
            )


def objective_of(loop: LoopConfig) -> Objective:
    """The objective of SFT (and of the control, which is more of it) or of an OPD run."""
    if not isinstance(loop, TrainRun):
        return Objective("sft", router_balance=loop.router_balance)
    kind = "sft" if loop.algorithm == "sft" else loop.objective
    terms = Terms(
        tau=loop.tau,
        reward_scale=loop.reward_scale,
        kl_anchor=loop.kl_anchor,
        weight_cap=loop.weight_cap,
        position_gamma=loop.position_gamma,
        ratio_clip=loop.ratio_clip,
    )
    return Objective(kind, terms, loop.tail, loop.router_balance)
