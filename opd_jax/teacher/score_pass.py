"""A teacher pass over a snapshot: resumable, in whole batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice

import jax

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
    share: tuple[int, int] = (0, 1),
) -> None:
    """Score what the pass does not hold yet. Each process writes its share of every batch.

    Args:
        on_batch: called with each batch's number of records and of response tokens.
        flush_seconds: time between two commits; what a kill costs at most.
        share: (index, count) of runs that meet in the store alone, on the same snapshot, batch size
            and mesh: this one scores every count-th batch. Nothing waits for the other runs.

    Raises:
        DataError: a score is not finite, or the pass does not cover the share at the end.
    """
    barrier("score")
    prompt_r, response_r = snapshot.lengths()
    done = scores.committed_records(snapshot)
    rank, count = jax.process_index(), jax.process_count()
    batches = list(islice(score_batches(prompt_r + response_r, scorer), share[0], None, share[1]))
    flushed = time.monotonic()
    with scores.writer(snapshot, share[0] * count + rank) as writer:
        for batch in batches:
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
    wanted = [index for batch in batches for index in batch.indices]
    missing = set(wanted) - scores.committed_records(snapshot)
    if missing:
        raise DataError(
            f"the teacher pass lacks {len(missing)} of {len(wanted)} records; run the stage again"
        )
