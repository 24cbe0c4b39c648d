"""The key of a token: a function of seed, prompt id, sample index and position alone."""

from __future__ import annotations

import jax
import numpy as np

from opd_jax.core.rng import key_for

STREAM = "sample"


def root_key(seed: int) -> np.ndarray:
    """Raw data of the key that all samples of a seed descend from."""
    return np.asarray(jax.random.key_data(key_for(seed, STREAM)))


def sample_keys(root: jax.Array, prompt_p: jax.Array, index_p: jax.Array) -> jax.Array:
    """Raw data [p, 2] of `key_for(seed, STREAM, prompt id, sample index)`.

    Args:
        root: of `root_key`.
        prompt_p: int32, `stable_hash` of the prompt ids.
        index_p: int32, sample indices.
    """

    def one(prompt: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(root), prompt)
        return jax.random.key_data(jax.random.fold_in(key, index))

    return jax.vmap(one)(prompt_p, index_p)


def token_keys(base_b: jax.Array, position_b: jax.Array) -> jax.Array:
    """Typed keys [b] of the tokens at these positions in the responses."""
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(base_b), position_b)
