"""`score`: the teacher's log-probs of every rollout token, once."""

from __future__ import annotations

from opd_jax.data.store import open_store
from opd_jax.stages.common import Outcome, ScoreTask, pass_name, score
from opd_jax.stages.context import RunContext
from opd_jax.stages.records import Artefact, Json

FOLDER = "rollouts"


def _task(ctx: RunContext) -> ScoreTask:
    config = ctx.config.score
    return ScoreTask("score", ctx.identity("teacher"), config.top_k, config.batch_tokens)


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
    return [ctx.store_artefact(f"{FOLDER}/teacher/{pass_name(_task(ctx))}")]


def run(ctx: RunContext) -> Outcome:
    """Score the frozen rollouts."""
    ctx.check_models()
    task = _task(ctx)
    store = open_store(ctx.store_root(FOLDER))
    snapshot = store.open_snapshot(ctx.records.outputs("rollout", "score")["snapshot"])
    scores, tokens = score(ctx, task, store, snapshot)
    complete = len(scores.committed_records(snapshot)) == len(snapshot)
    outputs = {"pass": pass_name(task), "teacher": task.teacher.to_json(), "top_k": task.top_k}
    return Outcome(outputs, {"records": len(snapshot), "tokens": tokens}, complete)
