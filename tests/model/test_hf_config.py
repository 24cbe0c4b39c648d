import json

import pytest
from tiny_models import CONFIG, MOE, write_config

from opd_jax.errors import ModelError
from opd_jax.model.hf_config import architecture_from_hf, architecture_to_hf, read_architecture


def test_reads_what_transformers_5_writes(tmp_path):
    write_config(tmp_path)
    arch = read_architecture(tmp_path)
    assert (arch.family, arch.vocab_size, arch.embed_dim, arch.ffn_dim) == ("qwen3", 37, 16, 24)
    assert (arch.num_layers, arch.num_heads, arch.num_kv_heads, arch.head_dim) == (2, 4, 2, 6)
    assert (arch.rope_theta, arch.norm_eps, arch.max_position) == (5000.0, 1e-6, 64)
    assert arch.qk_norm
    assert not arch.qkv_bias
    assert not arch.tie_embeddings


def test_reads_what_transformers_4_writes(tmp_path):
    write_config(tmp_path, rope_parameters=None, rope_theta=7000.0, rope_scaling=None)
    assert read_architecture(tmp_path).rope_theta == 7000.0


@pytest.mark.parametrize(
    ("family", "bias", "norm", "head_dim"),
    [("llama", False, False, 4), ("qwen2", True, False, 4), ("qwen3", False, True, 128)],
)
def test_family_decides_switches_and_default_head_dim(tmp_path, family, bias, norm, head_dim):
    write_config(tmp_path, model_type=family, head_dim=None)
    arch = read_architecture(tmp_path)
    assert (arch.qkv_bias, arch.qk_norm, arch.head_dim) == (bias, norm, head_dim)


def test_class_name_stands_in_for_a_missing_model_type(tmp_path):
    write_config(tmp_path, model_type=None)
    assert read_architecture(tmp_path).family == "qwen3"


def test_left_out_kv_heads_mean_query_heads_for_llama_only(tmp_path):
    write_config(tmp_path, model_type="llama", num_key_value_heads=None)
    assert read_architecture(tmp_path).num_kv_heads == 4
    write_config(tmp_path, num_key_value_heads=None)
    with pytest.raises(ModelError, match="num_key_value_heads=None"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, ["'mamba'", "llama, qwen2, qwen3"]),
        ({"model_type": "mixtral"}, ["'mixtral'", "qwen3_moe"]),
        ({"num_experts": 8}, ["num_experts=8"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        ({"attention_bias": True}, ["attention_bias=True"]),
        ({"mlp_bias": True}, ["mlp_bias=True"]),
        ({"transformers_weights": "b.safetensors"}, ["transformers_weights='b.safetensors'"]),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            ["partial_rotary_factor=0.5"],
        ),
        ({"use_sliding_window": True, "max_window_layers": 1}, ["sliding-window"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding-window"]),
        ({"attention_dropout": 0.1}, ["attention_dropout=0.1", "0.0"]),
        ({"is_causal": False}, ["is_causal=False", "True"]),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, ["per_layer_config={'1'"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8"]),
        ({"hidden_size": None}, ["hidden_size=None"]),
        ({"vocab_size": 0}, ["vocab_size=0"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"head_dim": 5}, ["head_dim=5"]),
        ({"model_type": "llama", "head_dim": None, "hidden_size": 18}, ["hidden_size=18"]),
    ],
)
def test_refuses_by_name_what_would_change_the_numbers(tmp_path, changes, words):
    write_config(tmp_path, **changes)
    with pytest.raises(ModelError) as caught:
        read_architecture(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "config.json") in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_sliding_window_that_no_layer_uses_is_fine(tmp_path):
    write_config(tmp_path, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert read_architecture(tmp_path).num_layers == 2


@pytest.mark.parametrize(
    "ignored", [{"max_window_layers": 2}, {"layer_types": ["full_attention"] * 2}], ids=str
)
@pytest.mark.parametrize("window", [{}, {"sliding_window": 8}], ids=str)
def test_a_mixture_slides_in_every_layer_once_it_is_switched_on(tmp_path, ignored, window):
    """As modeling_qwen3_moe.py, which looks at `sliding_window` alone."""
    write_config(tmp_path, **MOE, use_sliding_window=True, **window, **ignored)
    with pytest.raises(ModelError, match=r"config\.json: sliding-window attention"):
        read_architecture(tmp_path)
    write_config(tmp_path, **MOE, use_sliding_window=False, **window, **ignored)
    assert read_architecture(tmp_path).num_layers == 2


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_broken_config_is_one_line_with_the_path(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        read_architecture(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_missing_config(tmp_path):
    with pytest.raises(ModelError, match="nowhere: no such model folder"):
        read_architecture(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json: missing"):
        read_architecture(tmp_path)


def test_reads_the_experts_of_either_generation(tmp_path):
    write_config(tmp_path, **MOE, num_hidden_layers=5, decoder_sparse_step=2)
    arch = read_architecture(tmp_path)
    assert (arch.num_experts, arch.experts_per_token, arch.expert_ffn_dim) == (4, 2, 10)
    assert (arch.sparse_layers, arch.dense_layers) == ((1, 3), (0, 2, 4))
    assert arch.qk_norm
    assert arch.norm_topk_prob
    renamed = {"num_experts": None, "num_local_experts": 4, "norm_topk_prob": None}
    write_config(tmp_path, **MOE | renamed, mlp_only_layers=[1])
    arch = read_architecture(tmp_path)
    assert (arch.num_experts, arch.sparse_layers, arch.norm_topk_prob) == (4, (0,), False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": None}, ["num_experts=None"]),
        ({"num_experts_per_tok": 5}, ["num_experts_per_tok=5", "num_experts=4"]),
        ({"moe_intermediate_size": 0}, ["moe_intermediate_size=0"]),
        ({"decoder_sparse_step": 0}, ["decoder_sparse_step=0"]),
        ({"mlp_only_layers": [2]}, ["mlp_only_layers=[2]", "below 2"]),
        ({"norm_topk_prob": "yes"}, ["norm_topk_prob='yes'"]),
    ],
)
def test_refuses_experts_that_make_no_sense(tmp_path, changes, words):
    write_config(tmp_path, **MOE | changes)
    with pytest.raises(ModelError) as caught:
        read_architecture(tmp_path)
    for word in [str(tmp_path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("only", [[], [1], [0, 1]])
def test_a_mixture_is_written_and_read_back(only):
    arch = architecture_from_hf(CONFIG | MOE | {"mlp_only_layers": only}, "here")
    written = json.loads(json.dumps(architecture_to_hf(arch)))
    assert architecture_from_hf(written, "there") == arch
    assert written["architectures"] == ["Qwen3MoeForCausalLM"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_written_config_reads_back_as_the_same_architecture(family, tied):
    config = CONFIG | {"model_type": family, "tie_word_embeddings": tied}
    arch = architecture_from_hf(config, "here")
    written = architecture_to_hf(arch, {"eos_token_id": [1, 2]})
    assert architecture_from_hf(json.loads(json.dumps(written)), "there") == arch
    assert written["eos_token_id"] == [1, 2]
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5000.0


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": None},
        {"max_position_embeddings": "long"},
        {"rms_norm_eps": None},
        {"rms_norm_eps": "1e-6"},
        {"tie_word_embeddings": "yes"},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_named(changes):
    ((key, value),) = changes.items()
    with pytest.raises(ModelError, match=rf"here: {key}={value!r} is (not|neither)"):
        architecture_from_hf(CONFIG | changes, "here")


@pytest.mark.parametrize(("family", "positions"), [("llama", 2048), ("qwen3", 32768)])
def test_positions_that_are_left_out_are_transformers_default(family, positions):
    config = CONFIG | {"model_type": family}
    config.pop("max_position_embeddings", None)
    assert architecture_from_hf(config, "here").max_position == positions
