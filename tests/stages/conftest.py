"""A sampler that needs no model, for tests of what the stages do around it."""

import hashlib

import numpy as np
import pytest

from opd_jax.data.records import Record

TOGETHER = 3  # records of a commit


def record_of(request):
    """A response that follows from the request alone, as a sampled one does."""
    name = f"{request.prompt_id}/{request.sample_index}"
    ids = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint8).astype(np.int32) % 20
    return Record(
        request.prompt_id,
        request.sample_index,
        request.prompt_ids,
        ids,
        -ids.astype(np.float32),
        "stop",
    )


@pytest.fixture
def instant(monkeypatch):
    """Responses come at once, in commits of three."""

    def collect(job, store, work, on_sample, flush_seconds):
        pending = work.without(work.done(store))
        with store.writer(process_index=work.share[0]) as writer:
            for number, request in enumerate(pending, 1):
                writer.append(record_of(request))
                if number % TOGETHER == 0:
                    writer.flush()

    monkeypatch.setattr("opd_jax.stages.common.collect", collect)
