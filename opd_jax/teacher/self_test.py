"""Before a teacher pass: does the teacher give sound log-probs, the same ones twice, in any shape?

A pass is computed once and trusted for ever, so a few records are scored three times first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opd_jax.data.records import Record, Scores
from opd_jax.data.store_snapshot import Snapshot
from opd_jax.errors import DataError
from opd_jax.teacher.batches import ScoreBatch
from opd_jax.teacher.score import Scorer
from opd_jax.teacher.score_pass import read_packed


class Bound(NamedTuple):
    """Nats, over the tokens."""

    mean: float
    largest: float


SAME_SHAPE = {"float32": Bound(1e-4, 0.01), "bfloat16": Bound(0.01, 0.3)}
"""What a second time may change: sums on a GPU are not always in one order."""
OTHER_SHAPE = {"float32": Bound(1e-3, 0.1), "bfloat16": Bound(0.1, 3.0)}
"""What another batch shape may change by rounding."""
CONSTANT = 1e-6
UNIFORM = 1e-3
MORE_COLUMNS = 128  # another shape, where a batch has no more rows than the mesh asks for


def self_test(scorer: Scorer, snapshot: Snapshot, batches: Sequence[ScoreBatch]) -> str:
    """Score some of the snapshot's records; returns what was seen, in a line.

    Args:
        batches: of the snapshot's. Of the first with the longest rows, and of the first with the
            shortest, the records of one row are scored twice by themselves, and once in the whole
            batch, where they stand in another order, in another shape.

    Raises:
        DataError: log-probs that are not finite or above 0, all the same, -ln(vocabulary), or
            different in another batch.
    """
    first = {batch.length: batch for batch in reversed(batches)}
    ends = {min(first), max(first)}  # every length more is a program more to compile
    tokens, again, other = zip(
        *(_look(scorer, snapshot, first[length]) for length in ends), strict=True
    )
    same = "to the bit" if max(again) == 0 else f"within {max(again):.1e}"
    return (
        f"self-test of the teacher: {sum(tokens):,} tokens, the same twice {same}, "
        f"in another batch within {max(other):.1e}"
    )


def _look(scorer: Scorer, snapshot: Snapshot, batch: ScoreBatch) -> tuple[int, float, float]:
    """Tokens, and the largest differences a second time and in another batch."""
    packed = read_packed(snapshot, batch)
    few = packed[:1]
    first, second = (scorer.score(few, batch.length, scorer.ways) for _ in range(2))
    turned = [list(reversed(row)) for row in packed]
    more = MORE_COLUMNS * scorer.parts if batch.rows == scorer.ways else 0
    whole = scorer.score(turned, batch.length + more, batch.rows)[: len(few[0])][::-1]
    _check_values(scorer, _joined(first))
    again = _difference(few[0], first, second)
    other = _difference(few[0], first, whole)
    dtype = scorer.model.compute_dtype
    for difference, allowed, what in (
        (again, SAME_SHAPE[dtype], "a second time"),
        (other, OTHER_SHAPE[dtype], "in another batch"),
    ):
        if difference.mean > allowed.mean or difference.largest > allowed.largest:
            raise DataError(
                f"teacher: self-test: scored {what}, log-probs differ by {difference.mean:.2g} on "
                f"average and {difference.largest:.2g} at most (allowed {allowed.mean:g} and "
                f"{allowed.largest:g}), {difference.worst}; the results of this device cannot be "
                "trusted: try model.attention=xla or model.compute_dtype=float32"
            )
    return len(_joined(first)), again.largest, other.largest


class _Difference:
    """How far two scorings of the same records are apart, in nats."""

    def __init__(self, gaps: np.ndarray, worst: str) -> None:
        self.mean, self.largest, self.worst = float(gaps.mean()), float(gaps.max()), worst


def _difference(records: list[Record], a: list[Scores], b: list[Scores]) -> _Difference:
    gaps = [np.abs(x.logprob - y.logprob) for x, y in zip(a, b, strict=True)]
    number = int(np.argmax([gap.max() for gap in gaps]))
    record, at = records[number], int(np.argmax(gaps[number]))
    worst = (
        f"the most at response token {at} of record '{record.prompt_id}'/{record.sample_index} "
        f"({a[number].logprob[at]:.3f} and {b[number].logprob[at]:.3f})"
    )
    return _Difference(np.concatenate(gaps), worst)


def _joined(scores: list[Scores]) -> np.ndarray:
    return np.concatenate([s.logprob for s in scores])


def _check_values(scorer: Scorer, logprob: np.ndarray) -> None:
    uniform = -math.log(scorer.model.vocabulary)
    if np.abs(logprob - uniform).max() < UNIFORM:
        raise DataError(
            f"teacher: self-test: every token has log-prob {uniform:.3f}, minus the logarithm of "
            "the vocabulary: the weights say nothing; check the teacher's folder"
        )
    if len(logprob) > 1 and np.ptp(logprob) < CONSTANT:
        raise DataError(
            f"teacher: self-test: every token has log-prob {logprob[0]:.3f}; the weights are "
            "damaged: check the teacher's folder"
        )
