"""Which of a snapshot's records are scored together: few shapes, and little padding.

A function of the records' lengths, `batch_tokens` and the mesh alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from opd_jax.core.lineage import fingerprint_json
from opd_jax.data.collate import best_fit, bucket_length, row_multiple
from opd_jax.teacher.score import Scorer

LITTLE_PADDING = 0.02  # nothing else is tried once so little is left
ROW_FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)  # lengths of rows to try, in longest records
LENGTHS = (2, 3, 4, 6, 8)  # how many lengths of rows to try, where one pads
SHAPE_COST = 2  # batches that another length has to save: to compile its program takes time


@dataclass(frozen=True)
class ScoreBatch:
    """Which records to score together, row by row, at which static shape."""

    packed: tuple[tuple[int, ...], ...]
    length: int
    rows: int

    @property
    def indices(self) -> list[int]:
        """The records of all rows."""
        return [index for row in self.packed for index in row]


def score_batches(tokens_r: np.ndarray, scorer: Scorer) -> list[ScoreBatch]:
    """Cut a snapshot into batches, those of the longest rows first.

    All rows are of one length where that leaves little padding, else of up to eight; the last batch
    of a length may have fewer rows. Less than 5% of the computed tokens are padding, whatever the
    lengths, from some 300 batches on; of fewer, the last rows and batches weigh more, and another
    length costs more than it saves.

    Args:
        tokens_r: prompt + response tokens of every record.
    """
    tokens_r = np.asarray(tokens_r) - 1
    best: list[ScoreBatch] | None = None
    for lengths in _choices(tokens_r, scorer.batch_tokens, scorer.parts):
        found = _cut(tokens_r, lengths, scorer)
        if best is None or _cost(found, scorer) < _cost(best, scorer):
            best = found
        if 1 - tokens_r.sum() / _computed(best) < LITTLE_PADDING:
            break
    assert best is not None
    return best


def _choices(tokens_r: np.ndarray, batch_tokens: int, parts: int) -> Iterator[list[int]]:
    """Lengths of rows to try, shortest first: a single one, then several, longest record last."""
    longest, step = int(tokens_r.max()), row_multiple(parts)
    single = [bucket_length(int(factor * longest), parts) for factor in ROW_FACTORS]
    yield from ([length] for length in single if length <= batch_tokens or length == single[0])
    if single[0] <= batch_tokens:
        yield [max(batch_tokens // step * step, single[0])]
    edges, count = np.unique(-(-tokens_r // step) * step, return_counts=True)
    for number in LENGTHS:
        if number <= len(edges):
            yield _lengths(edges, count, number)


def _lengths(edges: np.ndarray, count: np.ndarray, number: int) -> list[int]:
    """The `number` of lengths that pad least, were every record in a row of its own.

    Args:
        edges: sorted lengths that there are.
        count: how many records have each.
    """
    below = np.concatenate([[0], np.cumsum(count)])
    # cost_j: tokens of rows that hold the first j kinds of records; one more length at a time.
    cost = below * np.concatenate([[0], edges])
    last: list[np.ndarray] = []
    for _ in range(number - 1):
        found = [cost[: j + 1] + (below[j] - below[: j + 1]) * edges[j - 1] for j in _upto(edges)]
        last.append(np.array([0, *(int(np.argmin(f)) for f in found)]))
        cost = np.array([0, *(int(f.min()) for f in found)])
    lengths, end = [int(edges[-1])], len(edges)
    for starts in reversed(last):
        end = int(starts[end])
        if end:
            lengths.append(int(edges[end - 1]))
    return sorted(set(lengths))


def _upto(edges: np.ndarray) -> range:
    return range(1, len(edges) + 1)


def _cut(tokens_r: np.ndarray, lengths: Sequence[int], scorer: Scorer) -> list[ScoreBatch]:
    """Each record in a row of the shortest length that holds it.

    Where the mesh asks for more rows of a length than there are, the next shorter ones fill up.
    """
    kind_r = np.searchsorted(lengths, tokens_r)
    packed: list[list[tuple[int, ...]]] = []
    for kind, length in enumerate(lengths):
        members = np.flatnonzero(kind_r == kind)
        rows = best_fit(tokens_r[members].tolist(), length)
        packed.append([tuple(members[row].tolist()) for row in rows])
    batches: list[ScoreBatch] = []
    for kind in reversed(range(len(lengths))):
        length, lacking = lengths[kind], -len(packed[kind]) % scorer.ways
        if kind:
            packed[kind] += packed[kind - 1][:lacking]
            del packed[kind - 1][:lacking]
        rows = scorer.rows(length)
        for start in range(0, len(packed[kind]), rows):
            some = packed[kind][start : start + rows]
            fewer = -(-len(some) // scorer.ways) * scorer.ways
            batches.append(ScoreBatch(tuple(some), length, min(rows, fewer)))
    return batches


def _computed(batches: Sequence[ScoreBatch]) -> int:
    return sum(batch.rows * batch.length for batch in batches)


def _cost(batches: Sequence[ScoreBatch], scorer: Scorer) -> int:
    """Computed tokens, and what as many programs cost."""
    lengths = {batch.length for batch in batches}
    return _computed(batches) + len(lengths) * SHAPE_COST * max(scorer.batch_tokens, *lengths)


def padding_share(batches: Sequence[ScoreBatch], tokens_r: np.ndarray) -> float:
    """Share of the computed tokens that belong to no record."""
    return 1 - float((np.asarray(tokens_r) - 1).sum()) / _computed(batches)


def shapes(batches: Sequence[ScoreBatch]) -> dict[int, int]:
    """The most rows of a batch, for each length of rows, the longest first."""
    found: dict[int, int] = {}
    for batch in batches:
        found[batch.length] = max(batch.rows, found.get(batch.length, 0))
    return found


def cut_fingerprint(batches: Sequence[ScoreBatch]) -> str:
    """Changes with any record's place, and with any batch's shape."""
    return fingerprint_json([[b.packed, b.length, b.rows] for b in batches])
