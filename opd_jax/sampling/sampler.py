"""Sample responses with continuous batching: finished slots are refilled while others go on.

    prefill   [p1 p2]            prompts, one program per bucket of prompt lengths
    start     s1 s2 s3           their samples, into free slots
    decode    s1 s2 s3 s4 ...    a loop on the device until enough slots are done to refill them
    harvest   s2 s4              finished samples leave, their slots and pages are free

A sample depends on the parameters, its prompt, the seed, the prompt's id, the sample index and its
sampling settings, and (but for ties within rounding) on nothing else.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from opd_jax.config import SamplingConfig
from opd_jax.core.mesh import axis_size, platform_of, put_batch
from opd_jax.errors import ConfigError, DataError
from opd_jax.model.cache import Pages
from opd_jax.model.decode import split_layers
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.sampling import engine
from opd_jax.sampling.buckets import Prefills, plan_prefills
from opd_jax.sampling.keys import root_key
from opd_jax.sampling.plan import CachePlan, check_memory, plan_cache
from opd_jax.sampling.queue import PromptBatch, Request, RequestQueue, by_prompt
from opd_jax.sampling.slots import Sample, SlotTable
from opd_jax.sampling.stops import Text
from opd_jax.sampling.transforms import uses_of

ROUND_STEPS = 64  # a finished sample waits at most this many steps before the host sees it
PREFILL_TOKENS = {True: 512, False: 2048}  # of a prefill, on CPUs and elsewhere
MOST_PREFILL_TOKENS = 16384  # unless one row is longer
OnTokens = Callable[[Request, np.ndarray], None]


@dataclass(frozen=True)
class SamplingJob:
    """A model and how to sample from it.

    Attributes:
        sampling: of the requests that bring no settings of their own; `slots` is taken from here.
        end_ids: a response ends with the first of these tokens.
        seed: equal (seed, prompt id, sample index) give equal samples.
        text: of token ids; needed for stop strings, and gives samples their text.
        round_steps: decode steps between two looks of the host.
        split: `params` as `split_layers` gives them, where several runs share them; `None`: made
            for this run.
        bucket: the padded length of a prompt; `None`: those that fit all prompts of a run best.
    """

    model: LanguageModel
    params: Params
    sampling: SamplingConfig
    end_ids: tuple[int, ...]
    seed: int
    text: Text | None = None
    round_steps: int = ROUND_STEPS
    split: Params | None = None
    bucket: Callable[[int], int] | None = None


@dataclass(frozen=True)
class Plan:
    """Static shapes of a run. Two runs with one plan give a request the same bits."""

    program: engine.Program
    cache: CachePlan
    rows: int  # samples of a start
    longest: int  # limit of a response
    prefills: Prefills

    @property
    def programs(self) -> int:
        """The most programs that are compiled: two for each bucket, those of weights and slots."""
        return 2 * len(self.prefills.lengths) + 3

    def __str__(self) -> str:
        return f"{self.cache}; at most {self.programs} programs"


def plan_for(
    job: SamplingJob,
    requests: Sequence[Request],
    longest_prompt: int = 0,
    *,
    together: bool = True,
) -> Plan:
    """The plan for some requests.

    Args:
        longest_prompt: slots get room as if the longest prompts had at least so many tokens.
        together: the samples of a prompt are drawn in one run, and can share its keys and values.

    Raises:
        DataError: an empty prompt, one too long for the model, a token outside the vocabulary.
        ConfigError: an end token outside the vocabulary, stop strings without a tokenizer, or too
            little memory.
    """
    mesh = job.model.mesh
    settings = [job.sampling if r.sampling is None else r.sampling for r in requests]
    _check(job, requests, settings)
    limits = [s.max_new_tokens for s in settings]
    prompts = [len(r.prompt_ids) for r in requests]
    longest = max(prompts)
    prompts = [max(n, longest_prompt) if n == longest else n for n in prompts]
    leasts = [s.min_new_tokens for s in settings]
    samples = [len(group) for group in by_prompt(requests)] if together else (1,)
    coarse = job.bucket is not None
    slots = job.sampling.slots
    cache = plan_cache(job.model, slots, prompts, leasts, limits, samples, coarse=coarse)
    pages = cache.pages
    rows = max(pages.rows // 16 // pages.shards, 1) * pages.shards  # few slots wait for a refill
    ends = tuple(sorted(job.end_ids))
    program = engine.Program(job.model, pages, uses_of(settings), ends, mesh, job.round_steps)
    prefills = _plan_prefills(job, requests, pages, rows)
    waiting = max(map(math.prod, zip(prefills.lengths, prefills.rows, strict=True)))
    check_memory(cache, job.model, waiting, copies=job.split is None)
    return Plan(program, cache, rows, max(limits), prefills)


def _plan_prefills(
    job: SamplingJob, requests: Sequence[Request], pages: Pages, least: int
) -> Prefills:
    """Some prompts wait, read, for a free slot: larger products are faster."""
    distinct = [len(group[0].prompt_ids) for group in by_prompt(requests)]
    enough = PREFILL_TOKENS[platform_of(job.model.mesh) == "cpu"]
    most = max(min(pages.rows // 4, 1 << (len(distinct) - 1).bit_length()), least)

    def rows(length: int) -> int:
        some = min(max(enough // length, least), most, MOST_PREFILL_TOKENS // length)
        return max(some // pages.shards, 1) * pages.shards

    parts = 1 if job.model.mesh is None else axis_size(job.model.mesh, "time")
    return plan_prefills(distinct, rows, job.bucket, parts)


def generate(
    job: SamplingJob,
    requests: Sequence[Request],
    plan: Plan | None = None,
    on_tokens: OnTokens | None = None,
) -> Iterator[Sample]:
    """Sample one response per request; they come as they finish, in no particular order.

    Every process of a job calls this with the same arguments and sees every sample. Programs are
    compiled once per model, kinds of transforms, slots and bucket, whatever the parameters.

    Args:
        plan: of more requests than these, of which the others were sampled earlier.
        on_tokens: called with all tokens that an unfinished request has, after every round.

    Raises:
        DataError, ConfigError: as `plan_for` does, before anything runs.
        ModelError: non-finite logits; samples that were finished by then have been yielded.
    """
    return itertools.chain.from_iterable(rounds(job, requests, plan, on_tokens))


def rounds(
    job: SamplingJob,
    requests: Sequence[Request],
    plan: Plan | None = None,
    on_tokens: OnTokens | None = None,
) -> Iterator[list[Sample]]:
    """`generate` with a list, often an empty one, of what finished in every decode round."""
    if not requests:
        return iter(())
    return _run(job, plan or plan_for(job, requests), requests, on_tokens)


def _run(
    job: SamplingJob, plan: Plan, requests: Sequence[Request], on_tokens: OnTokens | None
) -> Iterator[list[Sample]]:
    program, mesh = plan.program, plan.program.mesh
    table = SlotTable(program, job.sampling, plan.longest, job.text)
    params = split_layers(program.model, job.params) if job.split is None else job.split
    state = engine.empty_state(program)
    feeder = _Feeder(job, plan, requests, params)
    while feeder.left or table.busy:
        state, firsts = feeder.fill(table, state)
        told = (table.pages(), feeder.wake(table), table.halted())
        state, seen = engine.decode_round(program, params, state, *_put_tree(mesh, told))
        firsts, seen = jax.device_get((firsts, seen))
        for slots, first in firsts:
            table.record_first(slots, first)
        table.record_round(seen)
        if on_tokens is not None:
            _tell(table, program.slots, on_tokens)
        yield table.harvest(seen)
        table.refuse_broken(seen)


def _tell(table: SlotTable, slots: int, on_tokens: OnTokens) -> None:
    for slot in range(slots):
        request, tokens = table.said(slot)
        if request is not None:
            on_tokens(request, tokens)


class _Feeder:
    """Prefills prompts and starts their samples in free slots."""

    def __init__(
        self, job: SamplingJob, plan: Plan, requests: Sequence[Request], split: Params
    ) -> None:
        self._job, self._plan, self._split = job, plan, split
        self._queue = RequestQueue(requests, plan.prefills)
        self._prompts: engine.Prefilled | None = None
        self._waiting: list[tuple[int, Request]] = []  # (row of the prefilled prompts, request)
        self._root = _put(plan.program.mesh, root_key(job.seed))

    @property
    def left(self) -> int:
        """Requests without a slot."""
        return self._queue.left + len(self._waiting)

    def wake(self, table: SlotTable) -> np.int32:
        """How many slots may stand idle before a decode round ends."""
        idle = len(table.free) + table.stuck
        if self.left:
            needed = min(self._plan.rows, self.left) - len(table.free)
            return np.int32(idle + max(needed, 1))
        return np.int32(idle + 1 if table.stuck else self._plan.program.slots)

    def fill(
        self, table: SlotTable, state: engine.State
    ) -> tuple[engine.State, list[tuple[list[int], engine.First]]]:
        """Start samples until too few slots are free; returns their slots and first tokens."""
        program, mesh = self._plan.program, self._plan.program.mesh
        firsts: list[tuple[list[int], engine.First]] = []
        while self.left and len(table.free) >= min(self._plan.rows, self.left):
            if not self._waiting:
                self._prefill(self._queue.take())
            chosen = self._choose(table)
            if not chosen or self._prompts is None:
                break
            new = _put_tree(mesh, table.start(chosen, self._plan.rows))
            state, first = engine.start(program, self._split, state, self._prompts, new, self._root)
            firsts.append(([slot for _, slot, _ in chosen], first))
        return state, firsts

    def _prefill(self, batch: PromptBatch) -> None:
        mesh = self._plan.program.mesh
        tokens, lengths = _put(mesh, batch.tokens), _put(mesh, batch.lengths)
        self._prompts = engine.prefill(self._plan.program, self._job.params, tokens, lengths)
        self._waiting = list(batch.samples)

    def _choose(self, table: SlotTable) -> list[tuple[int, int, Request]]:
        """(row of its prompt, slot, request) of the next samples of the prefilled prompts."""
        chosen: list[tuple[int, int, Request]] = []
        while self._waiting and len(chosen) < self._plan.rows:
            row, request = self._waiting[0]
            slot = table.seat(request)
            if slot is None:
                break
            chosen.append((row, slot, request))
            self._waiting.pop(0)
        return chosen


def _put(mesh: Mesh | None, host: Any) -> Any:
    # Not asarray: it compiles a program for every shape.
    return jax.device_put(host) if mesh is None else put_batch(mesh, host, sharded=False)


def _put_tree(mesh: Mesh | None, tree: Any) -> Any:
    return jax.tree.map(functools.partial(_put, mesh), tree)


def _check(
    job: SamplingJob, requests: Sequence[Request], settings: Sequence[SamplingConfig]
) -> None:
    for end_id in job.end_ids:
        if not 0 <= end_id < job.model.vocabulary:
            raise ConfigError(
                f"sampling: end token {end_id} is outside the vocabulary of "
                f"{job.model.vocabulary}; "
                "use the tokenizer that belongs to the model"
            )
    if job.text is None and (stops := next((s.stop for s in settings if s.stop), None)):
        raise ConfigError(
            f"sampling: stop={list(stops)} needs a tokenizer, and none is given; give one, or use "
            "end tokens"
        )
    for request, sampling in zip(requests, settings, strict=True):
        _check_prompt(job.model, request, sampling.max_new_tokens)


def _check_prompt(model: LanguageModel, request: Request, new: int) -> None:
    ids, name = np.asarray(request.prompt_ids), f"sampling: prompt '{request.prompt_id}'"
    if ids.size == 0:
        raise DataError(f"{name} is empty; give it at least one token")
    if ids.size + new > model.arch.max_position:
        raise DataError(
            f"{name}: {ids.size} prompt tokens + max_new_tokens={new} exceed the model's "
            f"{model.arch.max_position} positions; shorten the prompt or lower max_new_tokens"
        )
    if ids.min() < 0 or ids.max() >= model.vocabulary:
        bad = int(ids[(ids < 0) | (ids >= model.vocabulary)][0])
        raise DataError(
            f"{name}: token {bad} is outside the vocabulary of {model.vocabulary}; "
            "use the tokenizer that belongs to the model"
        )
