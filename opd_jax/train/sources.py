"""Where a run's batches come from: packed answers, stored rollouts, or a live teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from opd_jax.config import LoopConfig, SamplingConfig
from opd_jax.core.rng import stable_hash
from opd_jax.data.collate import Batch, bucket_length, opd_batch, pack, packed_rows
from opd_jax.data.loader import batches, step_order
from opd_jax.data.store_pass import TeacherPass
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.errors import ConfigError
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.sampling.collect import requests_for, to_record
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import Plan, SamplingJob, generate, plan_for
from opd_jax.sampling.stops import Text
from opd_jax.teacher.score import Scorer
from opd_jax.train.loop import NextBatch, Source


def sft_source(
    snapshot: Snapshot, members: Sequence[int], row_tokens: int, batch_rows: int, seed: int
) -> Source:
    """Packed rows of answers.

    Args:
        members: which records of the snapshot to train on.
        batch_rows: rows per step.
    """
    prompt_r, response_r = snapshot.lengths()
    longest = int((prompt_r + response_r).max()) - 1
    if longest > row_tokens:
        raise ConfigError(
            f"sft.row_tokens={row_tokens} would cut the longest answer ({longest} tokens with its "
            "prompt) and its end token; raise it, or lower answer.max_new_tokens"
        )
    order = np.random.default_rng([seed, stable_hash("pack")]).permutation(np.asarray(members))
    rows = pack((prompt_r + response_r - 1)[order].tolist(), row_tokens)
    if len(rows) < batch_rows:
        raise ConfigError(
            f"batch_size={batch_rows} rows of sft.row_tokens={row_tokens} tokens is more than the "
            f"{len(rows)} rows that {len(order)} answers fill; lower one of the two"
        )

    def read(indices: Sequence[int]) -> Batch:
        chosen = [order[rows[i]].tolist() for i in indices]
        records = iter(snapshot.read_many([r for row in chosen for r in row]))
        return packed_rows([[next(records) for _ in row] for row in chosen], row_tokens)

    def start(step: int) -> NextBatch:
        stream = batches(read, len(rows), batch_rows, seed, step)
        return lambda _step, _current: next(stream)

    return start


def offline_source(
    snapshot: Snapshot, scores: TeacherPass, support: int, batch_size: int, seed: int
) -> Source:
    """Stored rollouts with their stored scores: the offline method's only input.

    Args:
        support: how many of the stored top-k to read; 0: none.
    """
    prompt_r, response_r = snapshot.lengths()
    length = bucket_length(int((prompt_r + response_r).max()) - 1)

    def read(indices: Sequence[int]) -> Batch:
        records = snapshot.read_many(indices)
        return opd_batch(records, scores.read_many(snapshot, indices), length, support)

    def start(step: int) -> NextBatch:
        stream = batches(read, len(prompt_r), batch_size, seed, step)
        return lambda _step, _current: next(stream)

    return start


@dataclass(frozen=True)
class LiveTeacher:
    """Everything the online baseline needs besides the student's weights."""

    model: LanguageModel
    scorer: Scorer
    prompts: Sequence[tuple[str, Sequence[int]]]
    sampling: SamplingConfig
    end_ids: tuple[int, ...]
    seed: int
    text: Text | None


def online_source(live: LiveTeacher, support: int, loop: LoopConfig) -> Source:
    """Fresh samples of the current student, scored by the teacher as they come.

    Prompts come in the order in which `offline_source` would give their samples; where the samples
    come from is the only difference between the two.
    """
    samples_each = live.sampling.samples_per_prompt
    order = step_order(len(live.prompts) * samples_each, loop.batch_size, live.seed)
    longest = max(len(ids) for _, ids in live.prompts) + live.sampling.max_new_tokens
    length = bucket_length(longest - 1)
    slots = min(live.sampling.slots, 1 << (loop.batch_size - 1).bit_length())
    sampling = live.sampling.model_copy(update={"slots": slots})
    everything = requests_for(live.prompts, samples_each)
    plan: Plan | None = None

    def next_batch(step: int, current: Callable[[], Params]) -> Batch:
        first = step * loop.batch_size
        picked = [order[first + i] for i in range(loop.batch_size)]
        requests = []
        for place in (place for place in picked if place is not None):
            name, ids = live.prompts[place // samples_each]
            index = step * samples_each + place % samples_each  # new at every step
            requests.append(Request(name, index, np.asarray(ids, np.int32)))
        job = SamplingJob(live.model, current(), sampling, live.end_ids, live.seed, live.text)
        nonlocal plan  # one for all steps, whichever prompts they have: nothing compiles again
        plan = plan or plan_for(job, everything)
        samples = generate(job, requests, plan)
        done = {(s.request.prompt_id, s.request.sample_index): to_record(s) for s in samples}
        records = [done[request.prompt_id, request.sample_index] for request in requests]
        return opd_batch(records, live.scorer.score_all(records, length), length, support)

    return lambda _start: next_batch


def support_size(stored: int, wanted: int | None) -> int:
    """How much of a stored top-k to use.

    Raises:
        ConfigError: less is stored than wanted, or nothing is.
    """
    if not stored:
        raise ConfigError(
            "objective 'topk' needs the teacher's top-k, and the pass has none; set score.top_k "
            "and redo the stage with --force score"
        )
    if wanted is not None and wanted > stored:
        raise ConfigError(
            f"support={wanted} is more than the {stored} stored; lower it, or raise score.top_k "
            "and redo the stage with --force score"
        )
    return wanted or stored
