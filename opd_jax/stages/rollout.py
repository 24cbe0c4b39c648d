"""`rollout`: the student after SFT answers the OPD prompts."""

from __future__ import annotations

from opd_jax.stages.common import Outcome, SampleTask, sample_inputs, sample_outcome
from opd_jax.stages.context import RunContext
from opd_jax.stages.gaps import lacking_records
from opd_jax.stages.records import Artefact, Json

FOLDER = "rollouts"


def _task(ctx: RunContext) -> SampleTask:
    return SampleTask("rollout", FOLDER, "sft", "opd", ctx.config.rollout, "rollout")


def inputs(ctx: RunContext) -> Json:
    """What the rollouts depend on."""
    ctx.records.outputs("sft", "rollout")
    return sample_inputs(ctx, _task(ctx))


def artefacts(ctx: RunContext) -> list[Artefact]:
    """What `--force` removes."""
    return [ctx.store_artefact(FOLDER)]


def gap(ctx: RunContext, outputs: Json) -> str:
    """Records that have gone since."""
    return lacking_records(ctx, _task(ctx), outputs["snapshot"])


def run(ctx: RunContext) -> Outcome:
    """Sample, freeze, and pass on who wrote the student's SFT answers."""
    meta = {"kind": "rollouts", "sft_teacher": ctx.recorded("sft", "sft_teacher").to_json()}
    made_by = {"student": ctx.checkpoint_identity("sft").to_json()}
    return sample_outcome(ctx, _task(ctx), meta, made_by)
