"""Which page of the cache belongs to which slot: the host's side of `model.cache.PageTable`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_jax.model.cache import Pages, PageTable


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
