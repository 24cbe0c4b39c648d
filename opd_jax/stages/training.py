"""What `sft` and `train` share: run the loop, write metrics, keep the model with its lineage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from opd_jax.config_train import LoopConfig, SFTConfig
from opd_jax.core.distributed import barrier, is_first
from opd_jax.core.lineage import Identity, fingerprint_json
from opd_jax.core.metrics import EVALUATED, MetricsWriter
from opd_jax.core.progress import StageProgress, say, stage_line
from opd_jax.data.store import open_store
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.errors import ConfigError
from opd_jax.model.transformer import Params
from opd_jax.stages.context import RunContext
from opd_jax.stages.records import Json
from opd_jax.train import checkpoint
from opd_jax.train.batch_source import Source
from opd_jax.train.guard import JUDGES, Figures, Guard, Saturation
from opd_jax.train.loop import TrainJob, is_evaluated, run_training
from opd_jax.train.probes import AnswerProbe, Probe, held_out
from opd_jax.train.rounds import Rounds
from opd_jax.train.sources import sft_source
from opd_jax.train.step import Objective
from opd_jax.train.watch import Watch


class TrainTask(NamedTuple):
    """One training run: its stage, the name of its checkpoint, and what is trained how."""

    stage: str
    name: str
    objective: Objective
    loop: LoopConfig
    inputs: Json


class Prepared(NamedTuple):
    """Where a run's batches come from, what it is evaluated by, what judges that, its rounds."""

    source: Source
    probes: list[Probe]
    guard: Guard | None = None
    saturation: Saturation | None = None
    rounds: Rounds | None = None


def train(
    ctx: RunContext,
    task: TrainTask,
    load: Callable[[], Params],
    prepared: Prepared,
    lineage: Json,
) -> tuple[Identity, Json]:
    """Train what `load` gives, or go on where an earlier try stopped; returns model and counts."""
    model = ctx.program("student")
    folder = ctx.checkpoint_dir(task.name)
    state = folder / "state"
    inputs, seed = fingerprint_json(task.inputs), ctx.seed(f"lora/{task.name}")
    profile = ctx.run_dir / "profile" / task.name if ctx.profile and is_first() else None
    job = TrainJob(model, task.objective, task.loop, state, inputs, seed, profile, lineage=lineage)
    start = checkpoint.latest_step(state) or 0
    barrier("train")
    progress = StageProgress(task.stage, task.loop.steps, "steps", start)
    with _metrics(ctx, task, start) as writer, progress:

        def log(step: int, values: dict[str, float]) -> None:
            progress.add(1, int(values["tokens"]), _note(task.objective, values))
            if writer is not None:
                writer.write(step, values)

        def report(steps: int, figures: Figures, warnings: list[str]) -> None:
            say(stage_line(task.stage, f"after {steps} steps: {_evaluated(figures)}"))
            for warning in warnings:
                say(stage_line(task.stage, f"WARNING: {warning}"))
            if writer is not None:
                writer.write(steps - 1, {**figures, EVALUATED: float(len(warnings))})

        watch = Watch(task.loop, report, folder / "best", *prepared[1:])

        def loaded() -> Params:
            return load() if task.loop.lora else _cast(load(), "float32")

        result = run_training(job, loaded, prepared.source, log, watch)
    counts: Json = {"steps": result.steps, "tokens": result.tokens}
    if result.steps < task.loop.steps:
        say(stage_line(task.stage, f"stopped after {result.steps} of {task.loop.steps} steps"))
    if result.best is not None:
        say(stage_line(task.stage, f"the trained model is the best state, of {result.best} steps"))
        counts["best_step"] = result.best
        lineage = {**lineage, "best_state_of_steps": result.best}
    elif better := better_state(prepared.guard, result.steps, folder / "best"):
        say(stage_line(task.stage, better))
    if result.skipped:
        counts["skipped"] = result.skipped
    if prepared.rounds is not None:
        lineage = {**lineage, "rounds": prepared.rounds.lineage()}
        counts["rounds"] = len(prepared.rounds.starts) - 1
    trained = _cast(result.params, ctx.config.model.param_dtype)
    identity = ctx.save_model(task.name, trained, lineage)
    return identity, counts


def better_state(guard: Guard | None, steps: int, kept: Path) -> str:
    """A line about the best state of a run that ends with another one after `steps`, or nothing."""
    if guard is None or guard.best is None or guard.best[1] == steps:
        return ""
    figures, best = guard.best
    judge = next((name for name, _ in JUDGES if name in figures), None)
    by = "" if judge is None else f" ({SHOWN[judge].format(figures[judge])})"
    took = "a run with guard.final=best ends with it"
    return f"the best state was that of {best} steps{by}, kept in {kept}; {took}"


def _cast(params: Params, dtype: str) -> Params:
    """Trained weights are float32: an update below half a spacing of bfloat16 would vanish."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


SHOWN = {
    "heldout_nll": "held-out NLL {:.4f}",
    "heldout_gap": "over the teacher's own {:+.4f}",
    "heldout_half_squared_advantage": "held-out A^2/2 {:.4f}",
    "heldout_topk_kl": "held-out top-k KL {:.4f}",
    "heldout_w_std": "w std {:.3f}",
    "heldout_token_log_w": "log W per token {:.3f}",
    "heldout_iw_reverse_kl": "weighted reverse KL {:.4f}",
    "fresh_accuracy": "fresh accuracy {:.1%}",
    "fresh_reverse_kl": "fresh reverse KL {:.4f}",
}
"""The figures of an evaluation's line, in its order."""


def _evaluated(figures: Figures) -> str:
    parts = (text.format(figures[name]) for name, text in SHOWN.items() if name in figures)
    return "  ".join(parts)


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
    first = start or -1  # the evaluation before step 0 is called -1
    boards = ctx.config.tensorboard, ctx.config.wandb
    again = start > 0 and not is_evaluated(ctx.checkpoint_dir(task.name) / "state", start)
    return MetricsWriter(ctx.run_dir, stage, task.name, first, *boards, again=again)


def answers(ctx: RunContext, needed_by: str) -> Snapshot:
    """The frozen answers of the teacher."""
    snapshot = ctx.records.outputs("answer", needed_by)["snapshot"]
    return open_store(ctx.store_root("answers")).open_snapshot(snapshot)


def prepare_answers(ctx: RunContext, loop: LoopConfig, needed_by: str, stream: str) -> Prepared:
    """Packed rows of the teacher's answers, some of which are kept out to evaluate with."""
    snapshot = answers(ctx, needed_by)
    # The control keeps out what SFT has kept out: only that has never been trained on.
    members, kept = held_out([name for name, _ in snapshot.keys], ctx.config.sft.heldout)
    rows = ctx.config.sft.row_tokens
    source = sft_source(snapshot, members, rows, loop, ctx.seed(stream), ctx.mesh)
    if not kept:
        if isinstance(loop, SFTConfig) and loop.stop_when_saturated:
            raise ConfigError(
                f"sft.stop_when_saturated needs held-out answers, and there are none: sft.heldout "
                f"is {loop.heldout}, and a tenth of the answers holds no whole prompt; "
                "raise it, take more prompts, or leave that key out"
            )
        return Prepared(source, [])
    records, tokens = snapshot.read_many(kept), ctx.config.score.batch_tokens
    probe = AnswerProbe(ctx.program("student"), records, tokens)
    return Prepared(source, [probe], saturation=Saturation.of(loop, ctx.config.sft))
