"""What several stages do alike: sample prompts into a store, and score a store."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from opd_jax.config import SamplingConfig
from opd_jax.core.distributed import barrier
from opd_jax.core.lineage import Identity
from opd_jax.core.progress import StageProgress, say, stage_line
from opd_jax.core.run_lock import file_lock
from opd_jax.data.store import Store, create_store
from opd_jax.data.store_layout import local_folder
from opd_jax.data.store_pass import TeacherPass
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.errors import DataError
from opd_jax.sampling.collect import collect, requests_for
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import SamplingJob, plan_for
from opd_jax.sampling.slots import Sample
from opd_jax.stages.context import RunContext, Split
from opd_jax.stages.records import Artefact, Json
from opd_jax.teacher.batches import (
    ScoreBatch,
    cut_fingerprint,
    padding_share,
    score_batches,
    shapes,
)
from opd_jax.teacher.score import Scorer
from opd_jax.teacher.score_pass import score_snapshot
from opd_jax.teacher.self_test import self_test


class Outcome(NamedTuple):
    """What a stage leaves behind: outputs for later stages, counts for people."""

    outputs: Json
    counts: Json
    complete: bool = True
    """False where other runs have shares of the stage still to do."""


@dataclass(frozen=True)
class Stage:
    """A stage as the pipeline sees it."""

    name: str
    inputs: Callable[[], Json]
    run: Callable[[], Outcome]
    artefacts: Callable[[], Sequence[Artefact]]


class SampleTask(NamedTuple):
    """Which model answers which prompts, how, and where the responses go."""

    stage: str
    folder: str
    checkpoint: str
    split: Split
    sampling: SamplingConfig
    stream: str


def sample_inputs(ctx: RunContext, task: SampleTask) -> Json:
    """What the responses depend on."""
    return {
        "model": ctx.checkpoint_identity(task.checkpoint).fingerprint,
        "prompts": ctx.prompts_fingerprint(task.split),
        "settings": ctx.settings(task.sampling),
        "numerics": ctx.numerics(),
        "seed": ctx.config.seed,
    }


def sample(ctx: RunContext, task: SampleTask, meta: Json) -> tuple[Store, Snapshot]:
    """Sample whatever the store does not hold yet, and freeze it."""
    prompts = ctx.encoded_prompts(task.split)
    requests = requests_for(prompts, task.sampling.samples_per_prompt)
    store = _create(ctx, task, meta)
    done = len(store.committed_keys())
    model, params = ctx.checkpoint_model(task.checkpoint)
    tokenizer = ctx.tokenizer("student")
    text = tokenizer.decode if task.sampling.stop else None
    job = SamplingJob(model, params, task.sampling, tokenizer.end_ids, ctx.seed(task.stream), text)
    unit = "sampled" if task.sampling.temperature else "greedy answers"
    plan = plan_for(job, requests)
    if done < len(requests) and task.split != "eval":  # each checkpoint would say it
        say(stage_line(task.stage, str(plan)))
    with StageProgress(task.stage, len(requests), unit, done) as progress:
        lengths = _Lengths()

        def on_sample(sample: Sample) -> None:
            progress.add(1, len(sample.token_ids), lengths.note(sample))

        collect(job, store, requests, plan, on_sample, ctx.config.flush_seconds)
    snapshot = store.freeze()
    _check_complete(snapshot, requests, task)
    return store, snapshot


class _Lengths:
    """What is told of the responses while they come."""

    def __init__(self) -> None:
        self._samples = self._tokens = self._cut = 0

    def note(self, sample: Sample) -> str:
        """Mean length and share truncated, with one more sample."""
        self._samples += 1
        self._tokens += len(sample.token_ids)
        self._cut += sample.finish_reason == "length"
        mean, cut = self._tokens / self._samples, self._cut / self._samples
        return f"mean {mean:,.0f} tokens  {cut:.1%} truncated"


def _create(ctx: RunContext, task: SampleTask, meta: Json) -> Store:
    identity = ctx.checkpoint_identity(task.checkpoint)
    content = {
        "generator": identity.to_json(),
        "sampling": ctx.settings(task.sampling),
        "prompts": ctx.prompts_fingerprint(task.split),
        "seed": ctx.config.seed,
        **meta,
    }
    return create_store(ctx.store_root(task.folder), content)


def _check_complete(snapshot: Snapshot, requests: Sequence[Request], task: SampleTask) -> None:
    if len(snapshot) != len(requests):
        raise DataError(
            f"{task.folder}: holds {len(snapshot)} records, {len(requests)} were asked for; "
            f"--force {task.stage} samples them again"
        )


class ScoreTask(NamedTuple):
    """Which teacher scores, and how."""

    stage: str
    teacher: Identity
    top_k: int
    batch_tokens: int
    entropy: bool = False
    self_test: bool = False


def pass_name(task: ScoreTask) -> str:
    """A teacher's pass is named after the teacher: two teachers never share one."""
    more = "-entropy" if task.entropy else ""
    return f"{task.teacher.fingerprint[:12]}-top{task.top_k}{more}"


def score(
    ctx: RunContext, task: ScoreTask, store: Store, snapshot: Snapshot
) -> tuple[TeacherPass, int]:
    """Score whatever the pass does not hold yet; returns it, and the tokens in it.

    Raises:
        ConfigError: another run is at work on the pass.
        DataError: the pass was begun otherwise, or the teacher fails its self-test.
    """
    model, params = ctx.model("teacher")
    scorer = Scorer(model, params, task.top_k, task.batch_tokens, task.entropy)
    with _held(ctx, store, pass_name(task)):
        scores = _open_pass(ctx, task, store, snapshot, scorer)
        done = len(scores.committed_records(snapshot))
        with StageProgress(task.stage, len(snapshot), "scored", done) as progress:
            on_batch: Callable[[int, int], None] = progress.add
            score_snapshot(
                scorer, snapshot, scores, on_batch, ctx.config.flush_seconds, ctx.share or (0, 1)
            )
        barrier("scored")
    return scores, int(snapshot.lengths()[1].sum())


@contextlib.contextmanager
def _held(ctx: RunContext, store: Store, name: str) -> Generator[None]:
    """A pass for this run alone, or a share of it; object stores have no such locks."""
    root = local_folder(store.files)
    if root is None:
        yield
        return
    what, otherwise = f"teacher pass '{name}' in {root}", "use another store"
    with file_lock(root / ".locks" / name, what, otherwise, shared=ctx.share is not None):
        if ctx.share is None:
            yield
            return
        index, count = ctx.share
        path = root / ".locks" / f"{name}.{index + 1}-of-{count}"
        with file_lock(path, f"share {index + 1}/{count} of {what}", "do another share"):
            yield


def _open_pass(
    ctx: RunContext, task: ScoreTask, store: Store, snapshot: Snapshot, scorer: Scorer
) -> TeacherPass:
    """The pass, made once the teacher has shown to be sound: a bad one leaves nothing behind."""
    prompt_r, response_r = snapshot.lengths()
    tokens_r = prompt_r + response_r
    batches = score_batches(tokens_r, scorer)
    name, meta = pass_name(task), _pass_meta(ctx, task, snapshot, scorer, batches)
    repair = f"set it as it was when the pass began, or begin anew with --force {task.stage}"

    def opened() -> TeacherPass:
        scores = store.create_pass(name, meta, repair)
        if ctx.share is not None:
            store.settle_shares(name, ctx.share[1])
        return scores

    begun = opened() if store.has_pass(name) else None
    complete = begun is not None and len(begun.committed_records(snapshot)) == len(snapshot)
    if task.self_test and not complete:
        say(stage_line(task.stage, self_test(scorer, snapshot, batches[0])))
        cut = ", ".join(f"{rows} x {length:,}" for length, rows in shapes(batches).items())
        share = f"{padding_share(batches, tokens_r):.1%} padding"
        say(stage_line(task.stage, f"{len(batches):,} batches of {cut} tokens, {share}"))
    barrier("teacher tested")  # no process finds a pass that another has just made
    return begun or opened()


def _pass_meta(
    ctx: RunContext,
    task: ScoreTask,
    snapshot: Snapshot,
    scorer: Scorer,
    batches: Sequence[ScoreBatch],
) -> Json:
    """All that the bits of the scores depend on; also what shares have to have alike."""
    return {
        "teacher": task.teacher.to_json(),
        "top_k": task.top_k,
        "snapshot": snapshot.hash,
        **ctx.numerics(),
        "batch_tokens": task.batch_tokens,
        "mesh_ways": scorer.ways,
        "row_lengths": list(shapes(batches)),
        "records_in_batches": cut_fingerprint(batches),
    }
