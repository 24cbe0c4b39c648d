"""What distinguishes one decoder from another: sizes and switches, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]
RopeKind = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched for long contexts; `model.rope` has the formulas."""

    kind: RopeKind
    factor: float
    original_max_position: int = 0
    """llama3, yarn: positions before the stretch."""
    low_freq_factor: float = 1.0
    """llama3."""
    high_freq_factor: float = 4.0
    """llama3."""
    beta_fast: float = 32.0
    """yarn."""
    beta_slow: float = 1.0
    """yarn."""
    attention_factor: float = 1.0
    """yarn: multiplies cos and sin."""
    truncate: bool = True
    """yarn: whole dimensions as the ends of the ramp."""


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder of the Llama, Qwen2, Qwen3 or Qwen3-MoE family."""

    family: Family
    vocab_size: int
    embed_dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_position: int
    rope_scaling: RopeScaling | None = None
    sparse_layers: tuple[int, ...] = ()
    """Layers, ascending, whose MLP is a mixture of experts; the others have one of `ffn_dim`."""
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_dim: int = 0
    norm_topk_prob: bool = False
    """The chosen experts' weights are divided by their sum."""

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers with one MLP for all tokens."""
        sparse = set(self.sparse_layers)
        return tuple(layer for layer in range(self.num_layers) if layer not in sparse)
