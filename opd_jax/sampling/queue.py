"""Which prompts are prefilled together: requests in buckets of padded prompt length."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMALLEST_BUCKET = 16
PREFILL_TOKENS = 16384  # at most this many padded tokens in one prefill, unless one row is longer


@dataclass(frozen=True, eq=False)
class Request:
    """One response wanted: the `sample_index`-th for this prompt."""

    prompt_id: str
    sample_index: int
    prompt_ids: np.ndarray


def bucket_of(length: int) -> int:
    """The padded length of a prompt: the next power of two, so that few programs are compiled."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


class RequestQueue:
    """Requests that wait for a slot, the longest bucket first.

    Args:
        slots: slots of the engine.
        shards: ways the slots are cut over the mesh; every prefill has a multiple of it as rows.
    """

    def __init__(self, requests: Sequence[Request], slots: int, shards: int) -> None:
        self._slots, self._shards = slots, shards
        self._left = len(requests)
        by_bucket: dict[int, deque[Request]] = {}
        for request in requests:
            by_bucket.setdefault(bucket_of(len(request.prompt_ids)), deque()).append(request)
        self._buckets = sorted(by_bucket.items(), reverse=True)

    def __len__(self) -> int:
        return self._left

    def rows(self) -> int:
        """Rows of the next prefill: an eighth of the slots, so that few slots wait for a refill."""
        wanted = min(self._slots // 8, PREFILL_TOKENS // self._buckets[0][0])
        return max(wanted // self._shards, 1) * self._shards

    def take(self) -> tuple[list[Request], np.ndarray]:
        """The next requests, and their right-padded prompts, int32 [rows, bucket]."""
        rows = self.rows()
        bucket, waiting = self._buckets[0]
        taken = [waiting.popleft() for _ in range(min(rows, len(waiting)))]
        if not waiting:
            self._buckets.pop(0)
        self._left -= len(taken)
        tokens = np.zeros((rows, bucket), np.int32)
        for row, request in enumerate(taken):
            tokens[row, : len(request.prompt_ids)] = request.prompt_ids
        return taken, tokens
