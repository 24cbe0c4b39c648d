"""What a training run is watched with: held-out records, fresh samples, and where it is told."""

from __future__ import annotations

from collections.abc import Sequence

from opd_jax.config_train import TrainRun
from opd_jax.core.progress import say, stage_line
from opd_jax.data.collate import Scored
from opd_jax.data.records import Record
from opd_jax.data.store_pass import TeacherPass
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.errors import ConfigError
from opd_jax.evals.graders import grade
from opd_jax.stages.common import thought_and_answer
from opd_jax.stages.context import EncodedPrompt, RunContext
from opd_jax.teacher.score import Scorer
from opd_jax.train.jobs import objective_of
from opd_jax.train.objective_probe import TopKProbe
from opd_jax.train.probes import FreshProbe, HeldOutProbe, Probe, fresh_sampling
from opd_jax.train.sources import Packing


def tell_if_unwatched(stage: str, run: TrainRun, kept: Sequence[int]) -> None:
    """Say that a run has nothing to be evaluated on.

    Raises:
        ConfigError: it asks for something that the evaluations decide.
    """
    if kept:
        return
    why = f"heldout is {run.heldout}, and a tenth of the records holds no whole prompt"
    for key in _left_to_evaluations(run):
        raise ConfigError(
            f"{stage}: {key} needs held-out records, and there are none: {why}; raise it, take "
            "more prompts, or leave that key out"
        )
    if run.heldout:
        say(stage_line(stage, f"WARNING: nothing is held out, so nothing is evaluated: {why}"))


def _left_to_evaluations(run: TrainRun) -> list[str]:
    """What a run asks for that its evaluations decide."""
    asks = {
        "guard.action=stop": run.guard.action == "stop",
        "guard.final=best": run.guard.final == "best",
        "refresh.on_drift": run.refresh is not None and run.refresh.on_drift,
    }
    return [key for key, asked in asks.items() if asked]


def check_judged(ctx: RunContext, key: str, run: TrainRun) -> None:
    """Raises ConfigError if evaluations of a run at this key could not decide what is left to them.

    Stored rollouts tell of drift, which is a danger to the sampled-token objective alone; all else
    takes fresh samples that are graded or scored.
    """
    scored = run.algorithm == "opd" or run.guard.teacher
    graded = ctx.config.evaluate.grader != "none" and any(
        prompt.answer is not None for prompt in ctx.prompts("opd")
    )
    _refuse_unjudged(key, run, scored, graded)


def check_probe(key: str, run: TrainRun, fresh: FreshProbe | None) -> None:
    """`check_judged` of the held-out prompts that there are."""
    scored = fresh is not None and fresh.teacher is not None
    graded = fresh is not None and fresh.grade is not None
    _refuse_unjudged(key, run, scored, graded)


def _refuse_unjudged(key: str, run: TrainRun, scored: bool, graded: bool) -> None:
    drifts = run.algorithm == "lightning_opd" and run.objective == "sampled"
    asked = _left_to_evaluations(run)
    if drifts or not asked or (run.guard.fresh and (scored or graded)):
        return
    needs = "guard.fresh" if scored or graded else "guard.teacher=true, or prompts with answers and"
    raise ConfigError(
        f"{key}: {asked[0]} needs something that judges, for {run.algorithm} with objective "
        f"'{run.objective}' fresh samples that are scored or graded; set {needs}"
        f"{'' if scored or graded else ' evaluate.grader'}, or leave that key out"
    )


def rollout_probe(
    ctx: RunContext,
    run: TrainRun,
    packing: Packing,
    rollouts: tuple[Snapshot, TeacherPass],
    kept: Sequence[int],
) -> Probe:
    """The figures of held-out rollouts, the top-k objective among them if the run has it."""
    (snapshot, scores), student = rollouts, ctx.program("student")
    scored = [*map(Scored, snapshot.read_many(kept), scores.read_many(snapshot, kept))]
    probe = HeldOutProbe(student, scored, run.tau, ctx.config.score.batch_tokens)
    if run.objective != "topk":
        return probe
    topk = TopKProbe(student, objective_of(run), scored, packing)
    return lambda params: probe(params) | topk(params)


def fresh_probe(
    ctx: RunContext, run: TrainRun, kept: Sequence[str], teacher: Scorer | None
) -> FreshProbe | None:
    """Fresh answers to held-out prompts; `None` if the run asks for none, or there are no prompts.

    Args:
        kept: ids of the held-out prompts.
        teacher: scores them, where one is loaded.
    """
    names = set(sorted(set(kept))[: run.guard.fresh])
    prompts: list[EncodedPrompt] = [p for p in ctx.encoded_prompts("opd") if p[0] in names]
    if not prompts:
        return None
    sampling = fresh_sampling(ctx.config.rollout, len(prompts))
    answers = {prompt.id: prompt.answer for prompt in ctx.prompts("opd") if prompt.id in names}
    kind = ctx.config.evaluate.grader
    # Of a single one no error is known, without which nothing is judged by it.
    gradable = kind != "none" and sum(answer is not None for answer in answers.values()) > 1

    def right(record: Record) -> bool | None:
        answer = answers[record.prompt_id]
        return None if answer is None else grade(kind, thought_and_answer(ctx, record), answer)

    tokenizer = ctx.tokenizer("student")
    return FreshProbe(
        model=ctx.program("student"),
        prompts=prompts,
        sampling=sampling,
        end_ids=tokenizer.end_ids,
        seed=ctx.seed("probe"),
        text=tokenizer.decode if sampling.stop else None,
        grade=right if gradable else None,
        teacher=teacher,
    )
