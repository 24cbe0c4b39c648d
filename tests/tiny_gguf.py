"""Writes the tiny checkpoints as GGUF files, in the way llama.cpp's converter does."""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from tiny_models import CONFIG, random_tensors
from tiny_tokenizers import MERGES, PLAIN, SPECIAL, TEMPLATE, tokens

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate.": "ffn_gate_inp.",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}
# Where the float16 scales of a block of 256 lie; the package cannot quantise to these kinds.
K_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
K_SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
# Other quantised rows come in blocks of 32.
SIZES = {"vocab_size": 280, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """As convert_hf_to_gguf.py's LlamaModel.permute."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def write_gguf(
    path: Path,
    kind: str = "F32",
    extra: dict | None = None,
    divisors: object = None,
    **changes: object,
) -> dict[str, np.ndarray]:
    """A tiny model with its tokenizer; returns the tensors as they were before quantisation.

    The blocks of a K-quant are random bytes, and what is returned has nothing to do with them.
    """
    config = CONFIG | SIZES | changes
    tensors = random_tensors(config)
    writer = GGUFWriter(path, config["model_type"].replace("_", ""))
    _metadata(writer, config)
    add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    add[bool] = writer.add_bool
    for key, value in (extra or {}).items():
        add[type(value)](key, value)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(divisors, np.float32))
    for name, array in stack_experts(tensors).items():
        stored = GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        if stored.name in K_SCALES:
            data = random_blocks(stored, array.shape)
        else:
            data = quantize(_arranged(name, array, config), stored)
        writer.add_tensor(gguf_name(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def stack_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All experts of a layer's matrix as one tensor, under llama.cpp's name for it."""
    stacked: dict[str, list[np.ndarray] | np.ndarray] = {}
    for name, array in tensors.items():
        before, found, after = name.partition("mlp.experts.")
        if not found:
            stacked[name] = array
            continue
        kind = after.split(".")[1].removesuffix("_proj")
        stacked.setdefault(f"{before}ffn_{kind}_exps.weight", []).append(array)
    return {name: np.asarray(arrays) for name, arrays in stacked.items()}


def random_blocks(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of valid blocks: any bytes, and scales of a sane size."""
    rng = np.random.default_rng(shape[0])
    size, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // size, block_bytes), np.uint8)
    for at in K_SCALES[kind.name]:
        scales = rng.uniform(-0.01, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def _arranged(name: str, array: np.ndarray, config: dict) -> np.ndarray:
    if config["model_type"] == "llama" and "q_proj" in name:
        return permute(array, config["num_attention_heads"])
    if config["model_type"] == "llama" and "k_proj" in name:
        return permute(array, config["num_key_value_heads"])
    return array


def _metadata(writer: GGUFWriter, config: dict) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    kinds = dict.fromkeys(SPECIAL, TokenType.CONTROL)
    kinds |= dict.fromkeys(PLAIN, TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(config.get("tokenizer_pre", "smollm"))  # an empty one is left out
    writer.add_token_list(tokens())
    writer.add_token_types([kinds.get(token, TokenType.NORMAL) for token in tokens()])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(tokens().index("<|end|>"))
    writer.add_eot_token_id(tokens().index("<|stop|>"))
    writer.add_chat_template(TEMPLATE)
