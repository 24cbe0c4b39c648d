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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.model.attention import MASKED
from opd_jax.model.transformer import LanguageModel

Layer = tuple[jax.Array, ...]
Pair = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Pages:
    """The shape of a cache: static in compiled programs.

    Attributes:
        counts: pages of each level in one shard; that of level 0 is the number of rows.
        length: tokens of a page.
        shards: ways that rows and pages are cut over a mesh.
    """

    counts: tuple[int, ...]
    length: int
    shards: int = 1

    @property
    def rows(self) -> int:
        """All rows."""
        return self.shards * self.counts[0]

    @property
    def tokens(self) -> int:
        """Tokens for which there is room."""
        return sum(self.sizes) * self.length

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pages in the array of each level; a single one has an unused one beside it.

        XLA drops an axis of size 1 from the products, and with it the way to write in place.
        """
        return tuple(max(self.shards * count, 2) for count in self.counts)


class PageTable(NamedTuple):
    """Whose page is whose, in each level above the first; numbers count within a shard."""

    owner: tuple[jax.Array, ...]  # int32 [shards, pages]; of a free page, the number of rows
    page: tuple[jax.Array, ...]  # int32 [shards, rows]; without one, the number of pages


class PagedCache(NamedTuple):
    """Keys and values of the tokens so far; row b holds `lengths_b[b]` of them."""

    keys: tuple[Layer, ...]  # of each layer and level: [pages, k, h, length]
    values: tuple[Layer, ...]  # [pages, k, length, h]
    lengths_b: jax.Array


def empty_cache(model: LanguageModel, pages: Pages) -> PagedCache:
    """Room for tokens, none stored yet."""
    k, h = model.arch.num_kv_heads, model.arch.head_dim

    def arrays(*sizes: int) -> tuple[Layer, ...]:
        shapes = [(size, k, *sizes) for size in pages.sizes]
        zeros = [[jnp.zeros(x, model.compute_dtype) for x in shapes]] * model.arch.num_layers
        return tuple(tuple(layer) for layer in zeros)

    lengths_b = jnp.zeros((pages.rows,), jnp.int32)
    return PagedCache(arrays(h, pages.length), arrays(pages.length, h), lengths_b)


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
    return pages.length * levels_b


def insert_rows(
    pages: Pages,
    cache: PagedCache,
    new: Pair,
    pages_lp: tuple[jax.Array, ...],
    lengths_p: jax.Array,
) -> PagedCache:
    """Put whole prompts into rows of the cache.

    Args:
        new: keys and values as `forward` returns them, each [l, p, t, k, h].
        pages_lp: of each level, int32 [p]: the page that gets its part of each prompt, counted over
            all shards; one beyond the last takes nothing. That of level 0 is the row.
        lengths_p: int32, tokens of each prompt; what follows them is never read.
    """
    keys = jnp.transpose(new[0], (0, 1, 3, 4, 2))
    values = jnp.transpose(new[1], (0, 1, 3, 2, 4))

    def put(olds: Layer, fresh: jax.Array, axis: int) -> Layer:
        placed = list(olds)
        for level, place_p in enumerate(pages_lp):
            start = level * pages.length
            t = min(fresh.shape[axis] - start, pages.length)
            if t <= 0:
                break
            part = jax.lax.slice_in_dim(fresh, start, start + t, axis=axis)
            at = placed[level].at
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
    keys, values, parts = [], [], []
    for level, (old_keys, old_values) in enumerate(zip(*old, strict=True)):
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
        parts.append(part if level == 0 else _part_of_rows(pages, table, level, part))
    mixed_bnh = _sum_of_parts(parts) if len(parts) > 1 else _whole(parts[0])
    return mixed_bnh[:, None].astype(new[0].dtype), (tuple(keys), tuple(values))


Part = tuple[jax.Array, jax.Array, jax.Array]
"""Of the softmax over a page: weighted values [r, n, h], sum of weights [r, n], largest score."""


def _whole(part: Part) -> jax.Array:
    mixed_bnh, total_bn, _ = part
    return mixed_bnh / total_bn[..., None]


def _sum_of_parts(parts: list[Part]) -> jax.Array:
    top_bn = parts[0][2]
    for _, _, other_bn in parts[1:]:
        top_bn = jnp.maximum(top_bn, other_bn)
    mixed_bnh, total_bn = jnp.zeros_like(parts[0][0]), jnp.zeros_like(top_bn)
    for part_bnh, part_bn, part_top_bn in parts:
        weight_bn = jnp.exp(part_top_bn - top_bn)  # exactly 0 of a page without tokens
        mixed_bnh = mixed_bnh + weight_bn[..., None] * part_bnh
        total_bn = total_bn + weight_bn * part_bn
    return mixed_bnh / total_bn[..., None]


def _part_of_rows(pages: Pages, table: PageTable, level: int, part: Part) -> Part:
    """From pages to rows."""
    mixed_rnh, total_rn, top_rn = part
    page = table.page[level - 1]
    has_b = page.reshape(-1) < pages.counts[level]
    packed = jnp.concatenate([mixed_rnh, total_rn[..., None], top_rn[..., None]], axis=-1)
    packed = _pick(packed, page)
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


def attend_page(
    q_rnh: jax.Array, keys_rkhs: jax.Array, values_rksh: jax.Array, count_r: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One new token per row (its softmax unfinished) over a page that already holds that token.

    Keys have their positions last and values before the head dimension: both products then read
    the page as it lies.

    Args:
        q_rnh: queries.
        keys_rkhs: the row's tokens are the first `count_r[r]` of the page.
        values_rksh: likewise.
        count_r: int32; all tokens of the page if more, none if less than 1.

    Returns:
        values weighted by exp(score - top) [r, n, h], the sum of these weights [r, n], and the top:
        the largest score [r, n], `MASKED` without tokens. All float32.
    """
    r, n, h = q_rnh.shape
    k, s = values_rksh.shape[1:3]
    q_rkgh = q_rnh.reshape(r, k, n // k, h) * (h**-0.5)
    score = jnp.einsum("rkgh,rkhs->rkgs", q_rkgh, keys_rkhs, preferred_element_type=jnp.float32)
    mask_rs = jnp.arange(s)[None, :] < count_r[:, None]
    score = jnp.where(mask_rs[:, None, None], score, MASKED)
    top_rkg = jnp.max(score, axis=-1)
    weight = jnp.exp(score - top_rkg[..., None])
    total_rkg = jnp.sum(weight, axis=-1)
    mixed = jnp.einsum(
        "rkgs,rksh->rkgh",
        weight.astype(values_rksh.dtype),
        values_rksh,
        preferred_element_type=jnp.float32,
    )
    return mixed.reshape(r, n, h), total_rkg.reshape(r, n), top_rkg.reshape(r, n)
