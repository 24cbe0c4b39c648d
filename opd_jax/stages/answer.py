"""`answer`: the teacher answers the SFT prompts."""

from __future__ import annotations

from opd_jax.stages.common import Outcome, SampleTask, sample_inputs, sample_outcome
from opd_jax.stages.context import RunContext
from opd_jax.stages.gaps import lacking_records
from opd_jax.stages.records import Artefact, Json

FOLDER = "answers"


def _task(ctx: RunContext) -> SampleTask:
    return SampleTask("answer", FOLDER, "teacher", "sft", ctx.config.answer, "answer")


def inputs(ctx: RunContext) -> Json:
    """What the answers depend on."""
    return sample_inputs(ctx, _task(ctx))


def artefacts(ctx: RunContext) -> list[Artefact]:
    """What `--force` removes."""
    return [ctx.store_artefact(FOLDER)]


def gap(ctx: RunContext, outputs: Json) -> str:
    """Records that have gone since."""
    return lacking_records(ctx, _task(ctx), outputs["snapshot"])


def run(ctx: RunContext) -> Outcome:
    """Sample, freeze."""
    made_by = {"teacher": ctx.identity("teacher").to_json()}
    return sample_outcome(ctx, _task(ctx), {"kind": "answers"}, made_by)
