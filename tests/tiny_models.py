"""Tiny random checkpoints, written by hand: no transformers, no torch."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
}

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "norm_topk_prob": True,
}
"""What turns the tiny Qwen3 into a mixture of experts."""


def hf_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a Hugging Face checkpoint, independent of the table under test."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h = config["head_dim"]
    q, k = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    yield "model.embed_tokens.weight", (v, d)
    yield "model.norm.weight", (d,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (v, d)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (d,)
        yield prefix + "post_attention_layernorm.weight", (d,)
        for name, out in (("q", q), ("k", k), ("v", k)):
            yield f"{prefix}self_attn.{name}_proj.weight", (out, d)
            if config["model_type"] == "qwen2":
                yield f"{prefix}self_attn.{name}_proj.bias", (out,)
        yield prefix + "self_attn.o_proj.weight", (d, q)
        if config["model_type"].startswith("qwen3"):
            yield prefix + "self_attn.q_norm.weight", (h,)
            yield prefix + "self_attn.k_norm.weight", (h,)
        if config["model_type"] == "qwen3_moe" and layer not in config.get("mlp_only_layers", ()):
            yield prefix + "mlp.gate.weight", (config["num_experts"], d)
            for expert in range(config["num_experts"]):
                inner = config["moe_intermediate_size"]
                yield from _mlp(f"{prefix}mlp.experts.{expert}.", d, inner)
        else:
            yield from _mlp(prefix + "mlp.", d, f)


def _mlp(prefix: str, d: int, f: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (f, d)
    yield prefix + "up_proj.weight", (f, d)
    yield prefix + "down_proj.weight", (d, f)


def random_tensors(config: dict, dtype: object = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: (rng.normal(size=shape) * 0.3).astype(dtype) for name, shape in hf_shapes(config)}


def write_config(folder: Path, **changes: object) -> dict:
    """A config.json of a tiny Qwen3 with some keys changed; None takes a key out."""
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return config


def write_model(folder: Path, dtype: object = np.float32, **changes: object) -> dict:
    """A whole checkpoint; returns its tensors."""
    tensors = random_tensors(write_config(folder, **changes), dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors
