"""The fingerprint read from files is that of the loaded parameters, and is kept beside them."""

import json
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_gguf import write_gguf
from tiny_models import MOE, write_model

from opd_jax.config import MeshConfig
from opd_jax.core.lineage import fingerprint_params
from opd_jax.core.mesh import make_mesh
from opd_jax.errors import ModelError
from opd_jax.model import fingerprint, hf_export
from opd_jax.model.fingerprint import CACHE_NAME, stream_fingerprint, weights_fingerprint
from opd_jax.model.load import read_model


class NoTokenizer:
    def save(self, folder):
        pass


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def reads(monkeypatch):
    """Caches weights of any size; counts how often they are read."""
    monkeypatch.setattr(fingerprint, "CACHED_BYTES", 0)
    seen = []
    real = fingerprint.stream_fingerprint
    monkeypatch.setattr(
        fingerprint, "stream_fingerprint", lambda path: seen.append(path) or real(path)
    )
    return seen


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        {**MOE, "mlp_only_layers": [0]},
    ],
    ids=["qwen3", "tied", "biases", "experts"],
)
def test_it_is_that_of_the_loaded_parameters(tmp_path, monkeypatch, changes, dtype):
    monkeypatch.setattr(fingerprint, "ROWS_BYTES", 300)  # the embedding comes in pieces
    write_model(tmp_path, dtype, **changes)
    assert stream_fingerprint(tmp_path) == fingerprint_params(read_model(tmp_path)[1])
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    assert stream_fingerprint(tmp_path) == fingerprint_params(read_model(tmp_path, mesh=mesh)[1])


def test_it_does_not_depend_on_how_the_run_keeps_its_parameters(folder):
    """A bfloat16 run of a float32 file is by the same model; a bfloat16 file is another one."""
    whole, rounded = (
        fingerprint_params(read_model(folder, dtype)[1]) for dtype in ("float32", "bfloat16")
    )
    assert stream_fingerprint(folder) == whole != rounded


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_it_is_that_of_a_gguf_file(tmp_path, kind):
    write_gguf(tmp_path / "m.gguf", kind)
    assert stream_fingerprint(tmp_path / "m.gguf") == fingerprint_params(
        read_model(tmp_path / "m.gguf")[1]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_that_of_a_model_that_was_exported_in_shards(folder, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(hf_export, "SHARD_BYTES", 4000)
    model, params = read_model(folder, dtype)
    hf_export.export_folder(tmp_path / "out", model, params, NoTokenizer(), {}, {})
    assert len(list((tmp_path / "out").glob("model-*"))) > 2
    assert stream_fingerprint(tmp_path / "out") == fingerprint_params(params)


def test_one_value_of_any_tensor_changes_it(folder):
    path = folder / "model.safetensors"
    tensors, seen = load_file(path), {stream_fingerprint(folder)}
    for name in tensors:
        changed = tensors[name].copy()
        changed.flat[-1] += 1e-3
        save_file({**tensors, name: changed}, path)
        seen.add(stream_fingerprint(folder))
    assert len(seen) == len(tensors) + 1


def test_a_damaged_folder_is_refused_as_loading_it_would(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' \[16\] is missing"):
        stream_fingerprint(folder)


def test_it_never_holds_more_than_a_tensor(folder, monkeypatch):
    """By what the reader is asked for: nothing of one piece of work outlives it."""
    from opd_jax.model.safetensors_files import SafetensorsSource

    real, largest, shapes = SafetensorsSource.read, [0], load_file(folder / "model.safetensors")

    def read(self, name, start, stop):
        array = real(self, name, start, stop)
        largest[0] = max(largest[0], array.size)
        return array

    monkeypatch.setattr(SafetensorsSource, "read", read)
    monkeypatch.setattr(jax, "device_put", None)  # and puts nothing on a device
    stream_fingerprint(folder)
    assert largest[0] == max(array.size for array in shapes.values())


def test_it_is_kept_beside_the_weights(folder, tmp_path, reads):
    fallback = tmp_path / "fallback.json"
    first = weights_fingerprint(folder, fallback)
    assert weights_fingerprint(folder, fallback) == first == stream_fingerprint(folder)
    assert len(reads) == 1
    assert (folder / CACHE_NAME).is_file()
    assert not fallback.exists()
    moved = folder.rename(tmp_path / "moved")
    assert weights_fingerprint(moved, fallback) == first
    assert len(reads) == 1


def test_it_is_kept_beside_a_gguf_file(tmp_path, reads):
    write_gguf(tmp_path / "m.gguf")
    for _ in range(2):
        weights_fingerprint(tmp_path / "m.gguf", tmp_path / "fallback.json")
    assert len(reads) == 1
    assert (tmp_path / f"m.gguf.{CACHE_NAME}").is_file()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_changed_file_is_read_again(folder, tmp_path, reads, file):
    first = weights_fingerprint(folder, tmp_path / "fallback.json")
    if file == "model.safetensors":
        tensors = load_file(folder / file)
        save_file({**tensors, "model.norm.weight": -tensors["model.norm.weight"]}, folder / file)
    stat = (folder / file).stat()
    os.utime(folder / file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = weights_fingerprint(folder, tmp_path / "fallback.json")
    assert len(reads) == 2
    assert (second == first) == (file == "config.json")


def negated(path):
    """The bytes of a file of as many, with one tensor negated."""
    tensors = load_file(path)
    other = path.with_name("other")
    changed = {**tensors, "model.norm.weight": -tensors["model.norm.weight"]}
    save_file(changed, other, metadata={"format": "pt"})
    assert other.stat().st_size == path.stat().st_size
    return other


@pytest.mark.parametrize("way", ["another file in its place", "the file written over"])
def test_a_file_of_the_same_size_and_time_is_read_again(folder, tmp_path, reads, way):
    path = folder / "model.safetensors"
    first, stat = weights_fingerprint(folder, tmp_path / "fallback.json"), path.stat()
    other = negated(path)
    if way == "another file in its place":
        os.replace(other, path)
    else:
        path.write_bytes(other.read_bytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert weights_fingerprint(folder, tmp_path / "fallback.json") != first
    assert len(reads) == 2


@pytest.mark.parametrize("what", ["st_ino", "st_ctime_ns", "header"])
def test_each_mark_of_a_file_counts_by_itself(folder, tmp_path, reads, monkeypatch, what):
    path = folder / "model.safetensors"
    weights_fingerprint(folder, tmp_path / "fallback.json")
    real = os.fstat
    names = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")
    kept = {name: getattr(path.stat(), name) for name in names}
    if what == "header":
        path.write_bytes(negated(path).read_bytes())
    else:
        kept[what] += 1

    def fstat(number):
        stat = real(number)
        return SimpleNamespace(**kept) if stat.st_ino == path.stat().st_ino else stat

    monkeypatch.setattr(fingerprint.os, "fstat", fstat)
    weights_fingerprint(folder, tmp_path / "fallback.json")
    assert len(reads) == 2


def test_where_nothing_can_be_written_the_run_folder_keeps_it(folder, tmp_path, reads):
    (folder / CACHE_NAME).mkdir()  # even root cannot write a file there
    fallback = tmp_path / "fallback.json"
    fallback.write_text('{"/other": 1}')
    found = {weights_fingerprint(folder, fallback) for _ in range(3)}
    assert found == {stream_fingerprint(folder)}
    assert len(reads) == 1
    assert json.loads(fallback.read_text()).keys() == {"/other", str(folder)}
    assert [path.name for path in folder.glob(".*")] == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 0, "weights": "x"}'])
def test_a_cache_that_means_nothing_is_made_anew(folder, tmp_path, reads, text):
    (folder / CACHE_NAME).write_text(text)
    assert weights_fingerprint(folder, tmp_path / "no") == stream_fingerprint(folder)
    weights_fingerprint(folder, tmp_path / "no")
    assert len(reads) == 1


def test_small_weights_leave_no_file(folder, tmp_path):
    weights_fingerprint(folder, tmp_path / "fallback.json")
    assert not (folder / CACHE_NAME).exists()
    assert not (tmp_path / "fallback.json").exists()
