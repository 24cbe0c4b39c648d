"""Which prompts are prefilled together: requests in buckets of padded prompt length."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd_jax.config import SamplingConfig
from opd_jax.sampling.buckets import Prefills


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


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts to prefill together, and the requests that start from each of them."""

    tokens: np.ndarray  # int32 [rows, bucket], padded on the right
    lengths: np.ndarray  # int32 [rows]; rows beyond the prompts hold one token
    samples: tuple[tuple[int, Request], ...]  # (row, request)


class RequestQueue:
    """Requests that wait to be prefilled; equal prompts are read once.

    The next prompts come from the bucket of which the largest share still waits: there are pages of
    the cache for a mixture of lengths, not for the longest all at once.
    """

    def __init__(self, requests: Sequence[Request], prefills: Prefills) -> None:
        self._prefills = prefills
        self.left = len(requests)
        self._waiting: list[deque[list[Request]]] = [deque() for _ in prefills.lengths]
        for group in by_prompt(requests):
            self._waiting[prefills.bucket(len(group[0].prompt_ids))].append(group)
        self._total = [max(len(waiting), 1) for waiting in self._waiting]

    def take(self) -> PromptBatch:
        """The next prompts."""
        shares = [len(x) / total for x, total in zip(self._waiting, self._total, strict=True)]
        bucket = max(range(len(shares)), key=lambda i: (shares[i], i))
        rows, waiting = self._prefills.rows[bucket], self._waiting[bucket]
        taken = [waiting.popleft() for _ in range(min(rows, len(waiting)))]
        self.left -= sum(map(len, taken))
        shape = (rows, self._prefills.lengths[bucket])
        tokens, lengths = np.zeros(shape, np.int32), np.ones(rows, np.int32)
        for row, group in enumerate(taken):
            lengths[row] = len(group[0].prompt_ids)
            tokens[row, : lengths[row]] = group[0].prompt_ids
        samples = tuple((row, request) for row, group in enumerate(taken) for request in group)
        return PromptBatch(tokens, lengths, samples)


def by_prompt(requests: Sequence[Request]) -> list[list[Request]]:
    """Requests with one prompt, of one id, together."""
    prompts: dict[tuple[str, bytes], list[Request]] = {}
    for request in requests:
        prompts.setdefault(prompt_key(request), []).append(request)
    return list(prompts.values())


def prompt_key(request: Request) -> tuple[str, bytes]:
    """Equal for requests whose prompt is read once."""
    return request.prompt_id, np.asarray(request.prompt_ids, np.int32).tobytes()
