"""Caches that already hold prompts."""

import jax
import jax.numpy as jnp

from opd_jax.model.cache import empty_cache, insert_rows
from opd_jax.sampling.pager import Pager


def filled(model, pages, prompts, rows, lengths, tokens):
    """A cache with prompts in some rows, which have pages for so many tokens, and its table."""
    pager = Pager(pages)
    for row in rows:
        if row < pages.rows:
            pager.take(int(row), tokens)
    places = tuple(jnp.asarray(place) for place in pager.places(rows))
    cache = insert_rows(pages, empty_cache(model, pages), prompts, places, jnp.asarray(lengths))
    return cache, jax.tree.map(jnp.asarray, pager.table())
