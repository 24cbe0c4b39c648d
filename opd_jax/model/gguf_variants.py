"""Rotary scaling and experts in a GGUF file's metadata."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_jax.core.gguf_file import metadata
from opd_jax.errors import ModelError
from opd_jax.model.architecture import Architecture, Family, RopeScaling
from opd_jax.model.hf_rope import yarn_magnitude
from opd_jax.model.rope import frequencies

if TYPE_CHECKING:
    from gguf import GGUFReader

FAMILIES: dict[str, Family] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}
DIVISORS = "rope_freqs.weight"
"""Llama 3's scaling, which llama.cpp keeps as one divisor per frequency instead of its rule."""


def family_of(reader: GGUFReader, path: str | Path) -> tuple[Family, str]:
    """The family, and the prefix of its metadata.

    Raises:
        ModelError: an unknown family, or experts in one that has none.
    """
    prefix = metadata(reader, "general.architecture")
    if prefix not in FAMILIES:
        raise ModelError(
            f"{path}: GGUF architecture {prefix!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    if prefix != "qwen3moe":
        _only(reader, f"{prefix}.expert_count", (0,), path)
    return FAMILIES[prefix], prefix


def expert_fields(reader: GGUFReader, prefix: str, path: str | Path) -> dict[str, Any]:
    """The mixture's part of an `Architecture`: in this format every layer is sparse."""
    _only(reader, f"{prefix}.expert_shared_count", (0,), path)
    _only(reader, f"{prefix}.expert_weights_scale", (0.0, 1.0), path)
    names = ("expert_count", "expert_used_count", "expert_feed_forward_length", "block_count")
    sizes = {name: metadata(reader, f"{prefix}.{name}") for name in names}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ModelError(f"{path}: metadata {prefix}.{name}={size!r} is not a positive integer")
    return {
        "sparse_layers": tuple(range(sizes["block_count"])),
        "num_experts": sizes["expert_count"],
        "experts_per_token": sizes["expert_used_count"],
        "expert_ffn_dim": sizes["expert_feed_forward_length"],
        # llama.cpp normalises always, as every published Qwen3 mixture does.
        "norm_topk_prob": bool(metadata(reader, f"{prefix}.expert_weights_norm", True)),
    }


def rope_scaling(
    reader: GGUFReader, prefix: str, arch: Architecture, path: str | Path
) -> RopeScaling | None:
    """What stretches the frequencies.

    Args:
        arch: the architecture without it.

    Raises:
        ModelError: a kind or a key that is not supported.
    """
    _only(reader, f"{prefix}.rope.dimension_count", (arch.head_dim,), path)
    _only(reader, f"{prefix}.rope.scale_linear", (1.0,), path)
    key = f"{prefix}.rope.scaling."
    divisors = next((t.data for t in reader.tensors if t.name == DIVISORS), None)
    unnamed = "none" if metadata(reader, key + "factor") is None else "linear"  # as llama.cpp
    kind = metadata(reader, key + "type", unnamed)
    if kind not in ("none", "linear", "yarn") or (divisors is not None and kind != "none"):
        beside = "" if divisors is None else f" beside tensor '{DIVISORS}'"
        raise ModelError(
            f"{path}: {key}type={kind!r}{beside} is not supported; supported: none, linear, yarn, "
            f"or tensor '{DIVISORS}' alone"
        )
    if divisors is not None:
        return _llama3_of(np.asarray(divisors, np.float64).ravel(), arch, path)
    if kind == "none":
        return None
    factor = _positive(reader, key + "factor", path)
    if kind == "linear":
        return RopeScaling("linear", factor)
    _only(reader, key + "yarn_ext_factor", (-1.0, 1.0), path)
    _only(reader, key + "yarn_log_multiplier", (0.0,), path)
    sharpening = _positive(reader, key + "attn_factor", path, 1.0)
    sharpening *= _positive(reader, key + "yarn_attn_factor", path, 1.0)
    return RopeScaling(
        "yarn",
        factor,
        int(_positive(reader, key + "original_context_length", path, arch.max_position)),
        beta_fast=_positive(reader, key + "yarn_beta_fast", path, 32.0),
        beta_slow=_positive(reader, key + "yarn_beta_slow", path, 1.0),
        attention_factor=yarn_magnitude(factor) * sharpening,
    )


def _llama3_of(divisors_h: np.ndarray, arch: Architecture, path: str | Path) -> RopeScaling:
    """The rule behind the divisors: of Llama 3.1 to 3.3, which differ in the factor alone."""
    found = RopeScaling("llama3", float(divisors_h.max()), 8192)
    plain = arch.rope_theta ** (-np.arange(0, arch.head_dim, 2) / arch.head_dim)
    expected_h = plain / frequencies(replace(arch, rope_scaling=found))
    if divisors_h.shape != expected_h.shape or not np.allclose(divisors_h, expected_h, rtol=1e-3):
        raise ModelError(
            f"{path}: tensor '{DIVISORS}' {list(divisors_h.shape)} does not follow Llama 3's rule "
            f"(factor {found.factor:g}, 8192 positions, low 1, high 4); use the Hugging Face folder"
        )
    return found


def _only(reader: GGUFReader, key: str, values: tuple[Any, ...], path: str | Path) -> None:
    value = metadata(reader, key)
    if value is not None and value not in values:
        raise ModelError(f"{path}: {key}={value!r} is not supported; only {values[-1]!r} is")


def _positive(
    reader: GGUFReader, key: str, path: str | Path, default: float | None = None
) -> float:
    value = metadata(reader, key, default)
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ModelError(f"{path}: metadata {key}={value!r} is not a positive number")
    return float(str(np.float32(value)))
