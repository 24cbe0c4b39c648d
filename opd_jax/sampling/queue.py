"""Which prompts are prefilled together: requests in buckets of padded prompt length."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from opd_jax.config import SamplingConfig

SMALLEST_BUCKET = 16
PREFILL_TOKENS = 16384  # at most this many padded tokens in one prefill, unless one row is longer


@dataclass(frozen=True, eq=False)
class Request:
    """One response wanted: the `sample_index`-th for this prompt.

    Attributes:
        prompt_ids: int32 [p], token ids.
        sampling: what differs for this request: transforms, lengths and stop strings are taken
            from here. `None`: those of the whole run.
    """

    prompt_id: str
    sample_index: int
    prompt_ids: np.ndarray
    sampling: SamplingConfig | None = None


def bucket_of(length: int) -> int:
    """The padded length of a prompt: a power of two, or one and a half times one.

    So a prefill pads by less than a half, and prompts up to 4,096 tokens fall into 17 buckets.
    """
    power = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    between = power // 4 * 3
    return between if between >= max(length, SMALLEST_BUCKET) else power


def coarse_bucket_of(length: int) -> int:
    """A power of two from 64 on: more padding than `bucket_of`, and fewer programs to compile."""
    return max(64, 1 << (length - 1).bit_length())


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts to prefill together, and the requests that start from each of them."""

    tokens: np.ndarray  # int32 [rows, bucket], padded on the right
    lengths: np.ndarray  # int32 [rows]; rows beyond the prompts hold one token
    samples: tuple[tuple[int, Request], ...]  # (row, request)


class RequestQueue:
    """Requests that wait to be prefilled, the longest bucket first; equal prompts are read once.

    Args:
        rows: prompts of one prefill.
        shards: ways the rows are cut over the mesh; every prefill has a multiple of it as rows.
        bucket: the padded length of a prompt.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        rows: int,
        shards: int,
        bucket: Callable[[int], int] = bucket_of,
    ) -> None:
        self._rows, self._shards = rows, shards
        self.left = len(requests)
        prompts: dict[tuple[str, bytes], list[Request]] = {}
        for request in requests:
            ids = np.asarray(request.prompt_ids, np.int32)
            prompts.setdefault((request.prompt_id, ids.tobytes()), []).append(request)
        by_bucket: dict[int, deque[list[Request]]] = {}
        for group in prompts.values():
            by_bucket.setdefault(bucket(len(group[0].prompt_ids)), deque()).append(group)
        self._buckets = sorted(by_bucket.items(), reverse=True)

    @property
    def buckets(self) -> list[int]:
        """The padded lengths that occur among the prompts that wait."""
        return [bucket for bucket, _ in self._buckets]

    def take(self) -> PromptBatch:
        """The next prompts."""
        bucket, waiting = self._buckets[0]
        fit = max(min(self._rows, PREFILL_TOKENS // bucket) // self._shards, 1) * self._shards
        taken = [waiting.popleft() for _ in range(min(fit, len(waiting)))]
        if not waiting:
            self._buckets.pop(0)
        self.left -= sum(map(len, taken))
        tokens, lengths = np.zeros((fit, bucket), np.int32), np.ones(fit, np.int32)
        for row, group in enumerate(taken):
            lengths[row] = len(group[0].prompt_ids)
            tokens[row, : lengths[row]] = group[0].prompt_ids
        samples = tuple((row, request) for row, group in enumerate(taken) for request in group)
        return PromptBatch(tokens, lengths, samples)
