"""The host's side of the slots: who sits where, and what they have said so far."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_jax.config import SamplingConfig
from opd_jax.core.rng import stable_hash
from opd_jax.data.records import FinishReason
from opd_jax.errors import ModelError
from opd_jax.model.cache import PageTable
from opd_jax.sampling.engine import First, Program, Round, Start
from opd_jax.sampling.pager import Pager, PromptPager
from opd_jax.sampling.queue import Request, prompt_key
from opd_jax.sampling.stops import Text, stop_length
from opd_jax.sampling.transforms import transform_of


@dataclass(frozen=True, eq=False)
class Sample:
    """A finished response.

    Attributes:
        token_ids: int32 [n], as drawn, the end token included.
        logprobs: float32 [n], of each token under the untransformed distribution, temperature 1.
        drawn_logprobs: float32 [n], of each token under the distribution that it was drawn from.
        finish_reason: `stop` when an end token or a stop string ended it, `length` when the limit
            cut it.
        text: what the tokens say, special tokens left out; `None` without a tokenizer.
    """

    request: Request
    token_ids: np.ndarray
    logprobs: np.ndarray
    drawn_logprobs: np.ndarray
    finish_reason: FinishReason
    text: str | None


class SlotTable:
    """Requests in slots, and their tokens until they finish.

    Args:
        sampling: of the requests that bring none of their own.
        longest: the largest limit of a response among the requests.
        text: needed for stop strings, and for the text of samples.
    """

    def __init__(
        self, program: Program, sampling: SamplingConfig, longest: int, text: Text | None
    ) -> None:
        self._program, self._sampling, self._text = program, sampling, text
        shape = (program.slots, longest)
        self._requests: list[Request | None] = [None] * program.slots
        self._tokens = np.zeros(shape, np.int32)
        self._logprobs = np.zeros((2, *shape), np.float32)
        self._count_b = np.zeros(program.slots, np.int32)
        self._stopped_b = np.zeros(program.slots, bool)
        self._looked_b = np.zeros(program.slots, np.int32)  # tokens searched for stop strings
        self._pager = Pager(program.pages)
        prompts = program.pages.prompts
        self._shared = None if prompts is None else PromptPager(program.pages, prompts)
        self.stuck = 0  # slots whose sample waits for a page

    def settings(self, request: Request) -> SamplingConfig:
        """The request's own sampling settings, or those of all."""
        return self._sampling if request.sampling is None else request.sampling

    @property
    def free(self) -> list[int]:
        """Slots that hold no request."""
        return [slot for slot, request in enumerate(self._requests) if request is None]

    @property
    def busy(self) -> bool:
        """Whether any slot holds a request."""
        return any(request is not None for request in self._requests)

    def halted(self) -> np.ndarray:
        """bool [b]: slots without a request, whatever the device thinks."""
        return np.array([request is None for request in self._requests])

    def seat(self, request: Request) -> int | None:
        """Give a request a free slot with pages for its prompt and one token, if there is one."""
        tokens = self._own_prompt(request) + (self.settings(request).max_new_tokens > 1)
        free = (slot for slot in self.free if self._pager.holds(slot, tokens))
        shared = self._shared
        slot = next(free, None) if shared is None else _share(shared, request, free)
        if slot is not None:
            self._pager.take(slot, tokens)
            self._requests[slot], self._count_b[slot] = request, 0
            self._stopped_b[slot], self._looked_b[slot] = False, 0
        return slot

    def _own_prompt(self, request: Request) -> int:
        """Tokens of its prompt that lie in a slot's own pages."""
        return len(request.prompt_ids) if self._shared is None else 0

    def pages(self) -> PageTable:
        """Who has which page in the next round; before it, all get what they can need in it.

        The longest come first: what holds the most pages is to end the soonest.
        """
        wanted: list[tuple[int, int, int]] = []  # (tokens now, slot, tokens after the round)
        for slot, request in enumerate(self._requests):
            if request is not None:
                prompt, limit = self._own_prompt(request), self.settings(request).max_new_tokens
                now = prompt + max(int(self._count_b[slot]), 1) - 1
                most = min(now + self._program.round_steps, prompt + limit - 1)
                wanted.append((now, slot, most))
        for _, slot, most in sorted(wanted, reverse=True):
            self._pager.take(slot, most)
        table = self._pager.table()
        return table if self._shared is None else table._replace(prompts=self._shared.table())

    def start(self, chosen: Sequence[tuple[int, int, Request]], rows: int) -> Start:
        """What `engine.start` wants to know of (row of the prompt, slot, request)."""
        padding = rows - len(chosen)
        requests = [request for _, _, request in chosen]
        settings = [self.settings(r) for r in requests] + [SamplingConfig()] * padding

        def column(values: Sequence[int], fill: int) -> Any:
            return np.array([*values, *[fill] * padding], np.int32)

        slot_p = column([slot for _, slot, _ in chosen], self._program.slots)
        shared = () if self._shared is None else (self._shared.places(slot_p.tolist()),)
        return Start(
            source_p=column([row for row, _, _ in chosen], 0),
            slot_p=slot_p,
            pages_lp=(*self._pager.places(slot_p), *shared),
            prompt_p=column([stable_hash(r.prompt_id) for r in requests], 0),
            index_p=column([r.sample_index for r in requests], 0),
            limit_p=column([s.max_new_tokens for s in settings[: len(chosen)]], 1),
            least_p=column([s.min_new_tokens for s in settings[: len(chosen)]], 0),
            transform=transform_of(settings),
        )

    def record_first(self, slots: Sequence[int], first: First) -> None:
        """Note the tokens that a start drew; of a broken row, nothing will be read."""
        n = len(slots)
        self._tokens[slots, 0] = first.token_p[:n]
        self._logprobs[:, slots, 0] = first.logprob_p[:n], first.drawn_logprob_p[:n]
        self._count_b[slots] = 1

    def record_round(self, seen: Round) -> None:
        """Note the tokens that a decode round drew, and who is stuck."""
        before_b, count_b = self._count_b, np.asarray(seen.count_b)
        new_b = count_b - before_b
        steps = max(int(new_b.max()), 0)
        row, slot = np.nonzero(np.arange(steps)[:, None] < new_b[None, :])
        column = before_b[slot] + row
        self._tokens[slot, column] = np.asarray(seen.token_rb)[row, slot]
        drawn = np.stack([np.asarray(seen.logprob_rb), np.asarray(seen.drawn_logprob_rb)])
        self._logprobs[:, slot, column] = drawn[:, row, slot]
        self._count_b = count_b.copy()
        self._find_stops()
        self.stuck = int(np.sum(np.asarray(seen.stuck_b) & ~self._stopped_b))

    def _find_stops(self) -> None:
        """Cut responses whose text contains a stop string."""
        for slot, request in enumerate(self._requests):
            if request is None or self._text is None:
                continue
            sampling, said = self.settings(request), self._tokens[slot, : self._count_b[slot]]
            n = stop_length(
                said.tolist(),
                int(self._looked_b[slot]),
                sampling.stop,
                sampling.min_new_tokens,
                self._text,
            )
            self._looked_b[slot] = len(said)
            if n is not None:
                self._count_b[slot], self._stopped_b[slot] = n, True

    def harvest(self, seen: Round) -> list[Sample]:
        """Empty the slots that finished."""
        finished = np.asarray(seen.done_b) & ~np.asarray(seen.broken_b) | self._stopped_b
        samples = []
        for slot in np.flatnonzero(finished):
            request = self._requests[slot]
            if request is not None:
                samples.append(self._sample(int(slot), request))
                self._requests[slot] = None
                self._stopped_b[slot] = False
                self._pager.release(int(slot))
                if self._shared is not None:
                    self._shared.release(int(slot))
        return samples

    def _sample(self, slot: int, request: Request) -> Sample:
        n = self._count_b[slot]
        tokens = self._tokens[slot, :n].copy()
        ended = self._stopped_b[slot] or tokens[-1] in self._program.end_ids
        return Sample(
            request,
            tokens,
            self._logprobs[0, slot, :n].copy(),
            self._logprobs[1, slot, :n].copy(),
            "stop" if ended else "length",
            None if self._text is None else self._text(tokens.tolist()),
        )

    def said(self, slot: int) -> tuple[Request | None, np.ndarray]:
        """Who sits in a slot, and the tokens so far."""
        return self._requests[slot], self._tokens[slot, : self._count_b[slot]]

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


def _share(prompts: PromptPager, request: Request, free: Iterable[int]) -> int | None:
    """The free slot that reads the request's prompt with others, or is to be its first reader."""
    key = prompt_key(request)
    of_shard: dict[int, int] = {}
    for slot in free:  # those of one shard are alike
        of_shard.setdefault(prompts.shard(slot), slot)
    found = ((slot, prompts.page(slot, key)) for slot in of_shard.values())
    fresh = ((slot, prompts.free(slot)) for slot in of_shard.values())
    for slot, page in itertools.chain(found, fresh):
        if page is not None:
            prompts.take(slot, page, key, len(request.prompt_ids))
            return slot
    return None
