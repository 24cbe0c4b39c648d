"""Keys and values of rows that grow one token at a time, in pages.

Page c of a row holds its positions from c * length on. All pages c of a layer are one array, a
level. Every row has a page in level 0; above, a level has fewer pages than there are rows, and the
host gives them to the rows that need them. So few long rows do not make all rows pay for theirs:

    level 0   | row 0 | row 1 | row 2 | row 3 |
    level 1   | row 2 | row 0 |
    level 2   | row 2 |

A page that a row does not have adds exact zeros to its sums: what a row computes does not depend on
what the others have. On a mesh the rows are [shards, rows of a shard], and so are the pages of each
level; a row's pages lie in its shard.

Several samples of a prompt can share its keys and values. All prompts then lie in pages of their
own, in one more array, and the pages of a row hold what follows its prompt:

    prompts   | of rows 0, 1, 3 | of row 2 |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.model.page_attention import Part, attend_page, sum_of_parts, whole
from opd_jax.model.transformer import LanguageModel

Layer = tuple[jax.Array, ...]
Pair = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class PromptPages:
    """Pages for prompts that rows share.

    Attributes:
        count: of one shard, at least 2.
        rows: the most rows that share one.
        length: tokens of one.
    """

    count: int
    rows: int
    length: int


@dataclass(frozen=True)
class Pages:
    """The shape of a cache: static in compiled programs.

    Attributes:
        counts: pages of each level in one shard; that of level 0 is the number of rows.
        length: tokens of a page.
        shards: ways that rows and pages are cut over a mesh.
        prompts: `None`: every row holds its prompt itself.
    """

    counts: tuple[int, ...]
    length: int
    shards: int = 1
    prompts: PromptPages | None = None

    @property
    def rows(self) -> int:
        """All rows."""
        return self.shards * self.counts[0]

    @property
    def tokens(self) -> int:
        """Tokens for which there is room."""
        return sum(size * length for size, length in self.arrays)

    @property
    def arrays(self) -> tuple[tuple[int, int], ...]:
        """(pages, tokens of each) of the arrays of a layer: the levels, then shared prompts."""
        levels = tuple((size, self.length) for size in self.sizes)
        if self.prompts is None:
            return levels
        return (*levels, (self.shards * self.prompts.count, self.prompts.length))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pages in the array of each level; a single one has an unused one beside it.

        XLA drops an axis of size 1 from the products, and with it the way to write in place.
        """
        return tuple(max(self.shards * count, 2) for count in self.counts)


class PromptTable(NamedTuple):
    """Who shares which prompt; page p has `PromptPages.rows` places, from p times that on."""

    row: jax.Array  # int32 [shards, places]; of a free place, the number of rows
    place: jax.Array  # int32 [shards, rows]; without one, the number of places
    tokens: jax.Array  # int32 [shards, pages]


class PageTable(NamedTuple):
    """Whose page is whose, in each level above the first; numbers count within a shard."""

    owner: tuple[jax.Array, ...]  # int32 [shards, pages]; of a free page, the number of rows
    page: tuple[jax.Array, ...]  # int32 [shards, rows]; without one, the number of pages
    prompts: PromptTable | None = None


class PagedCache(NamedTuple):
    """Keys and values of the tokens so far; row b has `lengths_b[b]` of them."""

    keys: tuple[Layer, ...]  # of each layer and of `Pages.arrays`: [pages, k, h, length]
    values: tuple[Layer, ...]  # [pages, k, length, h]
    lengths_b: jax.Array


def empty_cache(model: LanguageModel, pages: Pages) -> PagedCache:
    """Room for tokens, none stored yet."""
    k, h = model.arch.num_kv_heads, model.arch.head_dim

    def layers(shapes: list[tuple[int, ...]]) -> tuple[Layer, ...]:
        zeros = [[jnp.zeros(x, model.compute_dtype) for x in shapes]] * model.arch.num_layers
        return tuple(tuple(layer) for layer in zeros)

    keys = layers([(size, k, h, length) for size, length in pages.arrays])
    values = layers([(size, k, length, h) for size, length in pages.arrays])
    return PagedCache(keys, values, jnp.zeros((pages.rows,), jnp.int32))


def page_table(pages: Pages, array: Callable[[tuple[int, int]], Any]) -> PageTable:
    """The table of a cache, from what makes an array of a shape."""
    shards, rows, prompts = pages.shards, pages.counts[0], None
    if (shape := pages.prompts) is not None:
        sizes = (shape.count * shape.rows, rows, shape.count)
        prompts = PromptTable(*(array((shards, size)) for size in sizes))
    return PageTable(
        tuple(array((shards, count)) for count in pages.counts[1:]),
        tuple(array((shards, rows)) for _ in pages.counts[1:]),
        prompts,
    )


def cache_token_bytes(model: LanguageModel) -> int:
    """Bytes of one token's keys and values in all layers."""
    arch = model.arch
    width = jnp.dtype(model.compute_dtype).itemsize
    return 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * width


def room(pages: Pages, table: PageTable) -> jax.Array:
    """int32 [rows]: tokens for which each row has pages."""
    levels_b = jnp.ones((pages.rows,), jnp.int32)
    for page, count in zip(table.page, pages.counts[1:], strict=True):
        levels_b += page.reshape(-1) < count
    room_b = pages.length * levels_b
    return room_b if table.prompts is None else room_b + _prompt_tokens(pages, table.prompts)


def _prompt_tokens(pages: Pages, prompts: PromptTable) -> jax.Array:
    """int32 [rows]: length of each row's prompt; of a row without one, anything."""
    return _pick(prompts.tokens.reshape(-1), prompts.place // _shared(pages).rows)


def _shared(pages: Pages) -> PromptPages:
    if pages.prompts is None:
        raise ValueError("a table of shared prompts, and no pages for them")
    return pages.prompts


def insert_rows(
    pages: Pages,
    cache: PagedCache,
    new: Pair,
    pages_lp: tuple[jax.Array, ...],
    lengths_p: jax.Array,
) -> PagedCache:
    """Put whole prompts into rows of the cache, or into the pages for shared prompts.

    Args:
        new: keys and values as `forward` returns them, each [l, p, t, k, h].
        pages_lp: of each of `pages.arrays`, int32 [p]: the page that gets its part of each prompt,
            counted over all shards; one beyond the last takes nothing. That of level 0 is the row.
            With shared prompts the levels between it and the last are not read.
        lengths_p: int32, tokens of each prompt; what follows them is never read.
    """
    keys = jnp.transpose(new[0], (0, 1, 3, 4, 2))
    values = jnp.transpose(new[1], (0, 1, 3, 2, 4))
    starts = [(level, level * pages.length) for level in range(len(pages.counts))]
    if pages.prompts is not None:
        starts = [(len(starts), 0)]

    def put(olds: Layer, fresh: jax.Array, axis: int) -> Layer:
        placed = list(olds)
        for level, start in starts:
            t = min(fresh.shape[axis] - start, placed[level].shape[axis])
            if t <= 0:
                break
            part = jax.lax.slice_in_dim(fresh, start, start + t, axis=axis)
            at, place_p = placed[level].at, pages_lp[level]
            target = at[place_p, :, :, :t] if axis == 3 else at[place_p, :, :t]
            placed[level] = target.set(part, mode="drop")
        return tuple(placed)

    return PagedCache(
        tuple(put(old, keys[i], 3) for i, old in enumerate(cache.keys)),
        tuple(put(old, values[i], 2) for i, old in enumerate(cache.values)),
        cache.lengths_b.at[pages_lp[0]].set(lengths_p, mode="drop"),
    )


def write_and_attend(
    pages: Pages,
    table: PageTable,
    old: tuple[Layer, Layer],
    lengths_b: jax.Array,
    new: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, tuple[Layer, Layer]]:
    """Store one token per row at position `lengths_b`, in place, and attend with it.

    The token is written before the cache is read: only in this order can XLA reuse its memory. A
    row without a page for its token stores nothing.

    Args:
        old: keys and values of one layer.
        new: queries [b, 1, n, h] of the tokens, their keys and values [b, 1, k, h].

    Returns:
        the attention output [b, 1, n, h], and the layer's keys and values.
    """
    rows = tuple(x[:, 0] for x in new)
    if table.prompts is not None:
        lengths_b = lengths_b - _prompt_tokens(pages, table.prompts)
    keys, values, parts = [], [], []
    for level in range(len(pages.counts)):
        old_keys, old_values = old[0][level], old[1][level]
        (q_rnh, k_rkh, v_rkh), place_r = rows, lengths_b
        if level > 0:
            owner = table.owner[level - 1]
            q_rnh, k_rkh, v_rkh, place_r = (_pick(x, owner) for x in (*rows, lengths_b))
            mine_r = owner.reshape(-1) < pages.counts[0]
            place_r = jnp.where(mine_r, place_r - level * pages.length, -1)
        if len(place_r) < pages.sizes[level]:
            q_rnh, k_rkh, v_rkh = (jnp.concatenate([x, x]) for x in (q_rnh, k_rkh, v_rkh))
            place_r = jnp.append(place_r, -1)
        keys.append(_write(old_keys, k_rkh, place_r, 3))
        values.append(_write(old_values, v_rkh, place_r, 2))
        mixed_rnh, *sums = attend_page(q_rnh, keys[-1], values[-1], place_r + 1)
        used = pages.shards * pages.counts[level]
        part = (mixed_rnh[:used], sums[0][:used], sums[1][:used])
        parts.append(
            part if level == 0 else _to_rows(part, table.page[level - 1], pages.counts[level])
        )
    if table.prompts is not None:
        keys.append(old[0][-1])
        values.append(old[1][-1])
        parts.append(_part_of_prompts(pages, table.prompts, rows[0], keys[-1], values[-1]))
    mixed_bnh = sum_of_parts(parts) if len(parts) > 1 else whole(parts[0])
    return mixed_bnh[:, None].astype(new[0].dtype), (tuple(keys), tuple(values))


def _part_of_prompts(
    pages: Pages, prompts: PromptTable, q_bnh: jax.Array, keys: jax.Array, values: jax.Array
) -> Part:
    """All rows of a prompt at once: as if they were more heads of one row."""
    rows, k, (n, h) = _shared(pages).rows, values.shape[1], q_bnh.shape[1:]
    q_prkgh = _pick(q_bnh, prompts.row).reshape(-1, rows, k, n // k, h)
    q_pnh = jnp.swapaxes(q_prkgh, 1, 2).reshape(-1, k * rows * (n // k), h)
    part = attend_page(q_pnh, keys, values, prompts.tokens.reshape(-1))

    def apart(x: jax.Array) -> jax.Array:
        x_pkrg = x.reshape(-1, k, rows, n // k, *x.shape[2:])
        return jnp.swapaxes(x_pkrg, 1, 2).reshape(-1, n, *x.shape[2:])

    mixed, total, top = (apart(x) for x in part)
    return _to_rows((mixed, total, top), prompts.place, prompts.row.shape[1])


def _to_rows(part: Part, index: jax.Array, count: int) -> Part:
    """What lies at `index` [shards, rows] goes to each row; nothing where that is `count`."""
    mixed_rnh, total_rn, top_rn = part
    has_b = index.reshape(-1) < count
    packed = jnp.concatenate([mixed_rnh, total_rn[..., None], top_rn[..., None]], axis=-1)
    packed = _pick(packed, index)
    top_bn = jnp.where(has_b[:, None], packed[..., -1], -jnp.inf)
    rest = jnp.where(has_b[:, None, None], packed[..., :-1], 0.0)
    return rest[..., :-1], rest[..., -1], top_bn


def _pick(x_b: jax.Array, index: jax.Array) -> jax.Array:
    """`x_b`'s entries at `index` [shards, count], counted within a shard, the last if beyond."""
    shards, count = index.shape
    if shards == 1:
        return x_b.at[index[0]].get(mode="clip")
    cut = x_b.reshape(shards, -1, *x_b.shape[1:])
    picked = jax.vmap(lambda x, i: x.at[i].get(mode="clip"))(cut, index)
    return picked.reshape(shards * count, *x_b.shape[1:])


def _write(cache: jax.Array, new_rkh: jax.Array, place_r: jax.Array, axis: int) -> jax.Array:
    """Each page's new keys or values at its place along `axis`, in place; none outside the page.

    What is outside overwrites its nearest neighbour with itself: scatters that check bounds make
    XLA copy the cache.
    """
    inside_r = (place_r >= 0) & (place_r < cache.shape[axis])
    at_r = jnp.clip(place_r, 0, cache.shape[axis] - 1)
    rows_r = jnp.arange(len(place_r))
    target = cache.at[rows_r, :, :, at_r] if axis == 3 else cache.at[rows_r, :, at_r]
    new_rkh = jnp.where(inside_r[:, None, None], new_rkh, target.get(mode="promise_in_bounds"))
    return target.set(new_rkh, mode="promise_in_bounds", unique_indices=True)
