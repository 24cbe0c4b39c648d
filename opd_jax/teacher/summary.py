"""What a finished teacher pass says, for people: its distribution, its most surprising tokens."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opd_jax.data.records import Record
from opd_jax.data.store_pass import TeacherPass
from opd_jax.data.store_snapshot import Snapshot

SURPRISING = 20
BEFORE, AFTER = 16, 6  # tokens of context
RECORDS_AT_ONCE = 256
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5)
BIN, BINS = 0.01, 6000  # nats; beyond 60 nats a token is as good as impossible

Decode = Callable[[Sequence[int]], str]


def summarize(snapshot: Snapshot, scores: TeacherPass, decode: Decode) -> dict[str, Any]:
    """Figures over all response tokens, JSON values; memory does not grow with the records.

    Keys: `tokens`; `teacher`, `student`: mean log-probs (nats a token) of the sampled tokens under
    the teacher and under the model that drew them; `difference`: teacher - student, minus the
    reverse KL a token; `apart`: share of tokens where the two are more than 1 nat apart;
    `quantiles` of the teacher's; `surprising`: the tokens that the teacher finds least likely.
    """
    counts = np.zeros(BINS + 1, np.int64)
    sums = np.zeros(3)
    lowest: list[tuple[float, int, int]] = []  # (minus the log-prob, record, place), a heap
    for start in range(0, len(snapshot), RECORDS_AT_ONCE):
        indices = range(start, min(start + RECORDS_AT_ONCE, len(snapshot)))
        records = snapshot.read_many(indices)
        for index, record, score in zip(
            indices, records, scores.read_many(snapshot, indices, topk=False), strict=True
        ):
            teacher, student = score.logprob.astype(np.float64), record.student_logprob
            sums += teacher.sum(), student.sum(), (np.abs(teacher - student) > 1).sum()
            counts += np.bincount(np.minimum(-teacher / BIN, BINS).astype(int), minlength=BINS + 1)
            for at in np.argsort(teacher)[:SURPRISING].tolist():
                item = (-float(teacher[at]), index, at)
                if len(lowest) < SURPRISING:
                    heapq.heappush(lowest, item)
                elif item > lowest[0]:
                    heapq.heapreplace(lowest, item)
    tokens = int(counts.sum())
    teacher, student, apart = (float(x) / max(tokens, 1) for x in sums)
    below = np.cumsum(counts[::-1])[::-1]  # tokens at most so likely
    return {
        "tokens": tokens,
        "teacher": teacher,
        "student": student,
        "difference": teacher - student,
        "apart": apart,
        "quantiles": {str(q): 0.0 - BIN * _highest(below, q * tokens) for q in QUANTILES},
        "surprising": [_context(snapshot, item, decode) for item in sorted(lowest, reverse=True)],
    }


def _highest(below: np.ndarray, tokens: float) -> int:
    """The last bin from which on there are still so many tokens."""
    return int(np.flatnonzero(below >= max(tokens, 1))[-1])


def _context(snapshot: Snapshot, item: tuple[float, int, int], decode: Decode) -> dict[str, Any]:
    surprise, index, at = item
    record: Record = snapshot.read_many([index])[0]
    before = np.concatenate([record.prompt_ids, record.response_ids[:at]])[-BEFORE:]
    return {
        "prompt_id": record.prompt_id,
        "sample_index": record.sample_index,
        "token": at,
        "teacher": -surprise,
        "student": float(record.student_logprob[at]),
        "before": decode(before.tolist()),
        "text": decode(record.response_ids[at : at + 1].tolist()),
        "after": decode(record.response_ids[at + 1 : at + 1 + AFTER].tolist()),
    }


def lines(summary: dict[str, Any], shown: int = 3) -> list[str]:
    """The figures in a line, and the most surprising tokens in one each."""
    low = summary["quantiles"]["0.01"]
    found = [
        f"log-probs a token: teacher {summary['teacher']:.3f}, the student that drew them "
        f"{summary['student']:.3f}, difference {summary['difference']:+.3f}; "
        f"{summary['apart']:.1%} more than 1 nat apart, "
        f"1% of tokens below {low:.1f}"
    ]
    for token in summary["surprising"][:shown]:
        found.append(
            f"surprising: {token['teacher']:.1f} (student {token['student']:.1f}) "
            f"{marked(token)} in {token['prompt_id']}/{token['sample_index']}"
        )
    return found


def marked(token: dict[str, Any]) -> str:
    """The token in its context, on one line."""
    text = f"{token['before']}⟦{token['text']}⟧{token['after']}"
    return " ".join(repr(text)[1:-1].split(" "))
