"""Where a run's batches come from: packed answers, stored rollouts, or a live teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jax.sharding import Mesh

from opd_jax.config import SamplingConfig
from opd_jax.config_train import LoopConfig, TrainRun
from opd_jax.core.mesh import rows_here
from opd_jax.core.rng import stable_hash
from opd_jax.data.collate import (
    Batch,
    Scored,
    best_fit,
    bucket_length,
    opd_batch,
    pack,
    packed_rows,
    row_place,
    spread_rows,
)
from opd_jax.data.loader import batches, sequence_steps, step_order, token_steps
from opd_jax.data.records import Record, Scores
from opd_jax.data.store_pass import TeacherPass
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.errors import ConfigError
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.sampling.collect import requests_for, to_record, until_told
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import Plan, SamplingJob, plan_for, rounds
from opd_jax.sampling.stops import Text
from opd_jax.teacher.score import Scorer
from opd_jax.train.batch_source import NextBatch, Source

S = TypeVar("S")


def sft_source(
    snapshot: Snapshot,
    members: Sequence[int],
    row_tokens: int,
    loop: LoopConfig,
    seed: int,
    mesh: Mesh | None = None,
) -> Source:
    """Packed rows of answers.

    Args:
        members: which records of the snapshot to train on.
        mesh: a process reads the records of its devices' rows alone.
    """
    batch_rows = loop.batch_size
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

    steps = sequence_steps(len(rows), batch_rows, seed, loop.steps)

    def rows_of(step: int) -> list[list[int]]:
        return [order[rows[i]].tolist() for i in steps[step]]

    def read(step: int) -> Batch:
        chosen = rows_of(step)
        here = rows_here(mesh, len(chosen))
        near = [r for row, mine in zip(chosen, here, strict=True) if mine for r in row]
        records = dict(zip(near, snapshot.read_many(near) if near else [], strict=True))

        def record(r: int) -> Record:
            return records[r] if r in records else snapshot.blank(r)

        return packed_rows([[record(r) for r in row] for row in chosen], row_tokens)

    def names(step: int) -> list[str]:
        return [name_of(snapshot.keys[r]) for row in rows_of(step) for r in row]

    start = _stored(read, len(steps))
    return Source(start, batch_rows // (loop.micro_batch_size or batch_rows), names=names)


def name_of(key: tuple[str, int]) -> str:
    """A record in a message, by its prompt's id and its sample index."""
    return f"'{key[0]}'/{key[1]}"


def _stored(read: Callable[[int], Batch], steps: int) -> Callable[[int], NextBatch]:
    """Batches that are read from a store: they do not depend on the student."""

    def start(step: int) -> NextBatch:
        stream = batches(read, range(steps), step)
        return lambda _step, _current: next(stream)

    return start


@dataclass(frozen=True)
class Packing:
    """How scored responses are laid into the rows of a step.

    Attributes:
        row_tokens: at least the longest record's tokens - 1.
        micro_rows: rows of a micro-batch; `None`: one micro-batch, with as many as are needed.
        ways: into how many parts the mesh cuts rows.
        support: how many of the teacher's stored top-k to take; 0: none.
        mesh: a process reads the records of its devices' rows alone; `None`: all.
    """

    row_tokens: int
    micro_rows: int | None = None
    ways: int = 1
    support: int = 0
    per_token: bool = False
    mesh: Mesh | None = None

    @staticmethod
    def of(
        run: TrainRun,
        longest: int,
        ways: int,
        support: int,
        parts: int = 1,
        mesh: Mesh | None = None,
    ) -> Packing:
        """The packing of a run whose longest record has `longest` tokens.

        Args:
            parts: into how many parts the mesh cuts the tokens of a row.

        Raises:
            ConfigError: its rows are too short.
        """
        row_tokens = run.row_tokens or bucket_length(longest - 1, parts)
        if row_tokens < longest - 1:
            raise ConfigError(
                f"row_tokens={row_tokens} is too short for the longest response, {longest} tokens "
                "with its prompt; raise it, or leave it out"
            )
        per_token = run.average == "token"
        return Packing(row_tokens, run.micro_batch_size, ways, support, per_token, mesh)

    def shape(self, rows: int) -> tuple[int, int]:
        """Micro-batches and rows of each for a step of at most `rows` packed rows."""
        if self.micro_rows is None:
            return 1, -(-rows // self.ways) * self.ways
        return -(-rows // self.micro_rows), self.micro_rows

    def shape_within(self, rows: int, batch_size: int) -> tuple[int, int]:
        """As `shape`, for steps that come to have other numbers of rows: at most four programs."""
        few = -(-batch_size // 4)  # rows are rounded up to that
        return self.shape(batch_size if self.micro_rows else -(-rows // few) * few)

    def near(self, rows: Sequence[Sequence[int]], shape: tuple[int, int]) -> list[int]:
        """Of `rows`, as `batch` takes them, the places whose rows are of this process's devices."""
        here = rows_here(self.mesh, shape[0] * shape[1])
        near = (row for number, row in enumerate(rows) if here[row_place(number, *shape)])
        return [place for row in near for place in row]

    def batch(
        self, rows: Sequence[Sequence[int]], scored: Sequence[Scored], shape: tuple[int, int]
    ) -> Batch:
        """A step's arrays, `rows` being the places in `scored` of what each row holds."""
        filled = [[scored[place] for place in row] for row in rows]
        arranged = spread_rows(filled, *shape)
        return opd_batch(arranged, self.row_tokens, self.support, per_token=self.per_token)


def offline_source(
    snapshot: Snapshot,
    scores: TeacherPass,
    members: Sequence[int],
    run: TrainRun,
    packing: Packing,
    seed: int,
) -> Source:
    """Stored rollouts with their stored scores: the offline method's only input.

    Args:
        members: which records of the snapshot to train on.
    """
    chosen = np.asarray(members)
    prompt_r, response_r = snapshot.lengths()
    tokens_r = (prompt_r + response_r)[chosen]
    if run.batch_tokens is None:
        steps = sequence_steps(len(chosen), run.batch_size, seed, run.steps)
    else:
        steps = token_steps(tokens_r.tolist(), run.batch_tokens, seed, run.steps)
    taken = [chosen[step].tolist() for step in steps]
    return rollout_source(snapshot, scores, taken, packing)


def rollout_source(
    snapshot: Snapshot,
    scores: TeacherPass,
    steps: Sequence[Sequence[int]],
    packing: Packing,
    round_of: int | None = None,
) -> Source:
    """Stored rollouts, the records of each step being given.

    Args:
        round_of: `batch_size`, where other rollouts follow these: shapes are to be theirs, too.
    """
    prompt_r, response_r = snapshot.lengths()
    input_r = prompt_r + response_r - 1
    packed = [best_fit(input_r[step].tolist(), packing.row_tokens) for step in steps]
    rows = max(len(step) for step in packed)
    shape = packing.shape(rows) if round_of is None else packing.shape_within(rows, round_of)

    def read(step: int) -> Batch:
        indices = steps[step]
        near = packing.near(packed[step], shape)
        mine = [indices[place] for place in near]
        known: dict[int, Scored] = {}
        if mine:
            read = map(Scored, snapshot.read_many(mine), scores.read_many(snapshot, mine))
            known = dict(zip(near, read, strict=True))

        def scored(place: int) -> Scored:
            if place in known:
                return known[place]
            record = snapshot.blank(indices[place])
            return Scored(record, Scores(record.student_logprob))

        return packing.batch(packed[step], [*map(scored, range(len(indices)))], shape)

    def names(step: int) -> list[str]:
        return [name_of(snapshot.keys[r]) for r in steps[step]]

    return Source(_stored(read, len(steps)), shape[0], names=names)


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


def online_source(live: LiveTeacher, run: TrainRun, packing: Packing) -> Source:
    """Fresh samples of the current student, scored by the teacher as they come.

    Prompts come in the order in which `offline_source` would give their samples; where the samples
    come from is the only difference between the two. With `steps_per_batch` K, the samples of K
    steps are drawn at once: their order is the same.
    """
    samples_each = live.sampling.samples_per_prompt
    order = step_order(len(live.prompts) * samples_each, run.batch_size, live.seed)
    size = run.batch_size * run.steps_per_batch
    slots = min(live.sampling.slots, 1 << (size - 1).bit_length())
    sampling = live.sampling.model_copy(update={"slots": slots})
    everything = requests_for(live.prompts, samples_each)
    plan: Plan | None = None
    drawn: dict[int, list[Scored]] = {}

    def requests_of(step: int) -> list[Request]:
        requests: list[Request] = []
        for i in range(step * run.batch_size, (step + 1) * run.batch_size):
            place = order[i]
            assert place is not None  # no filter leaves one out
            name, ids = live.prompts[place // samples_each]
            index = step * samples_each + place % samples_each  # new at every step
            requests.append(Request(name, index, np.asarray(ids, np.int32)))
        return requests

    def names(step: int) -> list[str]:
        return [name_of((r.prompt_id, r.sample_index)) for r in requests_of(step)]

    def draw(step: int, params: Params) -> dict[int, list[Scored]]:
        steps = range(step, step + run.steps_per_batch)
        requests = [request for each in steps for request in requests_of(each)]
        job = SamplingJob(live.model, params, sampling, live.end_ids, live.seed, live.text)
        nonlocal plan  # one for all steps, whichever prompts they have: nothing compiles again
        plan = plan or plan_for(job, everything, together=False)
        samples = until_told(rounds(job, requests, plan))
        done = {(s.request.prompt_id, s.request.sample_index): to_record(s) for s in samples}
        records = [done[request.prompt_id, request.sample_index] for request in requests]
        scores = live.scorer.score_all(records, packing.row_tokens)
        scored = [*map(Scored, records, scores)]
        cut = range(0, size, run.batch_size)
        return {step + i: scored[at : at + run.batch_size] for i, at in enumerate(cut)}

    def next_batch(step: int, current: Callable[[], Params]) -> Batch:
        if step not in drawn:
            drawn.clear()
            drawn.update(draw(step, current()))
        scored = drawn.pop(step)
        tokens = [len(s.record.prompt_ids) + len(s.record.response_ids) - 1 for s in scored]
        rows = best_fit(tokens, packing.row_tokens)
        return packing.batch(rows, scored, packing.shape_within(len(rows), run.batch_size))

    pieces = packing.shape(run.batch_size)[0]
    return Source(lambda _start: next_batch, pieces, run.steps_per_batch, names, draws=True)


def support_size(stored: int, wanted: int | None, *, tail: bool = False) -> int:
    """How much of a stored top-k to use.

    Raises:
        ConfigError: less is stored than wanted, or nothing is; or it is one token without a tail.
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
    if (wanted or stored) == 1 and not tail:
        raise ConfigError(
            "objective 'topk' with one token and no tail has no loss: divided by its mass it is "
            "certain for both; set tail=true, or take a larger support"
        )
    return wanted or stored
