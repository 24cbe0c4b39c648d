"""Between a Hugging Face `config.json` and an `Architecture`.

What would change the numbers and is not built here is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from opd_jax.errors import ModelError
from opd_jax.model.architecture import Architecture, Family
from opd_jax.model.hf_rope import rope_from_hf, rope_to_hf

FAMILIES: tuple[Family, ...] = get_args(Family)
_CLASS_NAMES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# Where config.json leaves it out, transformers' default.
_POSITIONS: dict[Family, int] = {
    "llama": 2048,
    "qwen2": 32768,
    "qwen3": 32768,
    "qwen3_moe": 32768,
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture that `folder/config.json` describes, as transformers 4 or 5 wrote it.

    Raises:
        ModelError: no folder, no or broken config.json, an unknown family or unsupported feature.
    """
    where = config_path(folder)
    return architecture_from_hf(read_json(where), str(where))


def config_path(folder: str | Path) -> Path:
    """The config.json of a model folder; raises ModelError when there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: no such model folder; give a Hugging Face folder or a .gguf file"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{path}: missing; a Hugging Face model folder needs its config.json")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises ModelError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read as JSON ({error}); copy the model folder again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, not a JSON object")
    return value


def architecture_from_hf(config: Mapping[str, Any], where: str) -> Architecture:
    """Checks and converts the content of a config.json; `where` names it in errors."""
    family = _family(config, where)
    for key in _REQUIRED:
        _positive(config.get(key), key, where)
    _refuse_unsupported(config, family, where)
    heads = config["num_attention_heads"]
    kv_heads = _kv_heads(config, family, where)
    if heads % kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
        )
    rope_theta, rope_scaling = rope_from_hf(config, where)
    return Architecture(
        family=family,
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        ffn_dim=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(config, family, where),
        rope_theta=rope_theta,
        norm_eps=_norm_eps(config, where),
        tie_embeddings=_switch(config, "tie_word_embeddings", where),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        max_position=_positive(
            config.get("max_position_embeddings", _POSITIONS[family]),
            "max_position_embeddings",
            where,
        ),
        rope_scaling=rope_scaling,
        **(_experts(config, where) if family == "qwen3_moe" else {}),
    )


def architecture_to_hf(
    arch: Architecture, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read, with `extra` (token ids) laid over it."""
    config: dict[str, Any] = {
        "architectures": [_CLASS_NAMES[arch.family]],
        "model_type": arch.family,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.embed_dim,
        "intermediate_size": arch.ffn_dim,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": arch.max_position,
        "rms_norm_eps": arch.norm_eps,
        **rope_to_hf(arch),
        "tie_word_embeddings": arch.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if arch.family != "qwen2":
        config["attention_bias"] = False
    if arch.family == "llama":
        config["mlp_bias"] = False
    else:
        config |= {"use_sliding_window": False, "sliding_window": None}
    if arch.family == "qwen3_moe":
        config |= _experts_to_hf(arch)
    return config | dict(extra or {})


def _family(config: Mapping[str, Any], where: str) -> Family:
    name = config.get("model_type")
    for family in FAMILIES:
        if name == family or (
            name is None and config.get("architectures") == [_CLASS_NAMES[family]]
        ):
            return family
    named = name if name is not None else config.get("architectures")
    raise ModelError(
        f"{where}: architecture {named!r} is not supported; supported: {', '.join(FAMILIES)}"
    )


def _experts(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The mixture's part of an `Architecture`; transformers 5 may call experts local ones."""
    count = config.get("num_experts", config.get("num_local_experts"))
    experts = _positive(count, "num_experts", where)
    chosen = _positive(config.get("num_experts_per_tok"), "num_experts_per_tok", where)
    if chosen > experts:
        raise ModelError(f"{where}: num_experts_per_tok={chosen} is above num_experts={experts}")
    step = _positive(config.get("decoder_sparse_step", 1), "decoder_sparse_step", where)
    dense, depth = config.get("mlp_only_layers") or [], config["num_hidden_layers"]
    if not isinstance(dense, list) or any(layer not in range(depth) for layer in dense):
        raise ModelError(
            f"{where}: mlp_only_layers={_short(dense)} is not a list of layers below {depth}"
        )
    return {
        "sparse_layers": tuple(
            layer for layer in range(depth) if (layer + 1) % step == 0 and layer not in dense
        ),
        "num_experts": experts,
        "experts_per_token": chosen,
        "expert_ffn_dim": _positive(
            config.get("moe_intermediate_size"), "moe_intermediate_size", where
        ),
        "norm_topk_prob": _switch(config, "norm_topk_prob", where),
    }


def _experts_to_hf(arch: Architecture) -> dict[str, Any]:
    return {
        "num_experts": arch.num_experts,
        "num_experts_per_tok": arch.experts_per_token,
        "moe_intermediate_size": arch.expert_ffn_dim,
        "norm_topk_prob": arch.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(arch.dense_layers),
    }


def _positive(value: Any, key: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{where}: {key}={value!r} is not a positive integer")
    return value


def _switch(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise ModelError(f"{where}: {key}={value!r} is neither true nor false")
    return bool(value)


def _norm_eps(config: Mapping[str, Any], where: str) -> float:
    value = config.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ModelError(f"{where}: rms_norm_eps={value!r} is not a number from 0 to 1")
    return float(value)


def _refuse_unsupported(config: Mapping[str, Any], family: Family, where: str) -> None:
    allowed = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,) if family != "qwen2" else (False, True),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1, 1.0),
        # Only in training, but a student of it would train otherwise than the file says.
        "attention_dropout": (0.0,),
        # transformers 5 reads these in every family.
        "is_causal": (True,),
        "per_layer_config": ({},),
        "transformers_weights": ("model.safetensors", "model.safetensors.index.json"),
        "quantization_config": (),
    }
    if family != "qwen3_moe":
        allowed |= {"num_experts": (0,), "num_local_experts": (0,)}
    for key, values in allowed.items():
        value = config.get(key)
        if value is not None and value not in values:
            usual = f"; only {values[0]!r} is" if values else "; give the unquantised weights"
            raise ModelError(f"{where}: {key}={_short(value)} is not supported{usual}")
    _refuse_sliding_window(config, family, where)


def _refuse_sliding_window(config: Mapping[str, Any], family: Family, where: str) -> None:
    layers = config.get("layer_types")
    slides = config.get("use_sliding_window", False) and (
        config.get("sliding_window", 4096) is not None
    )
    # Qwen3-MoE knows none of these keys: there the switch makes every layer slide.
    if family != "qwen3_moe":
        slides = slides and layers is None
        slides = slides and config.get("max_window_layers", 28) < config["num_hidden_layers"]
    if slides or any(kind != "full_attention" for kind in layers or ()):
        raise ModelError(
            f"{where}: sliding-window attention (sliding_window={config.get('sliding_window')!r}, "
            "layer_types) is not supported; only full attention is"
        )


def _kv_heads(config: Mapping[str, Any], family: Family, where: str) -> int:
    """Null means as many as query heads. Left out, it means so for Llama; Qwen must write it."""
    kv_heads = config.get("num_key_value_heads")
    if kv_heads is None and (family == "llama" or "num_key_value_heads" in config):
        return config["num_attention_heads"]
    return _positive(kv_heads, "num_key_value_heads", where)


def _head_dim(config: Mapping[str, Any], family: Family, where: str) -> int:
    """As transformers: written, else 128 for Qwen3, else width over heads."""
    head_dim = config.get("head_dim")
    if head_dim is None and family == "qwen3":
        return 128
    if head_dim is None:
        if config["hidden_size"] % config["num_attention_heads"]:
            raise ModelError(
                f"{where}: hidden_size={config['hidden_size']} is no multiple of "
                f"num_attention_heads={config['num_attention_heads']} and head_dim is missing"
            )
        return config["hidden_size"] // config["num_attention_heads"]
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise ModelError(f"{where}: head_dim={head_dim!r} is not a positive even integer")
    return head_dim


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
