"""What several stages do alike: sample prompts into a store, and score a store."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from opd_jax.config import SamplingConfig
from opd_jax.core.distributed import barrier, from_first, is_first
from opd_jax.core.lineage import Identity
from opd_jax.core.progress import StageProgress, say, stage_line
from opd_jax.core.run_lock import file_lock
from opd_jax.data.records import Record
from opd_jax.data.store import Store, create_store
from opd_jax.data.store_layout import local_folder
from opd_jax.data.store_pass import TeacherPass
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.errors import DataError
from opd_jax.sampling.collect import Work, collect, requests_for
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
    extras: Callable[[], Sequence[Artefact]] = tuple
    """What it may leave behind besides: `--force` removes it, too."""
    gap: Callable[[Json], str] = lambda outputs: ""
    """What has gone, in words, of what made these outputs; empty: nothing."""


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
    requests, store = _requests(ctx, task), _create(ctx, task, meta)
    _sample_rest(ctx, task, store, requests)
    return store, freeze_all(store, requests, task.folder, task.stage)


def sample_outcome(ctx: RunContext, task: SampleTask, meta: Json, made_by: Json) -> Outcome:
    """Sample whatever is missing of this run's share, and freeze all if nothing else is missing.

    Args:
        made_by: outputs beside the snapshot.
    """
    requests, store = _requests(ctx, task), _create(ctx, task, meta)
    with _share_held(ctx, task, store):
        _sample_rest(ctx, task, store, requests)
        if ctx.share is not None and not _all_there(store, requests):
            return Outcome({}, {}, complete=False)
        snapshot = freeze_all(store, requests, task.folder, task.stage)
        if is_first():
            store.end_shares()
    tokens = int(snapshot.lengths()[1].sum())
    outputs = {"snapshot": snapshot.hash, **made_by}
    return Outcome(outputs, {"records": len(snapshot), "tokens": tokens})


@contextlib.contextmanager
def _share_held(ctx: RunContext, task: SampleTask, store: Store) -> Generator[None]:
    """Raises OPDError if this run's share is being done, or shares of another number are."""
    if ctx.share is None:
        yield
        return
    index, count = ctx.share
    beside = ctx.store_artefact(task.folder)
    folder = beside.parent if isinstance(beside, Path) else ctx.run_dir
    name = f"{task.stage}.share-{index + 1}-of-{count}"
    with file_lock(folder / f".{name}.lock", f"{name} in '{folder}'", "start another share"):
        if is_first():
            store.begin_shares(count)
        yield


def _all_there(store: Store, requests: Sequence[Request]) -> bool:
    """As process 0 sees it: other runs may be writing."""
    wanted = {(request.prompt_id, request.sample_index) for request in requests}
    return from_first("" if wanted - store.committed_keys() else "all") == "all"


def _requests(ctx: RunContext, task: SampleTask) -> list[Request]:
    return requests_for(ctx.encoded_prompts(task.split), task.sampling.samples_per_prompt)


def _sample_rest(
    ctx: RunContext, task: SampleTask, store: Store, requests: Sequence[Request]
) -> None:
    model, params = ctx.checkpoint_model(task.checkpoint)
    tokenizer = ctx.tokenizer("student")
    text = tokenizer.decode if task.sampling.stop else None
    job = SamplingJob(model, params, task.sampling, tokenizer.end_ids, ctx.seed(task.stream), text)
    unit = "sampled" if task.sampling.temperature else "greedy answers"
    work = Work(requests, plan_for(job, requests), ctx.share or (0, 1))
    if task.split != "eval" and not work.done(store).all():  # each checkpoint would say it
        say(stage_line(task.stage, str(work.plan)))
    fill_store(ctx, (task.stage, unit), job, store, work)


def fill_store(
    ctx: RunContext, shown: tuple[str, str], job: SamplingJob, store: Store, work: Work
) -> None:
    """Sample what the store does not hold yet; `shown`: the stage, and what is counted."""
    stage, unit = shown
    done = work.done(store)
    with StageProgress(stage, len(done), unit, int(done.sum())) as progress:
        lengths = _Lengths()

        def on_sample(sample: Sample) -> None:
            progress.add(1, len(sample.token_ids), lengths.note(sample))

        collect(job, store, work, on_sample, ctx.config.flush_seconds)


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


def freeze_all(store: Store, requests: Sequence[Request], folder: str, stage: str) -> Snapshot:
    """Freeze what was asked for.

    Raises:
        DataError: the store holds more or less.
    """
    snapshot = store.freeze()
    if len(snapshot) != len(requests):
        raise DataError(
            f"{folder}: holds {len(snapshot)} records, {len(requests)} were asked for; "
            f"--force {stage} samples them again"
        )
    return snapshot


class ScoreTask(NamedTuple):
    """Which teacher scores, and how."""

    stage: str
    teacher: Identity
    top_k: int
    batch_tokens: int
    entropy: bool = False
    self_test: bool = False
    unit: str = "scored"


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
        with StageProgress(task.stage, len(snapshot), task.unit, done) as progress:
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

    begun = opened() if from_first("begun" if store.has_pass(name) else "") else None
    held = 0 if begun is None else len(begun.committed_records(snapshot))
    # As process 0 sees it: a self-test takes all of them.
    if task.self_test and not from_first("complete" if held == len(snapshot) else ""):
        say(stage_line(task.stage, self_test(scorer, snapshot, batches)))
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
    """What decides the batches and the arithmetic of the scores: shares have to have it alike."""
    return {
        "teacher": task.teacher.to_json(),
        "top_k": task.top_k,
        "snapshot": snapshot.hash,
        **ctx.numerics(),
        "attention": ctx.config.model.attention,
        "batch_tokens": task.batch_tokens,
        "mesh_ways": scorer.ways,
        "row_lengths": list(shapes(batches)),
        "records_in_batches": cut_fingerprint(batches),
    }


def thought_and_answer(ctx: RunContext, record: Record) -> str:
    """The response's text; where the prompt opens the thought, with that opening before it."""
    tokenizer = ctx.tokenizer()
    response = tokenizer.decode(record.response_ids.tolist())
    prompt = tokenizer.decode(record.prompt_ids.tolist(), skip_special=False)
    return f"<think>{response}" if prompt.rstrip().endswith("<think>") else response
