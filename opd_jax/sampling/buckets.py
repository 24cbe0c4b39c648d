"""Padded lengths of prompts: the shapes in which they are prefilled.

Every padded length, a bucket, is a program to compile; every token of padding is computed for
nothing. Shapes follow from all requests of a run, never from what is left of it: a run that goes on
after a kill pads a prompt as the whole run did, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SMALLEST_BUCKET = 16
MOST_BUCKETS = 12  # of those that are chosen from the lengths
MOST_EDGES = 256  # padded lengths to choose from
EDGE = 8  # they are multiples of this
FIXED_TOKENS = 32  # what a prefill costs besides its tokens, counted in tokens
SLACK = 1.02  # fewer buckets are taken if they cost no more than this times what the most would


@dataclass(frozen=True)
class Prefills:
    """The shapes of prefills, the shortest bucket first.

    Attributes:
        lengths: the padded lengths.
        rows: prompts of a prefill of each length.
    """

    lengths: tuple[int, ...]
    rows: tuple[int, ...]

    def bucket(self, length: int) -> int:
        """Number of the shortest bucket that holds a prompt of this length."""
        return int(np.searchsorted(self.lengths, length))


def bucket_of(length: int) -> int:
    """A power of two, or one and a half times one.

    So a prefill pads by less than a half, and prompts up to 4,096 tokens fall into 17 buckets.
    """
    power = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    between = power // 4 * 3
    return between if between >= max(length, SMALLEST_BUCKET) else power


def coarse_bucket_of(length: int) -> int:
    """A power of two from 64 on: more padding than `bucket_of`, and fewer programs to compile."""
    return max(64, 1 << (length - 1).bit_length())


def plan_prefills(
    prompts: Sequence[int],
    rows: Callable[[int], int],
    bucket: Callable[[int], int] | None,
    parts: int = 1,
) -> Prefills:
    """Shapes for prompts of these lengths.

    Args:
        rows: prompts of a prefill, given its padded length.
        bucket: the padded length of a prompt; `None`: those lengths, at most `MOST_BUCKETS`, that
            pad the least, counting the empty rows of the last prefill of each.
        parts: into how many parts the mesh cuts the tokens of a row.
    """
    lengths = _fitted(prompts, rows) if bucket is None else map(bucket, prompts)
    lengths = sorted({-(-length // parts) * parts for length in lengths})
    return Prefills(tuple(lengths), tuple(rows(length) for length in lengths))


def _fitted(prompts: Sequence[int], rows: Callable[[int], int]) -> list[int]:
    step = EDGE * -(-max(prompts) // (EDGE * MOST_EDGES))
    edges_e, counts_e = np.unique(-(-np.asarray(prompts) // step) * step, return_counts=True)
    below_e = np.concatenate([[0], np.cumsum(counts_e)])  # prompts that are shorter than an edge
    rows_e = np.array([rows(int(edge)) for edge in edges_e])
    # [i, j]: of one bucket for all prompts longer than edge i - 1, up to edge j
    prefills_ee = np.ceil((below_e[1:] - below_e[:-1, None]) / rows_e)
    cost_ee = prefills_ee * (rows_e * edges_e + FIXED_TOKENS)
    cost_ee[np.tril_indices(len(edges_e), -1)] = np.inf
    costs = [cost_ee[0]]  # with 1, 2, ... buckets, up to edge j
    cuts = [np.zeros(len(edges_e), int)]  # the first edge of the last bucket of those
    for _ in range(min(MOST_BUCKETS, len(edges_e)) - 1):
        before_e = np.concatenate([[np.inf], costs[-1][:-1]])
        total_ee = before_e[:, None] + cost_ee
        cuts.append(np.argmin(total_ee, axis=0))
        costs.append(np.min(total_ee, axis=0))
    totals = [cost[-1] for cost in costs]
    count = next(n for n, total in enumerate(totals, 1) if total <= SLACK * min(totals))
    lengths, end = [], len(edges_e)
    for cut in reversed(cuts[:count]):
        lengths.append(int(edges_e[end - 1]))
        end = int(cut[end - 1])
    return lengths[::-1]
