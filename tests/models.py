"""Tiny random models for tests."""

from __future__ import annotations

import dataclasses
import functools

import jax

from opd_jax.model.architecture import Architecture
from opd_jax.model.transformer import LanguageModel

TINY = Architecture(
    family="qwen3",
    vocab_size=64,
    embed_dim=32,
    ffn_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=True,
    qkv_bias=False,
    qk_norm=True,
    max_position=128,
)


@functools.cache
def tiny(mesh=None, **changes):
    """A tiny model and its parameters, made once; the same values on any mesh."""
    model = LanguageModel(dataclasses.replace(TINY, **changes), mesh=mesh)
    return model, model.init(jax.random.key(7))
