"""Randomness as a function of what is drawn, never of history."""

from __future__ import annotations

import hashlib

import jax


def stable_hash(text: str) -> int:
    """31-bit hash of a text, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def key_for(seed: int, stream: str, *ids: int | str) -> jax.Array:
    """A typed key for one purpose (`stream`) and one thing (`ids`)."""
    key = jax.random.fold_in(jax.random.key(seed), stable_hash(stream))
    for part in ids:
        key = jax.random.fold_in(key, stable_hash(part) if isinstance(part, str) else part)
    return key
