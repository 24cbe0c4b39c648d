"""`train.NAME`: one run of `train.runs`, from the student after SFT."""

from __future__ import annotations

from opd_jax.config_train import TrainRun
from opd_jax.core.lineage import Identity
from opd_jax.core.mesh import axis_size
from opd_jax.core.progress import say, stage_line
from opd_jax.data.store import Store, open_store
from opd_jax.data.store_pass import TeacherPass
from opd_jax.sampling.collect import requests_for
from opd_jax.stages.common import Outcome
from opd_jax.stages.context import RunContext, lineage_file
from opd_jax.stages.records import Artefact, Json
from opd_jax.stages.rounds import Rollouts, RoundRollouts, round_inputs, rounds_folder
from opd_jax.stages.training import Prepared, TrainTask, prepare_answers, train
from opd_jax.stages.watching import check_probe, fresh_probe, rollout_probe, tell_if_unwatched
from opd_jax.teacher.consistency import (
    check_same_model,
    check_same_tokenizer,
    check_teacher,
    mismatch_note,
    recorded,
)
from opd_jax.teacher.score import Scorer
from opd_jax.train.guard import REFRESH, REMEDY, Guard
from opd_jax.train.jobs import objective_of
from opd_jax.train.probes import Probe, held_out
from opd_jax.train.rounds import Rounds
from opd_jax.train.sources import (
    LiveTeacher,
    Packing,
    offline_source,
    online_source,
    support_size,
)


def inputs(ctx: RunContext, name: str) -> Json:
    """What a run depends on."""
    stage, run = f"train.{name}", ctx.config.train.runs[name]
    ctx.records.outputs("sft", stage)
    shared = {
        "student": ctx.checkpoint_identity("sft").fingerprint,
        "settings": ctx.settings(run),
        "numerics": ctx.numerics(),
        "seed": ctx.config.seed,
        **_fresh_inputs(ctx, run),
    }
    if run.algorithm == "lightning_opd":
        scored = ctx.records.outputs("score", stage)
        rollouts = ctx.records.outputs("rollout", stage)["snapshot"]
        rounds = {} if run.refresh is None else {"rounds": round_inputs(ctx)}
        return {**shared, "rollouts": rollouts, "scores": scored["pass"], **rounds}
    if run.algorithm == "opd":
        return {
            **shared,
            "teacher": ctx.identity("teacher").fingerprint,
            "prompts": ctx.prompts_fingerprint("opd"),
            "rollout": ctx.settings(ctx.config.rollout),
            "top_k": ctx.config.score.top_k,
        }
    answers = ctx.records.outputs("answer", stage)["snapshot"]
    return {**shared, "answers": answers, "row_tokens": ctx.config.sft.row_tokens}


def _fresh_inputs(ctx: RunContext, run: TrainRun) -> Json:
    """What the evaluations' fresh samples depend on: they decide which state is the best."""
    if run.algorithm == "sft" or not (run.guard.fresh and run.heldout):
        return {}
    found: Json = {"grader": ctx.config.evaluate.grader}
    if run.algorithm == "lightning_opd":  # `opd` depends on these in any case
        found["prompts"] = ctx.prompts_fingerprint("opd")
        found["sampling"] = ctx.settings(ctx.config.rollout)
    if run.guard.teacher:
        found["teacher"] = ctx.identity("teacher").fingerprint
    return {"fresh": found}


def artefacts(ctx: RunContext, name: str) -> list[Artefact]:
    """What `--force` removes."""
    return [ctx.checkpoint_dir(name)]


def extras(ctx: RunContext, name: str) -> list[Artefact]:
    """Rollouts of rounds, which `--force` removes as well."""
    return [ctx.store_artefact(rounds_folder(name))]


def run(ctx: RunContext, name: str) -> Outcome:
    """Check the lineage, then train."""
    config = ctx.config.train.runs[name]
    makers = {"lightning_opd": _offline, "opd": _online, "sft": _control}
    prepared, made_of = makers[config.algorithm](ctx, name, config)
    objective = objective_of(config)
    lineage = {
        "student": ctx.lineage("sft"),
        "algorithm": config.algorithm,
        "objective": objective.kind,
        **made_of,
    }
    task = TrainTask(f"train.{name}", name, objective, config, inputs(ctx, name))
    identity, counts = train(ctx, task, lambda: ctx.trained("sft")[1], prepared, lineage)
    return Outcome({"model": identity.to_json(), **made_of}, counts)


def _packing(ctx: RunContext, config: TrainRun, longest: int, support: int) -> Packing:
    ways, parts = (axis_size(ctx.mesh, axis) for axis in ("batch", "time"))
    return Packing.of(config, longest, ways, support, parts, ctx.mesh)


def _offline(ctx: RunContext, name: str, config: TrainRun) -> tuple[Prepared, Json]:
    stage = f"train.{name}"
    store = open_store(ctx.store_root("rollouts"))
    snapshot = store.open_snapshot(ctx.records.outputs("rollout", stage)["snapshot"])
    scores = store.open_pass(ctx.records.outputs("score", stage)["pass"])
    lineage = _check_lineage(ctx, stage, store, scores)
    support = 0
    if config.objective == "topk":
        support = support_size(scores.meta["top_k"], config.support, tail=config.tail)
    members, kept = held_out([key for key, _ in snapshot.keys], config.heldout)
    tell_if_unwatched(stage, config, kept)
    prompt_r, response_r = snapshot.lengths()
    probes: list[Probe] = []
    rounds = None if config.refresh is None else Rounds(config.refresh, config.steps)
    if rounds is None:
        longest = int((prompt_r + response_r).max())
        packing = _packing(ctx, config, longest, support)
        source = offline_source(snapshot, scores, members, config, packing, ctx.seed("train"))
        if kept:
            probes.append(rollout_probe(ctx, config, packing, (snapshot, scores), kept))
    else:
        drawn = RoundRollouts(ctx, name, rounds, Rollouts(snapshot, scores), support)
        source = drawn.source()
        if kept:
            probes.append(drawn.probe)
    teacher = None
    if config.guard.teacher and config.guard.fresh and kept:
        where = f"rollouts/teacher/{scores.name}/pass.json"
        scored = recorded(scores.meta, "teacher", where, "score")
        live = ctx.identity("teacher")
        check_same_model(live, scored, "the teacher of the scores", where, "score")
        teacher = Scorer(*ctx.model("teacher"), batch_tokens=ctx.config.score.batch_tokens)
    fresh = fresh_probe(ctx, config, [snapshot.keys[i][0] for i in kept], teacher)
    check_probe(stage, config, fresh)
    remedy = REFRESH if config.refresh is None else REMEDY
    guard = Guard(config.guard, limited=config.objective == "sampled", remedy=remedy)
    prepared = Prepared(source, [*probes, *([fresh] if fresh else [])], guard, rounds=rounds)
    return prepared, {**lineage, "rollouts": snapshot.hash}


def _check_lineage(ctx: RunContext, stage: str, store: Store, scores: TeacherPass) -> Json:
    """Rollouts by this student, scores by the teacher that wrote its SFT answers."""
    student, where = ctx.checkpoint_identity("sft"), "rollouts/dataset.json"
    rolled = recorded(store.meta, "generator", where, "rollout")
    check_same_model(student, rolled, "the student of the rollouts", where, "rollout")
    wrote = ctx.recorded("sft", "sft_teacher")
    passed_on = recorded(store.meta, "sft_teacher", where, "rollout")
    check_same_model(wrote, passed_on, "the teacher of the SFT answers", where, "rollout")
    where = f"rollouts/teacher/{scores.name}/pass.json"
    scored = recorded(scores.meta, "teacher", where, "score")
    check_same_tokenizer(student, scored)
    return _compare_teachers(ctx, stage, scored, where)


def _compare_teachers(ctx: RunContext, stage: str, scored: Identity, scored_in: str) -> Json:
    """The scoring teacher for the lineage, and whether it is not the one of the SFT answers."""
    wrote, allow = ctx.recorded("sft", "sft_teacher"), ctx.config.teacher.allow_mismatch
    differing = check_teacher(wrote, lineage_file("sft"), scored, scored_in, allow=allow)
    lineage: Json = {"teacher": scored.to_json(), "teacher_mismatch": bool(differing)}
    if differing:
        lineage["teachers_differ_in"] = differing
        say(stage_line(stage, f"WARNING: {mismatch_note(wrote.to_json(), lineage)}"))
    return lineage


def _online(ctx: RunContext, name: str, config: TrainRun) -> tuple[Prepared, Json]:
    live = ctx.identity("teacher")
    check_same_tokenizer(ctx.checkpoint_identity("sft"), live)
    lineage = _compare_teachers(ctx, f"train.{name}", live, "model.teacher")
    support = 0
    if config.objective == "topk":
        support = support_size(ctx.config.score.top_k, config.support, tail=config.tail)
    teacher_model, teacher_params = ctx.model("teacher")
    prompts = sorted(ctx.encoded_prompts("opd"))  # a snapshot's order
    requests = requests_for(prompts, ctx.config.rollout.samples_per_prompt)
    _, kept = held_out([request.prompt_id for request in requests], config.heldout)
    tell_if_unwatched(f"train.{name}", config, kept)
    out = {requests[i].prompt_id for i in kept}  # those that the offline run would keep out
    scorer = Scorer(teacher_model, teacher_params, support, ctx.config.score.batch_tokens)
    teacher = LiveTeacher(
        model=ctx.program("student"),
        scorer=scorer,
        prompts=[prompt for prompt in prompts if prompt[0] not in out],
        sampling=ctx.config.rollout,
        end_ids=ctx.tokenizer("student").end_ids,
        seed=ctx.seed("train"),
        text=ctx.tokenizer("student").decode if ctx.config.rollout.stop else None,
    )
    longest = max(len(ids) for _, ids in teacher.prompts) + ctx.config.rollout.max_new_tokens
    packing = _packing(ctx, config, longest, support)
    source = online_source(teacher, config, packing)
    fresh = fresh_probe(ctx, config, sorted(out), scorer)
    check_probe(f"train.{name}", config, fresh)
    return Prepared(source, [fresh] if fresh else [], Guard(config.guard)), lineage


def _control(ctx: RunContext, name: str, config: TrainRun) -> tuple[Prepared, Json]:
    """More of the answers that the student learnt from: `answer` may have been redone since."""
    teacher, where = ctx.recorded("sft", "sft_teacher"), "answers/dataset.json"
    wrote = recorded(open_store(ctx.store_root("answers")).meta, "generator", where, "answer")
    check_same_model(teacher, wrote, "the teacher of the answers", where, "answer")
    prepared = prepare_answers(ctx, config, f"train.{name}", "control")
    return prepared, {"teacher": teacher.to_json()}
