"""`score`: the teacher's log-probs of every rollout token, once."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from opd_jax.core.progress import say, stage_line
from opd_jax.data.store import open_store
from opd_jax.data.store_pass import TeacherPass
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.stages.common import Outcome, ScoreTask, pass_name, score
from opd_jax.stages.context import RunContext
from opd_jax.stages.gaps import lacking_scores
from opd_jax.stages.records import Artefact, Json, write_json
from opd_jax.teacher.summary import lines, summarize

FOLDER = "rollouts"
SUMMARY = "scores.json"


def _task(ctx: RunContext) -> ScoreTask:
    config = ctx.config.score
    teacher = ctx.identity("teacher")
    return ScoreTask(
        "score", teacher, config.top_k, config.batch_tokens, config.entropy, self_test=True
    )


def inputs(ctx: RunContext) -> Json:
    """What the scores depend on."""
    return {
        "rollouts": ctx.records.outputs("rollout", "score")["snapshot"],
        "teacher": ctx.identity("teacher").fingerprint,
        "settings": ctx.settings(ctx.config.score),
        "numerics": ctx.numerics(),
    }


def artefacts(ctx: RunContext) -> list[Artefact]:
    """What `--force` removes: this teacher's pass, no other's."""
    return [
        ctx.store_artefact(f"{FOLDER}/teacher/{pass_name(_task(ctx))}"),
        ctx.run_dir / SUMMARY,
    ]


def gap(ctx: RunContext, outputs: Json) -> str:
    """Scores that have gone since, or that were of records which were sampled again."""
    snapshot = ctx.records.outputs("rollout", "score")["snapshot"]
    return lacking_scores(ctx, FOLDER, outputs["pass"], snapshot)


def run(ctx: RunContext) -> Outcome:
    """Score the frozen rollouts."""
    task = _task(ctx)
    store = open_store(ctx.store_root(FOLDER))
    snapshot = store.open_snapshot(ctx.records.outputs("rollout", "score")["snapshot"])
    scores, tokens = score(ctx, task, store, snapshot)
    complete = len(scores.committed_records(snapshot)) == len(snapshot)
    if complete:
        _summarize(ctx, snapshot, scores)
    outputs = {"pass": pass_name(task), "teacher": task.teacher.to_json(), "top_k": task.top_k}
    return Outcome(outputs, {"records": len(snapshot), "tokens": tokens}, complete)


def _summarize(ctx: RunContext, snapshot: Snapshot, scores: TeacherPass) -> None:
    """Show what the scores say, and keep all of it in the run folder."""
    if jax.process_index() > 0:
        return

    def decode(ids: Sequence[int]) -> str:
        return ctx.tokenizer("student").decode(ids, skip_special=False)

    summary = summarize(snapshot, scores, decode)
    write_json(ctx.run_dir / SUMMARY, summary)
    for line in lines(summary):
        say(stage_line("score", line))
