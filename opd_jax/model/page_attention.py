"""Attention of new tokens over single pages of a cache, and what several pages give together."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from opd_jax.model.attention import MASKED

Part = tuple[jax.Array, jax.Array, jax.Array]
"""Of the softmax over a page: weighted values [r, n, h], sum of weights [r, n], largest score."""


def whole(part: Part) -> jax.Array:
    """What the softmax over a single page gives: [b, n, h]."""
    mixed_bnh, total_bn, _ = part
    return mixed_bnh / total_bn[..., None]


def sum_of_parts(parts: list[Part]) -> jax.Array:
    """What a row's softmax over all its pages gives: [b, n, h]."""
    top_bn = parts[0][2]
    for _, _, other_bn in parts[1:]:
        top_bn = jnp.maximum(top_bn, other_bn)
    mixed_bnh, total_bn = jnp.zeros_like(parts[0][0]), jnp.zeros_like(top_bn)
    for part_bnh, part_bn, part_top_bn in parts:
        weight_bn = jnp.exp(part_top_bn - top_bn)  # exactly 0 of a page without tokens
        mixed_bnh = mixed_bnh + weight_bn[..., None] * part_bnh
        total_bn = total_bn + weight_bn * part_bn
    return mixed_bnh / total_bn[..., None]


def attend_page(
    q_rnh: jax.Array, keys_rkhs: jax.Array, values_rksh: jax.Array, count_r: jax.Array
) -> Part:
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
