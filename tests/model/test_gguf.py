import sys

import jax
import numpy as np
import oracles
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from tiny_gguf import K_SCALES, K_SIZES, write_gguf
from tiny_models import MOE, write_config, write_model

from opd_jax.config import MeshConfig
from opd_jax.core import gguf_file
from opd_jax.core.mesh import make_mesh
from opd_jax.errors import ModelError
from opd_jax.model import streaming
from opd_jax.model.load import architecture_of, read_model
from opd_jax.model.rope import frequencies


def _hf_model(folder, **changes):
    write_model(
        folder, vocab_size=280, hidden_size=64, intermediate_size=96, head_dim=16, **changes
    )
    return read_model(folder)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_same_model_as_the_hugging_face_folder(tmp_path, family, tied):
    changes = {"model_type": family, "tie_word_embeddings": tied}
    write_gguf(tmp_path / "m.gguf", **changes)
    model, params = read_model(tmp_path / "m.gguf")
    expected_model, expected = _hf_model(tmp_path / "hf", **changes)
    assert model == expected_model
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_experts_of_a_stacked_tensor_are_the_folders(tmp_path, kind):
    moe = MOE | {"moe_intermediate_size": 32}
    write_gguf(tmp_path / "m.gguf", kind, **moe)
    model, params = read_model(tmp_path / "m.gguf")
    expected_model, expected = _hf_model(tmp_path / "hf", **moe)
    assert model == expected_model
    step = 0 if kind == "F32" else 0.02
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=step), params, expected)


def test_rope_scaling_is_the_folders(tmp_path):
    def scaling(extra, divisors=None):
        write_gguf(tmp_path / "m.gguf", extra=extra, divisors=divisors, model_type="llama")
        return architecture_of(tmp_path / "m.gguf").rope_scaling

    def of_folder(**keys):
        write_config(tmp_path, rope_parameters={"rope_theta": 5000.0, **keys}, head_dim=16)
        return architecture_of(tmp_path)

    key = "llama.rope.scaling."
    assert scaling({}) is None
    linear = of_folder(rope_type="linear", factor=2.5).rope_scaling
    assert scaling({key + "type": "linear", key + "factor": 2.5}) == linear
    assert scaling({key + "factor": 2.5}) == linear
    length = {"original_max_position_embeddings": 32}
    yarn = of_folder(rope_type="yarn", factor=4.0, **length).rope_scaling
    stored = {key + "type": "yarn", key + "factor": 4.0, key + "original_context_length": 32}
    assert scaling(stored) == yarn
    sharper = scaling({**stored, key + "attn_factor": 0.5}).attention_factor
    assert sharper == pytest.approx(yarn.attention_factor / 2)
    llama3 = of_folder(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    # 5000^(-7/8) turns 0.75 times in 8192 positions: the last divisor is the factor.
    divisors = 5000.0 ** (-np.arange(8) / 8) / frequencies(llama3)
    assert scaling({}, divisors) == llama3.rope_scaling


# Largest error of a weight in units of the largest weight of its block of 32: half a step, and for
# the quantised kinds the rounding of the block's scale to float16.
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("F16", 2**-11),
        ("BF16", 2**-8),
        ("Q8_0", 1 / 254 + 2**-11),
        ("Q4_0", 1 / 7),
        ("Q4_1", 1 / 14),
        ("Q5_0", 1 / 15),
        ("Q5_1", 1 / 30),
    ],
)
def test_quantised_weights_are_the_original_within_their_step(tmp_path, kind, error):
    tensors = write_gguf(tmp_path / "m.gguf", kind, model_type="llama")
    _, params = read_model(tmp_path / "m.gguf")
    for layer in range(2):
        for name, ours in (("k_proj", "wk"), ("v_proj", "wv")):
            matrix = tensors[f"model.layers.{layer}.self_attn.{name}.weight"]
            got = np.asarray(params["layers"][ours][layer]).reshape(64, -1).T
            scale = np.abs(matrix).reshape(len(matrix), -1, 32).max(axis=-1, keepdims=True)
            off = np.abs(got - matrix).reshape(len(matrix), -1, 32) / scale
            assert 0 < off.max() <= error * 1.02


def _stored(path):
    """Bytes and kind of every tensor, by the package's own reader."""
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", K_SCALES)
def test_k_quants_by_the_format_description(tmp_path, kind):
    write_gguf(tmp_path / "m.gguf", kind, **K_SIZES)
    _, params = read_model(tmp_path / "m.gguf")
    rows = _stored(tmp_path / "m.gguf")["blk.1.attn_v.weight"].data
    got = np.asarray(params["layers"]["wv"][1]).reshape(256, -1).T
    one_block = getattr(oracles, f"ggml_{kind.lower()}")
    expected = [one_block([int(byte) for byte in row]) for row in rows]
    assert got.shape == (128, 256)
    assert np.abs(got).max() > 1e-3
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *K_SCALES])
def test_every_kind_as_the_package_reads_it(tmp_path, monkeypatch, kind, family):
    monkeypatch.setattr(streaming, "ROWS_BYTES", 3 * 256 * 4)
    write_gguf(tmp_path / "m.gguf", kind, model_type=family, **K_SIZES)
    _, params = read_model(tmp_path / "m.gguf")
    for name, ours in OURS.items():
        tensor = _stored(tmp_path / "m.gguf")[name]
        expected = dequantize(tensor.data, tensor.tensor_type)
        if family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            # Pairs (0, 1), (2, 3) ... of a head of 64 are our (0, 32), (1, 33) ...
            order = np.concatenate([np.arange(0, 64, 2), np.arange(1, 64, 2)])
            expected = expected.reshape(-1, 64, 256)[:, order].reshape(expected.shape)
        np.testing.assert_array_equal(ours(params), expected)


def _matrix(stack, name):
    return lambda params: np.asarray(params[stack][name][1]).reshape(256, -1).T


OURS = {
    "token_embd.weight": lambda params: params["embed"],
    "output.weight": lambda params: params["head"],
    "blk.1.attn_q.weight": _matrix("layers", "wq"),
    "blk.1.attn_k.weight": _matrix("layers", "wk"),
    "blk.1.attn_output.weight": _matrix("layers", "wo"),
    "blk.1.ffn_down.weight": _matrix("dense", "w_down"),
}


def test_sharded_equals_unsharded(tmp_path):
    write_gguf(tmp_path / "m.gguf", "Q8_0")
    _, whole = read_model(tmp_path / "m.gguf")
    _, cut = read_model(tmp_path / "m.gguf", mesh=make_mesh(MeshConfig(fsdp=2, tensor=2)))
    jax.tree.map(np.testing.assert_array_equal, cut, whole)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("F32", {"model_type": "falcon"}, ["'falcon'", "llama, qwen2, qwen3"]),
        ("F32", {"extra": {"qwen3.rope.scaling.type": "longrope"}}, ["scaling.type='longrope'"]),
        ("F32", {"extra": {"qwen3.rope.scaling.type": "yarn"}}, ["rope.scaling.factor=None"]),
        (
            "F32",
            {
                "extra": {
                    "qwen3.rope.scaling.type": "yarn",
                    "qwen3.rope.scaling.factor": 2.0,
                    "qwen3.rope.scaling.yarn_log_multiplier": 0.1,
                }
            },
            ["yarn_log_multiplier=0.1"],
        ),
        ("F32", {"extra": {"qwen3.rope.dimension_count": 8}}, ["dimension_count=8", "16"]),
        ("F32", {"extra": {"qwen3.expert_count": 8}}, ["qwen3.expert_count=8"]),
        ("F32", {"divisors": [1.0, 2.0] * 4}, ["'rope_freqs.weight' [8]", "Llama 3's rule"]),
        (
            "F32",
            {"divisors": [1.0] * 8, "extra": {"qwen3.rope.scaling.factor": 2.0}},
            ["scaling.type='linear'", "'rope_freqs.weight'"],
        ),
        ("MXFP4", {}, ["'token_embd.weight' is stored as MXFP4", "Q4_1", "Q6_K"]),
        ("F32", {"num_hidden_layers": 0}, ["qwen3.block_count=0"]),
    ],
)
def test_refuses_by_name(tmp_path, kind, changes, words):
    path = tmp_path / "m.gguf"
    write_gguf(path, kind, **changes)
    with pytest.raises(ModelError) as caught:
        read_model(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 100, 20000, -40])
def test_truncated_file(tmp_path, kept):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match="truncated") as caught:
        read_model(path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ModelError, match="no such GGUF file"):
        architecture_of(tmp_path / "m.gguf")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    gguf_file._open.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'opd_jax\[gguf\]'"):
        architecture_of(tmp_path / "m.gguf")
