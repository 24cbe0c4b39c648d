"""Sample responses to prompts into a store, going on where an earlier run stopped."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from opd_jax.core.distributed import agreed, barrier
from opd_jax.core.preemption import told
from opd_jax.data.records import Record
from opd_jax.data.store import Store
from opd_jax.errors import Preempted
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import Plan, SamplingJob, rounds
from opd_jax.sampling.slots import Sample


def requests_for(prompts: Sequence[tuple[str, Sequence[int]]], samples: int) -> list[Request]:
    """`samples` requests for each (prompt id, token ids)."""
    return [
        Request(prompt_id, index, np.asarray(ids, np.int32))
        for prompt_id, ids in prompts
        for index in range(samples)
    ]


def share_of(requests: Sequence[Request], share: tuple[int, int]) -> list[Request]:
    """The requests of one share (index, count): of every count-th prompt in the order of their ids.

    So the samples of a prompt are in one share, which reads it once.
    """
    index, count = share
    prompts = sorted({request.prompt_id for request in requests})
    mine = set(prompts[index::count])
    return [request for request in requests if request.prompt_id in mine]


class Work(NamedTuple):
    """What to sample.

    Attributes:
        requests: of all shares.
        plan: of all `requests`.
        share: (index, count) of runs that meet in the store alone; nothing waits for the others.
    """

    requests: Sequence[Request]
    plan: Plan
    share: tuple[int, int] = (0, 1)

    def done(self, store: Store) -> np.ndarray:
        """Of each request of this share whether the store holds it: bool [n]."""
        keys = store.committed_keys()
        mine = share_of(self.requests, self.share)
        return np.array([(r.prompt_id, r.sample_index) in keys for r in mine], bool)

    def without(self, done: np.ndarray) -> list[Request]:
        """The requests of this share that are left."""
        mine = share_of(self.requests, self.share)
        return [request for request, there in zip(mine, done, strict=True) if not there]


def collect(
    job: SamplingJob,
    store: Store,
    work: Work,
    on_sample: Callable[[Sample], None],
    flush_seconds: float,
) -> None:
    """Sample what the store does not hold yet. Each process writes its part of the records.

    What is sampled after an interruption, or by one of several shares, is what would have been
    sampled without that, to the bit: slots and shapes follow from all requests, not from those that
    are left.

    Args:
        on_sample: called with each new sample, whichever process writes it.
        flush_seconds: finished records are committed this often.

    Raises:
        Preempted: SIGTERM came to one of several processes; what is finished is committed.
    """
    barrier("collect")  # what all have committed is there
    done = functools.partial(agreed, lambda: work.done(store), store.files.root)
    pending = work.without(done())
    rank, count = jax.process_index(), jax.process_count()
    owner = {(r.prompt_id, r.sample_index): i % count for i, r in enumerate(work.requests)}
    flushed = time.monotonic()
    with store.writer(process_index=work.share[0] * count + rank) as writer:
        for finished in rounds(job, pending, work.plan):
            for sample in finished:
                key = (sample.request.prompt_id, sample.request.sample_index)
                if owner[key] == rank:
                    writer.append(to_record(sample))
                on_sample(sample)
            # Also after a round in which nothing ended: the last responses may be long.
            if time.monotonic() - flushed > flush_seconds:
                writer.flush()
                flushed = time.monotonic()
            if told():
                writer.flush()
                raise Preempted("SIGTERM")
    barrier("collected")
    done()  # every process sees what all have written, and can freeze it


def until_told(finished: Iterable[list[Sample]]) -> Iterator[Sample]:
    """What every decode round finished, in memory alone.

    Raises:
        Preempted: SIGTERM came to one of several processes.
    """
    for samples in finished:
        yield from samples
        if told():
            raise Preempted("SIGTERM")


def to_record(sample: Sample) -> Record:
    """The stored form of a sample."""
    return Record(
        prompt_id=sample.request.prompt_id,
        sample_index=sample.request.sample_index,
        prompt_ids=sample.request.prompt_ids,
        response_ids=sample.token_ids,
        student_logprob=sample.logprobs,
        finish_reason=sample.finish_reason,
    )
