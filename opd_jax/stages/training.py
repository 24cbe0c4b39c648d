"""What `sft` and `train` share: run the loop, write metrics, keep the model with its lineage."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from opd_jax.config import LoopConfig
from opd_jax.core.distributed import barrier, is_first
from opd_jax.core.lineage import Identity, fingerprint_json
from opd_jax.core.metrics import MetricsWriter
from opd_jax.core.progress import StageProgress
from opd_jax.data.store import open_store
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.errors import ConfigError
from opd_jax.model.lora import Adapters
from opd_jax.model.transformer import Params
from opd_jax.stages.context import RunContext
from opd_jax.stages.records import Json
from opd_jax.train import checkpoint
from opd_jax.train.loop import Source, TrainJob, run_training
from opd_jax.train.sources import sft_source
from opd_jax.train.step import Objective


class TrainTask(NamedTuple):
    """One training run: its stage, the name of its checkpoint, and what is trained how."""

    stage: str
    name: str
    objective: Objective
    loop: LoopConfig
    inputs: Json


def train(
    ctx: RunContext, task: TrainTask, params: Params, source: Source, lineage: Json
) -> tuple[Identity, Json]:
    """Train from `params`, or from where an earlier try stopped; returns the model and counts."""
    model = ctx.program("student")
    folder = ctx.checkpoint_dir(task.name) / "state"
    inputs, seed = fingerprint_json(task.inputs), ctx.seed(f"lora/{task.name}")
    job = TrainJob(model, task.objective, task.loop, folder, inputs, seed)
    start = checkpoint.latest_step(folder) or 0
    barrier("train")
    progress = StageProgress(task.stage, task.loop.steps, "steps", start)
    with _metrics(ctx, task, start) as writer, progress:

        def log(step: int, values: dict[str, float]) -> None:
            progress.add(1, int(values["tokens"]), _note(task.objective, values))
            if writer is not None:
                writer.write(step, values)

        trained, tokens = run_training(job, params, source, log)
    identity = ctx.save_model(task.name, trained, lineage)
    return identity, {"steps": task.loop.steps, "tokens": tokens}


def check_adapters(ctx: RunContext) -> None:
    """Raises ConfigError if a run is to train adapters that the student or the mesh cannot have."""
    config = ctx.config
    loops: dict[str, LoopConfig] = {"sft": config.sft}
    loops |= {f"train.runs.{name}": config.train.runs[name] for name in config.train.enabled}
    for key, loop in loops.items():
        if loop.lora is not None:
            try:
                Adapters(ctx.program("student"), loop.lora).abstract()
            except ConfigError as error:
                raise ConfigError(f"{key}.{error}") from error


def _note(objective: Objective, values: dict[str, float]) -> str:
    """The figure to watch: the `sampled` loss is a surrogate, whose value says nothing."""
    if objective.kind == "sampled":
        return f"A^2/2 {values['half_squared_advantage']:.4f}"
    return f"loss {values['loss']:.4f}"


def _metrics(
    ctx: RunContext, task: TrainTask, start: int
) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    """Process 0 writes the metrics of all."""
    if not is_first():
        return contextlib.nullcontext()
    stage = task.stage.split(".")[0]
    return MetricsWriter(ctx.run_dir, stage, task.name, start, ctx.config.tensorboard)


def answers(ctx: RunContext, needed_by: str) -> Snapshot:
    """The frozen answers of the teacher."""
    snapshot = ctx.records.outputs("answer", needed_by)["snapshot"]
    return open_store(ctx.store_root("answers")).open_snapshot(snapshot)


def answer_source(ctx: RunContext, loop: LoopConfig, needed_by: str, stream: str) -> Source:
    """Packed rows of the teacher's answers."""
    snapshot = answers(ctx, needed_by)
    rows = ctx.config.sft.row_tokens
    return sft_source(snapshot, range(len(snapshot)), rows, loop.batch_size, ctx.seed(stream))
