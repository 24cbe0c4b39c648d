"""`sft`: the base student learns from the teacher's answers."""

from __future__ import annotations

from pathlib import Path

from opd_jax.data.store import open_store
from opd_jax.model.transformer import Params
from opd_jax.stages.common import Outcome
from opd_jax.stages.context import RunContext
from opd_jax.stages.records import Json
from opd_jax.stages.training import TrainTask, prepare_answers, train
from opd_jax.teacher.consistency import check_same_model, check_same_tokenizer, recorded
from opd_jax.train.jobs import objective_of

NAME = "sft"


def inputs(ctx: RunContext) -> Json:
    """What the student depends on."""
    return {
        "answers": ctx.records.outputs("answer", NAME)["snapshot"],
        "student": ctx.identity("student").fingerprint,
        "settings": ctx.settings(ctx.config.sft),
        "numerics": ctx.numerics(),
        "seed": ctx.config.seed,
    }


def artefacts(ctx: RunContext) -> list[Path]:
    """What `--force` removes."""
    return [ctx.checkpoint_dir(NAME)]


def run(ctx: RunContext) -> Outcome:
    """Train, and record which teacher wrote the answers."""
    answer, where = ctx.records.outputs("answer", NAME), "answers/dataset.json"
    teacher = recorded(open_store(ctx.store_root("answers")).meta, "generator", where, "answer")
    asked = recorded(answer, "teacher", "stages/answer.json", "answer")
    check_same_model(asked, teacher, "the teacher of the answers", where, "answer")
    check_same_tokenizer(ctx.identity("student"), teacher)
    lineage = {
        "base": ctx.identity("student").to_json(),
        "sft_teacher": teacher.to_json(),
        "answers": answer["snapshot"],
    }
    task = TrainTask(NAME, NAME, objective_of(ctx.config.sft), ctx.config.sft, inputs(ctx))
    prepared = prepare_answers(ctx, task.loop, NAME, NAME)

    def load() -> Params:
        params = ctx.model("student")[1]
        ctx.release_models()  # what is trained is a copy
        return params

    identity, counts = train(ctx, task, load, prepared, lineage)
    return Outcome({"model": identity.to_json()}, counts)
