"""Rotary position embedding: the frequencies of every variant, and the rotation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.model.architecture import Architecture, RopeScaling

RopeTables = tuple[jax.Array, jax.Array]


def frequencies(arch: Architecture) -> np.ndarray:
    """Radians per position of each rotated pair, float64 [h/2]."""
    base_h = arch.rope_theta ** (-np.arange(0, arch.head_dim, 2) / arch.head_dim)
    scaling = arch.rope_scaling
    if scaling is None:
        return base_h
    if scaling.kind == "linear":
        return base_h / scaling.factor
    keep_h = _llama3_kept(base_h, scaling) if scaling.kind == "llama3" else _yarn_kept(arch)
    return base_h * (keep_h + (1 - keep_h) / scaling.factor)


def _llama3_kept(base_h: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Share of each frequency that stays: 1 for short wavelengths, 0 for long ones.

    Source: Llama 3.1's `apply_scaling`.
    """
    turns_h = scaling.original_max_position * base_h / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns_h - low) / (high - low), 0, 1)


def _yarn_kept(arch: Architecture) -> np.ndarray:
    """Share of each frequency that stays: falls from 1 to 0 between two dimensions.

    Source: arXiv 2309.00071, section 3.2, with the bounds as transformers 5 rounds them.
    """
    scaling, dim = arch.rope_scaling, arch.head_dim
    assert scaling is not None

    def dimension(turns: float) -> float:
        """The dimension that turns so many times within the original context."""
        ratio = scaling.original_max_position / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(arch.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    return 1 - np.clip((np.arange(dim // 2) - low) / width, 0, 1)


def rope_tables(positions_bt: jax.Array, arch: Architecture) -> RopeTables:
    """cos and sin, float32 [b, t, 1, h/2], multiplied by the attention factor."""
    per_position = jnp.asarray(frequencies(arch)[None, None, None], jnp.float32)
    angle = positions_bt[:, :, None, None].astype(jnp.float32) * per_position
    factor = arch.rope_scaling.attention_factor if arch.rope_scaling else 1.0
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rotate(x_btnh: jax.Array, tables: RopeTables) -> jax.Array:
    """Rotate (x_i, x_{i + h/2}) pairs by their position's angle: the half-rotation convention."""
    cos, sin = tables
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_btnh.dtype)
