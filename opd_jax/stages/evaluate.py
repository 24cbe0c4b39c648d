"""`evaluate.NAME`: fresh samples of one checkpoint on held-out problems, graded and scored."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from opd_jax.algo.estimates import Estimate, accuracy_estimate, reverse_kl_estimate
from opd_jax.config import SamplingConfig
from opd_jax.core.distributed import is_first
from opd_jax.data.prompts import Prompt
from opd_jax.data.records import Record
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.evals.graders import grade
from opd_jax.stages.common import (
    Outcome,
    SampleTask,
    ScoreTask,
    pass_name,
    sample,
    sample_inputs,
    score,
    thought_and_answer,
)
from opd_jax.stages.context import RunContext
from opd_jax.stages.gaps import lacking_records, lacking_scores
from opd_jax.stages.records import Artefact, Json

SHOWN = 200  # samples kept as text; the report picks a few of them


def names(ctx: RunContext) -> list[str]:
    """The checkpoints to evaluate, in the order of the results table."""
    config = ctx.config
    base = ["base"] if config.evaluate.base else []
    graded = config.evaluate.grader != "none"  # else there is nothing to learn of the teacher
    teacher = ["teacher"] if config.evaluate.teacher and graded else []
    return [*base, "sft", *config.train.enabled, *teacher]


def _folder(name: str) -> str:
    return f"evaluate/{name}"


def _task(ctx: RunContext, name: str, *, greedy: bool) -> SampleTask:
    config = ctx.config.evaluate
    sampling = SamplingConfig(
        temperature=0.0 if greedy else 1.0,
        max_new_tokens=config.max_new_tokens,
        samples_per_prompt=1 if greedy else config.samples_per_prompt,
        slots=config.slots,
    )
    kind = "greedy" if greedy else "sampled"
    stage = f"evaluate.{name}"
    return SampleTask(stage, f"{_folder(name)}/{kind}", name, "eval", sampling, "evaluate")


def _scoring(ctx: RunContext, name: str) -> ScoreTask:
    teacher = ctx.identity("teacher")
    return ScoreTask(f"evaluate.{name}", teacher, 0, ctx.config.score.batch_tokens)


def inputs(ctx: RunContext, name: str) -> Json:
    """What the figures depend on."""
    if name == "sft":
        ctx.records.outputs("sft", f"evaluate.{name}")
    elif name not in ("base", "teacher"):
        ctx.records.outputs(f"train.{name}", f"evaluate.{name}")
    settings = ctx.settings(ctx.config.evaluate)
    return {
        "sampled": sample_inputs(ctx, _task(ctx, name, greedy=False)),
        "teacher": ctx.identity("teacher").fingerprint,
        "settings": {k: v for k, v in settings.items() if k not in ("base", "teacher")},
    }


def artefacts(ctx: RunContext, name: str) -> list[Artefact]:
    """What `--force` removes: samples as text, and the stores unless they lie in that folder."""
    texts, stores = ctx.run_dir / _folder(name), ctx.store_artefact(_folder(name))
    return [texts] if stores == texts else [texts, stores]


def gap(ctx: RunContext, name: str, outputs: Json) -> str:
    """Samples and scores that have gone since."""
    task = _task(ctx, name, greedy=False)
    found = lacking_records(ctx, task, None)
    if not found and "reverse_kl" in outputs:
        found = lacking_scores(ctx, task.folder, pass_name(_scoring(ctx, name)), None)
    if not found and "greedy_n" in outputs.get("eval", {}):
        found = lacking_records(ctx, _task(ctx, name, greedy=True), None)
    return found


def run(ctx: RunContext, name: str) -> Outcome:
    """Temperature 1 for accuracy and reverse KL; greedy answers beside it where asked for."""
    config = ctx.config.evaluate
    prompts = {prompt.id: prompt for prompt in ctx.prompts("eval")}
    answers = {key: prompt.answer for key, prompt in prompts.items()}
    task = _task(ctx, name, greedy=False)
    store, snapshot = sample(ctx, task, {"kind": "evaluation"})
    records = _all(snapshot)
    outputs: Json = {"model": ctx.checkpoint_identity(name).to_json()}
    if config.grader != "none":
        outputs["eval"] = _accuracy(ctx, records, answers, "")
    if name != "teacher":
        scores, _ = score(ctx, _scoring(ctx, name), store, snapshot)
        outputs["reverse_kl"] = _reverse_kl(
            records, [s.logprob for s in scores.read_many(snapshot, range(len(snapshot)))]
        )
    tokens = int(snapshot.lengths()[1].sum())
    if config.greedy and config.grader != "none":
        _, greedy = sample(ctx, _task(ctx, name, greedy=True), {"kind": "evaluation"})
        outputs["eval"] |= _accuracy(ctx, _all(greedy), answers, "greedy_")
        tokens += int(greedy.lengths()[1].sum())
    _write_samples(ctx, name, records, prompts)
    return Outcome(outputs, {"records": len(records), "tokens": tokens})


def _all(snapshot: Snapshot) -> list[Record]:
    return snapshot.read_many(range(len(snapshot)))


def _accuracy(
    ctx: RunContext, records: Sequence[Record], answers: dict[str, str | None], prefix: str
) -> Json:
    kind = ctx.config.evaluate.grader
    correct = [
        grade(kind, thought_and_answer(ctx, record), answers[record.prompt_id])
        for record in records
    ]
    found = accuracy_estimate(correct, [record.prompt_id for record in records])
    figures = _figures(found)
    return {
        f"{prefix}accuracy": figures["mean"],
        f"{prefix}stderr": figures["stderr"],
        f"{prefix}n": found.n,
    }


def _reverse_kl(records: Sequence[Record], teacher: Sequence[np.ndarray]) -> Json:
    found = reverse_kl_estimate(
        [record.student_logprob for record in records],
        teacher,
        [record.prompt_id for record in records],
    )
    return _figures(found)


def _figures(found: Estimate) -> Json:
    """NaN has no place in JSON."""
    stderr = None if found.stderr != found.stderr else found.stderr
    return {"mean": found.mean, "stderr": stderr, "n": found.n}


def _write_samples(
    ctx: RunContext, name: str, records: Sequence[Record], prompts: dict[str, Prompt]
) -> None:
    if not is_first():
        return
    kind = ctx.config.evaluate.grader
    path = ctx.run_dir / _folder(name) / "samples.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for record in records[:SHOWN]:
            response = thought_and_answer(ctx, record)
            answer = prompts[record.prompt_id].answer
            row = {
                "prompt": prompts[record.prompt_id].text(),
                "response": response,
                "answer": answer,
                "correct": None if kind == "none" else grade(kind, response, answer),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
