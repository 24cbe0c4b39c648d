"""A teacher pass over a snapshot: resumable, in whole batches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from opd_jax.core.distributed import agreed, barrier
from opd_jax.core.mesh import rows_here
from opd_jax.core.preemption import told
from opd_jax.data.records import Record, Scores
from opd_jax.data.store_pass import TeacherPass
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.errors import DataError, Preempted
from opd_jax.teacher.batches import ScoreBatch, score_batches
from opd_jax.teacher.score import Scorer

AHEAD = 2  # batches on the device while the host reads the next one and writes the last


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
        Preempted: SIGTERM came to one of several processes; what is scored is committed.
    """
    barrier("score")
    prompt_r, response_r = snapshot.lengths()
    rank, count = jax.process_index(), jax.process_count()
    flushed = time.monotonic()
    batches = score_batches(prompt_r + response_r, scorer)[share[0] :: share[1]]
    wanted = np.array([index for batch in batches for index in batch.indices], np.int64)

    def there() -> np.ndarray:
        return np.isin(wanted, list(scores.committed_records(snapshot)))

    done = set(wanted[agreed(there, scores.path)].tolist())
    open_batches = [batch for batch in batches if not done.issuperset(batch.indices)]
    with scores.writer(snapshot, share[0] * count + rank) as writer:
        for batch, found in _scored(scorer, snapshot, open_batches):
            for index, score in zip(batch.indices, found, strict=True):
                if index % count == rank and index not in done:
                    writer.append(index, score)
            on_batch(len(found), int(response_r[batch.indices].sum()))
            if time.monotonic() - flushed > flush_seconds:
                writer.flush()
                flushed = time.monotonic()
            if told():
                writer.flush()
                raise Preempted("SIGTERM")
    barrier("scores written")
    missing = len(wanted) - int(agreed(there, scores.path).sum())
    if missing:
        raise DataError(
            f"the teacher pass lacks {missing} of {len(wanted)} records; run the stage again"
        )


def _scored(
    scorer: Scorer, snapshot: Snapshot, batches: list[ScoreBatch]
) -> Iterator[tuple[ScoreBatch, list[Scores]]]:
    """The batches in their order, some of them begun before the first is awaited."""
    begun: deque[tuple[ScoreBatch, list[list[Record]], Any]] = deque()

    def oldest() -> tuple[ScoreBatch, list[Scores]]:
        batch, packed, out = begun.popleft()
        return batch, scorer.scores_of(packed, out)

    for batch in batches:
        packed = read_packed(snapshot, batch, scorer.model.mesh)
        begun.append((batch, packed, scorer.start(packed, batch.length, batch.rows)))
        if len(begun) > AHEAD:
            yield oldest()
    while begun:
        yield oldest()


def read_packed(
    snapshot: Snapshot, batch: ScoreBatch, mesh: Mesh | None = None
) -> list[list[Record]]:
    """The records of a batch, row by row.

    Args:
        mesh: those of rows that other processes hold are blank; `None`: all are read.
    """
    here = rows_here(mesh, batch.rows)
    near = [index for row, mine in zip(batch.packed, here, strict=False) if mine for index in row]
    read = dict(zip(near, snapshot.read_many(near) if near else [], strict=True))
    return [[read[i] if i in read else snapshot.blank(i) for i in row] for row in batch.packed]
