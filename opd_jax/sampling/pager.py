"""Which page of the cache belongs to which slot: the host's side of `model.cache.PageTable`.

Where prompts are shared, the tokens of a slot here are those that follow its prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from opd_jax.model.cache import Pages, PageTable, PromptPages, PromptTable


class Pager:
    """Pages above level 0, where every slot has its own. A slot's pages lie in its shard."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._held: list[list[int]] = [[] for _ in range(pages.rows)]
        shards = range(pages.shards)
        self._free = [[list(range(count)) for _ in shards] for count in pages.counts[1:]]

    def holds(self, slot: int, tokens: int) -> bool:
        """Whether a slot has pages for so many tokens, or could have them at once."""
        held, wanted = len(self._held[slot]), self._levels(tokens)
        return all(self._free[level][self._shard(slot)] for level in range(held, wanted))

    def take(self, slot: int, tokens: int) -> None:
        """Give a slot the pages that it needs for so many tokens, as far as there are any."""
        held = self._held[slot]
        while len(held) < self._levels(tokens):
            free = self._free[len(held)][self._shard(slot)]
            if not free:
                return
            held.append(free.pop())

    def release(self, slot: int) -> None:
        """Take all pages of a slot back."""
        for level, page in enumerate(self._held[slot]):
            self._free[level][self._shard(slot)].append(page)
        self._held[slot] = []

    def table(self) -> PageTable:
        """As the device reads it."""
        rows, shards = self._pages.counts[0], self._pages.shards
        owners, pages = [], []
        for level, count in enumerate(self._pages.counts[1:]):
            owner = np.full((shards, count), rows, np.int32)
            page = np.full((shards, rows), count, np.int32)
            for slot, held in enumerate(self._held):
                if len(held) > level:
                    owner[self._shard(slot), held[level]] = slot % rows
                    page[self._shard(slot), slot % rows] = held[level]
            owners.append(owner)
            pages.append(page)
        return PageTable(tuple(owners), tuple(pages))

    def places(self, slots: Sequence[int]) -> tuple[Any, ...]:
        """Of each level, the pages of some slots, counted over all shards; without, the total."""
        counts = self._pages.counts
        places = [np.array(slots, np.int32)]
        for level, count in enumerate(counts[1:]):
            total = self._pages.shards * count
            places.append(np.full(len(slots), total, np.int32))
            for i, slot in enumerate(slots):
                if slot < self._pages.rows and len(self._held[slot]) > level:
                    places[-1][i] = self._shard(slot) * count + self._held[slot][level]
        return tuple(places)

    def _levels(self, tokens: int) -> int:
        """Levels above the first that hold the last of so many tokens."""
        return max(tokens - 1, 0) // self._pages.length

    def _shard(self, slot: int) -> int:
        return slot // self._pages.counts[0]


class PromptPager:
    """Which prompt lies in which shared page, and which slots read it, all in one shard.

    A page is free again when the last sample that reads it has ended.
    """

    def __init__(self, pages: Pages, shape: PromptPages) -> None:
        self._slots, self._shape = pages.counts[0], shape
        self._prompts: list[list[Hashable]] = [[None] * shape.count for _ in range(pages.shards)]
        self._tokens = np.zeros((pages.shards, shape.count), np.int32)
        self._row = np.full((pages.shards, shape.count * shape.rows), self._slots, np.int32)
        self._place = np.full((pages.shards, self._slots), self._row.shape[1], np.int32)
        self._unread: set[int] = set()  # slots whose prompt is not in its page yet

    def shard(self, slot: int) -> int:
        """Where the slot, and the pages that it can read, lie."""
        return slot // self._slots

    def page(self, slot: int, prompt: Hashable) -> int | None:
        """The page of the slot's shard that holds the prompt and has a place left, if there is."""
        pages = enumerate(self._prompts[self.shard(slot)])
        return next((p for p, x in pages if x == prompt and self._gap(slot, p) >= 0), None)

    def free(self, slot: int) -> int | None:
        """A page of the slot's shard without a prompt, if there is one."""
        held = self._prompts[self.shard(slot)]
        return held.index(None) if None in held else None

    def take(self, slot: int, page: int, prompt: Hashable, tokens: int) -> None:
        """Let a slot read a prompt of so many tokens, from one of the pages above."""
        shard, row = divmod(slot, self._slots)
        if self._prompts[shard][page] is None:
            self._prompts[shard][page], self._tokens[shard, page] = prompt, tokens
            self._unread.add(slot)
        place = self._gap(slot, page)
        self._row[shard, place], self._place[shard, row] = row, place

    def release(self, slot: int) -> None:
        """The slot's sample has ended."""
        shard, row = divmod(slot, self._slots)
        page = self._place[shard, row] // self._shape.rows
        self._row[shard, self._place[shard, row]] = self._slots
        self._place[shard, row] = self._row.shape[1]
        if np.all(self._readers(shard, page) == self._slots):
            self._prompts[shard][page] = None

    def table(self) -> PromptTable:
        """As the device reads it."""
        arrays: list[Any] = [x.copy() for x in (self._row, self._place, self._tokens)]
        return PromptTable(*arrays)

    def places(self, slots: Sequence[int]) -> Any:
        """The page of each slot, counted over all shards, where its prompt is to be put now.

        The number of all pages for a slot whose prompt lies there, or that does not exist.
        """
        count, rows = self._shape.count, self._shape.rows
        places = np.full(len(slots), len(self._prompts) * count, np.int32)
        for i, slot in enumerate(slots):
            if slot in self._unread:
                shard, row = divmod(slot, self._slots)
                places[i] = shard * count + self._place[shard, row] // rows
        self._unread.difference_update(slots)
        return places

    def _readers(self, shard: int, page: int) -> np.ndarray:
        return self._row[shard, page * self._shape.rows :][: self._shape.rows]

    def _gap(self, slot: int, page: int) -> int:
        """A free place of a page, -1 without one."""
        gaps = np.flatnonzero(self._readers(self.shard(slot), page) == self._slots)
        return page * self._shape.rows + int(gaps[0]) if len(gaps) else -1
