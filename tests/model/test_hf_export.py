import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import MOE, write_model

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.errors import ModelError
from opd_jax.model import hf_export
from opd_jax.model.hf_export import export_folder, plan_shards
from opd_jax.model.load import read_model


class FakeTokenizer:
    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")
        (folder / "generation_config.json").write_text('{"eos_token_id": [7], "top_p": 0.9}')


class BrokenTokenizer:
    def save(self, folder):
        raise ModelError("no tokenizer")


def _export(folder, model, params, tokenizer=None):
    card = {"README.md": "# Card\n"}
    export_folder(folder, model, params, tokenizer or FakeTokenizer(), card, {"top_p": 1.0})


def _bytes(folder):
    """Dtype, shape and bytes of every tensor in every file."""
    return {
        name: (array.dtype, array.shape, array.tobytes())
        for path in sorted(folder.glob("*.safetensors"))
        for name, array in load_file(path).items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_is_bit_identical(tmp_path, family, tied, dtype):
    changes = {"model_type": family, "tie_word_embeddings": tied}
    tensors = write_model(tmp_path / "in", jnp.dtype(dtype), **changes)
    _export(tmp_path / "out", *read_model(tmp_path / "in", dtype))
    assert _bytes(tmp_path / "out").keys() == tensors.keys()
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "in")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_in_shards_by_way_of_a_mesh(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(hf_export, "SHARD_BYTES", 3000)
    write_model(tmp_path / "in", jnp.dtype(dtype), vocab_size=38)
    _export(tmp_path / "cut", *read_model(tmp_path / "in", dtype))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    _export(tmp_path / "again", *read_model(tmp_path / "cut", dtype, mesh=mesh))
    for name in ("cut", "again"):
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
        assert _bytes(tmp_path / name) == _bytes(tmp_path / "in")


def test_host_memory_is_a_tensor_not_a_shard(tmp_path):
    write_model(tmp_path / "in", num_hidden_layers=16, hidden_size=128, intermediate_size=256)
    model, params = read_model(tmp_path / "in")
    _export(tmp_path / "out", model, params)
    tracemalloc.start()
    _export(tmp_path / "out", model, params)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 128 * 256 * 4 + 2**19 < 16 * 128 * 256 * 4


@pytest.mark.parametrize("mesh", [None, {"expert": 2, "tensor": 2}], ids=str)
def test_experts_there_and_back_are_bit_identical(tmp_path, mesh):
    changes = {**MOE, "num_hidden_layers": 3, "mlp_only_layers": [1], "vocab_size": 38}
    tensors = write_model(tmp_path / "in", **changes)
    placed = mesh and make_mesh(MeshConfig(**{"fsdp": 1, **mesh}))
    _export(tmp_path / "out", *read_model(tmp_path / "in", mesh=placed))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, array in tensors.items():
        assert written[name].tobytes() == array.tobytes(), name


def test_sharded_parameters_and_bfloat16(tmp_path):
    tensors = write_model(tmp_path / "in", vocab_size=38)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    model, params = read_model(tmp_path / "in", "bfloat16", mesh=mesh)
    _export(tmp_path / "out", model, params)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array.astype(written[name].dtype))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_companions(tmp_path):
    write_model(tmp_path / "in")
    _export(tmp_path / "out", *read_model(tmp_path / "in"))
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [7], "top_p": 1.0}
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [7]
    assert (out / "README.md").read_text() == "# Card\n"


def test_large_models_are_split_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_export, "SHARD_BYTES", 4000)
    write_model(tmp_path / "in")
    model, params = read_model(tmp_path / "in")
    _export(tmp_path / "out", model, params)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    _, again = read_model(out)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_plan_cuts_before_the_limit_and_lets_a_giant_stand_alone():
    shapes = {"a": (4,), "b": (4,), "c": (20,), "d": (1,)}
    assert plan_shards(shapes, 2, 16) == [["a", "b"], ["c"], ["d"]]


def test_an_existing_folder_is_replaced_only_by_a_complete_one(tmp_path):
    write_model(tmp_path / "in")
    model, params = read_model(tmp_path / "in")
    out = tmp_path / "out"
    _export(out, model, params)
    (out / "stale.txt").write_text("old")
    with pytest.raises(ModelError):
        _export(out, model, params, BrokenTokenizer())
    assert (out / "stale.txt").is_file()
    _export(out, model, params)
    assert not (out / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
