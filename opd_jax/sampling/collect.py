"""Sample responses to prompts into a store, going on where an earlier run stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from opd_jax.config import SamplingConfig
from opd_jax.core.distributed import barrier
from opd_jax.data.records import Record
from opd_jax.data.store import Store
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.sampling.sampler import Request, Sample, generate


@dataclass(frozen=True)
class SamplingJob:
    """A model, how to sample from it, and how often to commit."""

    model: LanguageModel
    params: Params
    sampling: SamplingConfig
    end_ids: tuple[int, ...]
    seed: int
    flush_seconds: float


def requests_for(prompts: Sequence[tuple[str, Sequence[int]]], samples: int) -> list[Request]:
    """`samples` requests for each (prompt id, token ids)."""
    return [
        Request(prompt_id, index, np.asarray(ids, np.int32))
        for prompt_id, ids in prompts
        for index in range(samples)
    ]


def collect(
    job: SamplingJob,
    store: Store,
    requests: Sequence[Request],
    on_record: Callable[[int], None],
) -> None:
    """Sample what the store does not hold yet. Each process writes its own share of the records.

    Args:
        on_record: called with each new record's number of tokens.
    """
    barrier("collect")  # every process sees the same commits, so that all sample the same rest
    done = store.committed_keys()
    pending = [r for r in requests if (r.prompt_id, r.sample_index) not in done]
    rank, count = jax.process_index(), jax.process_count()
    owner = {(r.prompt_id, r.sample_index): i % count for i, r in enumerate(requests)}
    flushed = time.monotonic()
    with store.writer(process_index=rank) as writer:
        for sample in generate(
            job.model, job.params, pending, job.sampling, job.end_ids, job.seed, job.model.mesh
        ):
            key = (sample.request.prompt_id, sample.request.sample_index)
            if owner[key] == rank:
                writer.append(to_record(sample))
            on_record(len(sample.token_ids))
            if time.monotonic() - flushed > job.flush_seconds:
                writer.flush()
                flushed = time.monotonic()
    barrier("collected")


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
