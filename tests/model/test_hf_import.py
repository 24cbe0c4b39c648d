import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import MOE, write_config, write_model

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.errors import ModelError
from opd_jax.model.hf_tensors import expected_shapes
from opd_jax.model.load import read_model
from opd_jax.model.safetensors_files import SafetensorsSource


def _rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_layout_of_every_kind_of_tensor(tmp_path):
    tensors = write_model(tmp_path)
    _, params = read_model(tmp_path)
    layers = params["layers"]
    one = "model.layers.1."
    for name, ours in (("q", "wq"), ("k", "wk"), ("v", "wv")):
        matrix = tensors[f"{one}self_attn.{name}_proj.weight"]
        rows = np.asarray(layers[ours][1]).reshape(16, -1).T
        np.testing.assert_array_equal(rows, matrix)
    # Row 7 of q_proj is head 1, component 1; column 7 of o_proj likewise.
    q_proj, o_proj = (tensors[f"{one}self_attn.{name}_proj.weight"] for name in "qo")
    np.testing.assert_array_equal(layers["wq"][1, :, 1, 1], q_proj[7])
    np.testing.assert_array_equal(layers["wo"][1, 1, 1], o_proj[:, 7])
    np.testing.assert_array_equal(
        params["dense"]["w_down"][1], tensors[one + "mlp.down_proj.weight"].T
    )
    np.testing.assert_array_equal(layers["q_norm"][1], tensors[one + "self_attn.q_norm.weight"])
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_has_the_tensors_its_checkpoint_has(tmp_path, family, tied):
    tensors = write_model(tmp_path, model_type=family, tie_word_embeddings=tied)
    model, params = read_model(tmp_path)
    assert expected_shapes(model) == {name: array.shape for name, array in tensors.items()}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.abstract()
    )


def test_experts_are_stacked_by_sparse_layer_and_expert(tmp_path):
    tensors = write_model(tmp_path, **MOE, num_hidden_layers=4, mlp_only_layers=[1])
    model, params = read_model(tmp_path)
    assert expected_shapes(model) == {name: array.shape for name, array in tensors.items()}
    for place, layer in enumerate((0, 2, 3)):
        prefix = f"model.layers.{layer}.mlp."
        gate = tensors[prefix + "gate.weight"]
        np.testing.assert_array_equal(params["moe"]["router"][place], gate.T)
        for name, ours in (("gate", "w_gate"), ("up", "w_up"), ("down", "w_down")):
            matrix = tensors[f"{prefix}experts.3.{name}_proj.weight"]
            np.testing.assert_array_equal(params["moe"][ours][place, 3], matrix.T)
    matrix = tensors["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(params["dense"]["w_up"][0], matrix.T)


def test_one_expert_missing_is_named(tmp_path):
    tensors = write_model(tmp_path, **MOE)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    _rewrite(tmp_path, tensors)
    assert "'model.layers.1.mlp.experts.2.up_proj.weight' [10, 16] is missing" in _error(tmp_path)


@pytest.mark.parametrize("mesh", [{"expert": 4}, {"expert": 2, "tensor": 2}], ids=str)
def test_sharded_experts_equal_unsharded(tmp_path, mesh):
    write_model(tmp_path, vocab_size=38, mlp_only_layers=[0], **MOE)
    _, whole = read_model(tmp_path)
    _, sharded = read_model(tmp_path, mesh=make_mesh(MeshConfig(**{"fsdp": 1, **mesh})))
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_dtypes(tmp_path, dtype, stored):
    tensors = write_model(tmp_path, dtype=stored)
    _, params = read_model(tmp_path, dtype)
    expected = tensors["model.embed_tokens.weight"].astype(dtype)
    assert params["embed"].dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(params["embed"]), expected)


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}, {"fsdp": 4}, {"data": 2, "fsdp": 2}])
def test_sharded_equals_unsharded(tmp_path, mesh):
    write_model(tmp_path, vocab_size=38)
    _, whole = read_model(tmp_path)
    model, sharded = read_model(tmp_path, mesh=make_mesh(MeshConfig(**mesh)))
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)
    spec = model.abstract()["layers"]["wq"]
    assert sharded["layers"]["wq"].sharding == spec.sharding


def _split(folder, tensors):
    """Two shards and their index in place of the single file; returns the index's content."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for file, part in {SHARDS[0]: names[:9], SHARDS[1]: names[9:]}.items():
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    _write_index(folder, weight_map)
    return weight_map


def _write_index(folder, weight_map):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
LAST = "model.norm.weight"


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2}])
def test_sharded_files_with_an_index(tmp_path, mesh):
    mesh = mesh and make_mesh(MeshConfig(**mesh))
    tensors = write_model(tmp_path, vocab_size=38)
    _, whole = read_model(tmp_path)
    _split(tmp_path, tensors)
    _, params = read_model(tmp_path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, params, whole)


def test_a_shard_is_gone_or_cut_short(tmp_path):
    _split(tmp_path, write_model(tmp_path))
    path = tmp_path / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: truncated or damaged" in _error(tmp_path)
    path.unlink()
    assert f"{path}: missing" in _error(tmp_path)


def test_index_without_a_map_or_with_a_path_in_it(tmp_path):
    weight_map = _split(tmp_path, write_model(tmp_path))
    _write_index(tmp_path, {})
    assert "index.json: has no weight_map" in _error(tmp_path)
    for file in ("../elsewhere.safetensors", 7):
        _write_index(tmp_path, weight_map | {LAST: file})
        assert f"tensor '{LAST}' is placed in {file!r}" in _error(tmp_path)


def test_index_names_a_tensor_that_its_file_lacks(tmp_path):
    tensors = write_model(tmp_path)
    weight_map = _split(tmp_path, tensors)
    rest = {name: tensors[name] for name, file in weight_map.items() if file == SHARDS[1]}
    del rest[LAST]
    save_file(rest, tmp_path / SHARDS[1])
    assert f"{tmp_path / SHARDS[1]}: tensor '{LAST}' [16] is missing" in _error(tmp_path)


def test_a_file_holds_a_tensor_that_the_index_places_elsewhere_or_nowhere(tmp_path):
    weight_map = _split(tmp_path, write_model(tmp_path))
    _write_index(tmp_path, weight_map | {LAST: SHARDS[0]})
    message = _error(tmp_path)
    assert f"{tmp_path / SHARDS[1]}: tensor '{LAST}' [16] is here" in message
    assert f"places it in {SHARDS[0]}" in message
    _write_index(tmp_path, {name: file for name, file in weight_map.items() if name != LAST})
    assert "does not name it" in _error(tmp_path)


def test_a_shard_that_the_index_does_not_name(tmp_path):
    tensors = write_model(tmp_path)
    _split(tmp_path, tensors)
    stray = tmp_path / "model-00003-of-00003.safetensors"
    save_file({LAST: tensors[LAST]}, stray)
    assert f"{stray}: model.safetensors.index.json does not name this file" in _error(tmp_path)


def test_a_single_file_beside_an_index_of_others(tmp_path):
    tensors = write_model(tmp_path)
    weight_map = _split(tmp_path, tensors)
    single = tmp_path / "model.safetensors"
    _rewrite(tmp_path, {name: array + 1 for name, array in tensors.items()})
    for also in ({}, {LAST: single.name}):
        _write_index(tmp_path, weight_map | also)
        message = _error(tmp_path)
        assert f"{single}: model.safetensors.index.json beside it names other files" in message
        assert "remove the one" in message
    for shard in SHARDS:
        (tmp_path / shard).unlink()
    _write_index(tmp_path, dict.fromkeys(tensors, single.name))
    read_model(tmp_path)


def test_file_that_shrinks_while_it_is_read(tmp_path):
    write_model(tmp_path)
    source = SafetensorsSource(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    last = list(source.shapes())[-1]
    with pytest.raises(ModelError, match=f"{path}: tensor '{last}' .* ends early"):
        source.read(last, 0, source.shapes()[last][0])


def test_tied_head_may_be_stored_but_not_differ(tmp_path):
    tensors = write_model(tmp_path, tie_word_embeddings=True)
    head = tensors["model.embed_tokens.weight"].copy()
    _rewrite(tmp_path, tensors | {"lm_head.weight": head})
    _, params = read_model(tmp_path)
    assert "head" not in params
    head[0, 0] += 1
    _rewrite(tmp_path, tensors | {"lm_head.weight": head})
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        read_model(tmp_path)


def _error(folder):
    with pytest.raises(ModelError) as caught:
        read_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_tensor_is_named_with_its_shape(tmp_path):
    tensors = write_model(tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    _rewrite(tmp_path, tensors)
    message = _error(tmp_path)
    assert "'model.layers.1.mlp.up_proj.weight' [24, 16] is missing" in message
    assert str(tmp_path) in message


def test_extra_tensor_is_named(tmp_path):
    tensors = write_model(tmp_path)
    _rewrite(tmp_path, tensors | {"model.layers.2.mlp.up_proj.weight": np.zeros((24, 16), "f4")})
    message = _error(tmp_path)
    assert "model.safetensors: tensor 'model.layers.2.mlp.up_proj.weight' [24, 16]" in message


def test_old_rope_buffers_are_ignored(tmp_path):
    tensors = write_model(tmp_path)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, "f4")}
    _rewrite(tmp_path, tensors | buffer)
    read_model(tmp_path)


def test_misshaped_tensor_is_named_with_both_shapes(tmp_path):
    write_model(tmp_path)
    write_config(tmp_path, vocab_size=40)
    message = _error(tmp_path)
    assert "model.safetensors: tensor 'model.embed_tokens.weight' has shape [37, 16]" in message
    assert "[40, 16]" in message


@pytest.mark.parametrize("kept", [4, 200, -1])
def test_truncated_file(tmp_path, kept):
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path}: truncated or damaged" in _error(tmp_path)


def _shard_on_its_own(path):
    """Two tensors of 48 and 16 bytes whose names do not sort as they lie."""
    save_file({"b": np.zeros((3, 4), "f4"), "a": np.zeros(8, "f2")}, path)
    assert SafetensorsSource(path.parent).shapes() == {"b": (3, 4), "a": (8,)}
    return path.stat().st_size


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (1, "tensor 'a' [8] has 16 bytes, 15 of them are here"),
        (16, "tensor 'a' [8] has 16 bytes, 0 of them are here"),
        (17, "tensor 'b' [3, 4] has 48 bytes, 47 of them are here"),
        (64, "tensor 'b' [3, 4] has 48 bytes, 0 of them are here"),
    ],
)
def test_the_first_tensor_that_is_cut_off_is_named(tmp_path, lost, words):
    path = tmp_path / "model.safetensors"
    size = _shard_on_its_own(path)
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(ModelError) as caught:
        SafetensorsSource(tmp_path)
    assert str(caught.value) == (
        f"{path}: truncated or damaged safetensors ({words}; "
        f"the file has {size - lost} bytes of {size}); copy the file again"
    )


@pytest.mark.parametrize(
    "header", [b"[1]", b"{", b'{"a": 1}', b'{"a": {"data_offsets": [0, 4]}}', b'{"a": {}}']
)
def test_a_header_that_is_none_is_damaged(tmp_path, header):
    path = tmp_path / "model.safetensors"
    for length in (len(header), 2**63):
        path.write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(ModelError, match=f"{path}: truncated or damaged") as caught:
            SafetensorsSource(tmp_path)
        assert "are here" not in str(caught.value)


def test_integer_tensor_is_refused(tmp_path):
    tensors = write_model(tmp_path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    _rewrite(tmp_path, tensors)
    assert "'model.norm.weight' is I8" in _error(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    assert "pytorch_model.bin is pickled" in _error(tmp_path)


def test_missing_folder(tmp_path):
    assert "no such model folder" in _error(tmp_path / "nowhere")
