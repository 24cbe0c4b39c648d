"""From records to the arrays of a train step: shifted and packed, several records a row.

How a record becomes a row (`p` = 3, response `20 21 1`):

    tokens_t  = [10 11 12 | 20 21  1]
    input_t   = [10 11 12   20 21   ]
    target_t  = [11 12 20   21  1   ]
    mask_t    = [ 0  0  1    1  1   ]      target is a response token
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from opd_jax.data.records import Record, Scores

Batch = dict[str, np.ndarray]
T = TypeVar("T")


def row_multiple(parts: int = 1) -> int:
    """Lengths of rows are multiples of it, where a mesh cuts their tokens into `parts`."""
    return math.lcm(16, parts)


def bucket_length(longest: int, parts: int = 1) -> int:
    """The smallest multiple of `row_multiple` that holds `longest`: few shapes to compile."""
    multiple = row_multiple(parts)
    return -(-longest // multiple) * multiple


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit in the given order: which items share a row of `row_tokens`.

    An item longer than a row gets a row of its own, to be cut.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    open_from = 0
    for item, length in enumerate(lengths):
        row = next((r for r in range(open_from, len(rows)) if free[r] >= length), None)
        if row is None:
            rows.append([])
            free.append(row_tokens)
            row = len(rows) - 1
        rows[row].append(item)
        free[row] -= length
        while open_from < len(rows) and free[open_from] < 2:
            open_from += 1
    return rows


def best_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Which items share a row of `row_tokens`: the longest first, each where it fits best.

    Rows are nearly full but for the last ones. An item longer than a row gets one of its own.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> rows
    rooms: list[int] = []  # those numbers, sorted
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[item])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), max(row_tokens, length)
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(item)
        if left := room - length:
            if left not in with_room:
                bisect.insort(rooms, left)
            with_room.setdefault(left, []).append(row)
    return rows


def packed_rows(rows: Sequence[Sequence[Record]], row_tokens: int) -> Batch:
    """Several records a row: `input_bt`, `target_bt`, `positions_bt`, `segments_bt`, `mask_bt`.

    Segments count from 1 in each row, 0 is padding. What is too long for a row is cut.
    """
    b = len(rows)
    names = ("input_bt", "target_bt", "positions_bt", "segments_bt")
    batch = {name: np.zeros((b, row_tokens), np.int32) for name in names}
    batch["mask_bt"] = np.zeros((b, row_tokens), bool)
    for row, records in enumerate(rows):
        start = 0
        for segment, record in enumerate(records, 1):
            start += _place(batch, row, start, segment, record)
    return batch


def _place(batch: Batch, row: int, start: int, segment: int, record: Record) -> int:
    width = batch["input_bt"].shape[1]
    tokens = np.concatenate([record.prompt_ids, record.response_ids])
    count = min(len(tokens) - 1, width - start)
    columns = slice(start, start + count)
    batch["input_bt"][row, columns] = tokens[:count]
    batch["target_bt"][row, columns] = tokens[1 : count + 1]
    batch["positions_bt"][row, columns] = np.arange(count)
    batch["segments_bt"][row, columns] = segment
    batch["mask_bt"][row, columns] = np.arange(count) >= len(record.prompt_ids) - 1
    return count


class Scored(NamedTuple):
    """A response and what the teacher says of it."""

    record: Record
    scores: Scores


def opd_batch(
    rows: Sequence[Sequence[Scored]], row_tokens: int, support: int = 0, *, per_token: bool = False
) -> Batch:
    """Packed rows with the stored log-probs and the weights of the OPD objective.

    Adds `weight_bt`, `sampler_bt` and `teacher_bt`, and with `support` > 0 also `support_ids_bts`,
    `support_logprob_bts` and `support_rest_bt`, the teacher's probability of all other tokens. All
    records must fit their rows.

    Args:
        per_token: every response token weighs 1, not 1 / response length.
    """
    batch = packed_rows([[scored.record for scored in row] for row in rows], row_tokens)
    shape = batch["mask_bt"].shape
    for name in ("weight_bt", "sampler_bt", "teacher_bt"):
        batch[name] = np.zeros(shape, np.float32)
    if support:
        batch["support_ids_bts"] = np.zeros((*shape, support), np.int32)
        batch["support_logprob_bts"] = np.zeros((*shape, support), np.float32)
        batch["support_rest_bt"] = np.zeros(shape, np.float32)
    for number, row in enumerate(rows):
        start = 0
        for record, scores in row:
            first = start + len(record.prompt_ids) - 1
            start = first + len(record.response_ids)
            at = number, slice(first, start)
            batch["weight_bt"][at] = 1.0 if per_token else 1.0 / len(record.response_ids)
            batch["sampler_bt"][at] = record.student_logprob
            batch["teacher_bt"][at] = scores.logprob
            if support and scores.topk_ids is not None and scores.topk_logprob is not None:
                batch["support_ids_bts"][at] = scores.topk_ids[:, :support]
                batch["support_logprob_bts"][at] = scores.topk_logprob[:, :support]
                batch["support_rest_bt"][at] = _mass_outside(scores, scores.topk_logprob, support)
    return batch


def _mass_outside(scores: Scores, topk_logprob: np.ndarray, support: int) -> np.ndarray:
    """float64 [t]: the probability of what is not among the `support` likeliest tokens.

    The stored mass is exact where that of float16 log-probs, all that a pass without it has, would
    be rounding.
    """
    mass = np.exp(topk_logprob.astype(np.float64))
    if scores.topk_rest is None:
        return np.maximum(1.0 - mass[:, :support].sum(-1), 0.0)
    return scores.topk_rest + mass[:, support:].sum(-1)


def spread_rows(rows: Sequence[Sequence[T]], pieces: int, micro_rows: int) -> list[list[T]]:
    """`pieces` x `micro_rows` rows, in the order from which a step cuts its micro-batches.

    A step takes rows i, i + pieces, i + 2 pieces, ... as micro-batch i. The first micro-batches are
    filled first; rows that are left over stay empty.
    """
    arranged: list[list[T]] = [[] for _ in range(pieces * micro_rows)]
    for number, row in enumerate(rows):
        arranged[row_place(number, pieces, micro_rows)] = list(row)
    return arranged


def row_place(number: int, pieces: int, micro_rows: int) -> int:
    """Where `spread_rows` puts a row."""
    return number % micro_rows * pieces + number // micro_rows
