"""From a config's training runs to what they compute, whatever their data are."""

from __future__ import annotations

from opd_jax.algo.losses import Terms
from opd_jax.config import Config
from opd_jax.config_train import LoopConfig, TrainRun
from opd_jax.errors import ConfigError
from opd_jax.train.step import Objective


def loops_of(config: Config) -> dict[str, LoopConfig]:
    """The training loops of a config by their keys."""
    runs = {f"train.runs.{name}": config.train.runs[name] for name in config.train.enabled}
    return {"sft": config.sft, **runs}


def check_batches(config: Config, ways: int) -> None:
    """Every forward pass of training must be divisible over the devices.

    Without `micro_batch_size`, OPD rounds its packed rows up; SFT has `batch_size` of them.
    """
    for key, loop in loops_of(config).items():
        field = "batch_size" if loop.micro_batch_size is None else "micro_batch_size"
        opd = isinstance(loop, TrainRun) and loop.algorithm != "sft"
        if opd and field == "batch_size":
            continue
        rows = getattr(loop, field)
        if rows % ways:
            raise ConfigError(
                f"{key}.{field}={rows} is not divisible over {ways} devices (mesh.data x "
                "mesh.fsdp x mesh.expert); change it, or the mesh"
            )


def check_row_tokens(config: Config, parts: int) -> None:
    """Raises ConfigError if rows of a wanted length cannot be cut into `parts`.

    Where the config leaves it open, a length that can be is chosen.
    """
    rows = {key: getattr(loop, "row_tokens", None) for key, loop in loops_of(config).items()}
    for key, tokens in rows.items():
        if tokens is not None and tokens % parts:
            raise ConfigError(
                f"{key}.row_tokens={tokens} is not divisible over {parts} devices (mesh.context); "
                f"set it to {-(-tokens // parts) * parts}, or change the mesh"
            )


def objective_of(loop: LoopConfig) -> Objective:
    """The objective of SFT (and of the control, which is more of it) or of an OPD run."""
    if not isinstance(loop, TrainRun):
        return Objective("sft", router_balance=loop.router_balance)
    kind = "sft" if loop.algorithm == "sft" else loop.objective
    terms = Terms(
        loop.tau,
        loop.reward_scale,
        loop.kl_anchor,
        loop.weight_cap,
        loop.position_gamma,
        loop.ratio_clip,
    )
    return Objective(kind, terms, loop.tail, loop.router_balance)
