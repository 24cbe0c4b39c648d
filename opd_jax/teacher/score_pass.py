"""A teacher pass over a snapshot: resumable, in whole batches."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np

from opd_jax.core.distributed import barrier
from opd_jax.data.store_pass import TeacherPass
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.errors import DataError
from opd_jax.teacher.score import Scorer, score_batches


def score_snapshot(
    scorer: Scorer,
    snapshot: Snapshot,
    scores: TeacherPass,
    on_batch: Callable[[int, int], None],
    flush_seconds: float,
) -> None:
    """Score what the pass does not hold yet. Each process writes its share of every batch.

    Args:
        on_batch: called with each batch's number of records and of response tokens.
        flush_seconds: time between two commits; what a kill costs at most.

    Raises:
        DataError: a score is not finite, or the pass does not cover the snapshot at the end.
    """
    barrier("score")
    prompt_r, response_r = snapshot.lengths()
    done = scores.committed_records(snapshot)
    rank, count = jax.process_index(), jax.process_count()
    flushed = time.monotonic()
    with scores.writer(snapshot, rank) as writer:
        for batch in score_batches(prompt_r + response_r, scorer):
            if done.issuperset(batch.indices):
                continue
            records = snapshot.read_many(batch.indices)
            found = scorer.score(records, batch.length, batch.rows)
            for index, score in zip(batch.indices, found, strict=True):
                if index % count == rank and index not in done:
                    writer.append(index, score)
            on_batch(len(records), int(response_r[list(batch.indices)].sum()))
            if time.monotonic() - flushed > flush_seconds:
                writer.flush()
                flushed = time.monotonic()
    barrier("scores written")
    missing = np.setdiff1d(np.arange(len(snapshot)), sorted(scores.committed_records(snapshot)))
    if missing.size:
        raise DataError(
            f"the teacher pass lacks {missing.size} of {len(snapshot)} records; run the stage again"
        )
