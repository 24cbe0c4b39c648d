"""The host's side of the slots: who sits where, and what they have said so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd_jax.core.rng import stable_hash
from opd_jax.data.records import FinishReason
from opd_jax.errors import ModelError
from opd_jax.sampling.engine import HEADER, First, Program, Round
from opd_jax.sampling.queue import Request


@dataclass(frozen=True, eq=False)
class Sample:
    """A finished response.

    Attributes:
        token_ids: int32 [n], as drawn, the end token included.
        logprobs: float32 [n], of each token under the untransformed distribution, temperature 1.
        finish_reason: `stop` when an end token was drawn, `length` when the limit cut it.
    """

    request: Request
    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason


class SlotTable:
    """Requests in slots, and their tokens until they finish."""

    def __init__(self, program: Program) -> None:
        shape = (program.slots, program.max_new_tokens)
        self._end_ids = program.end_ids
        self._requests: list[Request | None] = [None] * program.slots
        self._tokens = np.zeros(shape, np.int32)
        self._logprobs = np.zeros(shape, np.float32)
        self._count_b = np.zeros(program.slots, np.int32)

    @property
    def free(self) -> list[int]:
        """Slots that hold no request."""
        return [slot for slot, request in enumerate(self._requests) if request is None]

    @property
    def busy(self) -> bool:
        """Whether any slot holds a request."""
        return any(request is not None for request in self._requests)

    def admit(
        self, requests: Sequence[Request], tokens: np.ndarray
    ) -> tuple[list[int], np.ndarray]:
        """Give each request a free slot.

        Returns:
            the slots, and the prompts as `engine.prefill` wants them packed.
        """
        slots = self.free[: len(requests)]
        header = np.zeros((len(tokens), HEADER), np.int32)
        header[:, 0], header[:, 1] = 1, len(self._requests)
        for row, (slot, request) in enumerate(zip(slots, requests, strict=True)):
            self._requests[slot], self._count_b[slot] = request, 0
            prompt = stable_hash(request.prompt_id)
            header[row] = len(request.prompt_ids), slot, prompt, request.sample_index
        return slots, np.concatenate([header, tokens], axis=1)

    def record_first(self, slots: Sequence[int], first: First) -> None:
        """Note the tokens that a prefill drew; of a broken row, nothing will be read."""
        self._tokens[slots, 0] = first.token_p[: len(slots)]
        self._logprobs[slots, 0] = first.logprob_p[: len(slots)]
        self._count_b[slots] = 1

    def record_round(self, seen: Round) -> None:
        """Note the tokens that a decode round drew."""
        count_b = np.asarray(seen.count_b)
        new_b = count_b - self._count_b
        steps = max(int(new_b.max()), 0)
        row, slot = np.nonzero(np.arange(steps)[:, None] < new_b[None, :])
        column = self._count_b[slot] + row
        self._tokens[slot, column] = np.asarray(seen.token_rb)[row, slot]
        self._logprobs[slot, column] = np.asarray(seen.logprob_rb)[row, slot]
        self._count_b = count_b.copy()

    def harvest(self, seen: Round) -> list[Sample]:
        """Empty the slots that finished."""
        finished = np.asarray(seen.done_b) & ~np.asarray(seen.broken_b)
        samples = []
        for slot in np.flatnonzero(finished):
            request = self._requests[slot]
            if request is not None:
                samples.append(self._sample(int(slot), request))
                self._requests[slot] = None
        return samples

    def _sample(self, slot: int, request: Request) -> Sample:
        n = self._count_b[slot]
        tokens, logprobs = self._tokens[slot, :n].copy(), self._logprobs[slot, :n].copy()
        return Sample(
            request, tokens, logprobs, "stop" if tokens[-1] in self._end_ids else "length"
        )

    def refuse_broken(self, seen: Round) -> None:
        """Stop when a slot's logits were not finite.

        Raises:
            ModelError: names the prompt, the sample and the position.
        """
        for slot in np.flatnonzero(np.asarray(seen.broken_b)):
            request = self._requests[slot]
            if request is not None:
                raise ModelError(
                    f"sampling: prompt '{request.prompt_id}', sample {request.sample_index}: "
                    f"the logits at response position {seen.count_b[slot]} are not finite; "
                    "the checkpoint is broken, or compute_dtype is too narrow for it"
                )
