"""Writing a Hugging Face folder: weights, config, generation config, tokenizer and model card."""

from __future__ import annotations

import collections
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from opd_jax.model.hf_config import architecture_to_hf, read_json
from opd_jax.model.hf_tensors import Shape, expected_shapes, tensor_of
from opd_jax.model.safetensors_files import INDEX_FILE, SINGLE_FILE, write_safetensors
from opd_jax.model.transformer import LanguageModel, Params

SHARD_BYTES = 5 * 10**9
GENERATION_CONFIG = "generation_config.json"


class TokenizerSource(Protocol):
    """Something that writes the files of a tokenizer."""

    def save(self, folder: Path) -> None:
        """Write them into an existing folder."""
        ...


def export_folder(
    folder: str | Path,
    model: LanguageModel,
    params: Params,
    tokenizer_source: TokenizerSource,
    documents: Mapping[str, str],
    generation_config: Mapping[str, Any],
) -> None:
    """Write a folder that transformers loads; it appears under its name only when it is complete.

    The weights keep the dtype of `params`: cast the tree first to export bfloat16. An existing
    folder is replaced. All processes must call this; the first one writes.

    Args:
        documents: name and text of further files: the model card `README.md`, the lineage.
        generation_config: laid over the one that comes with the tokenizer; its token ids also
            enter config.json.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    writes = jax.process_index() == 0
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _write_weights(partial if writes else None, model, params)
    if writes:
        tokenizer_source.save(partial)
        generation = _write_generation_config(partial, generation_config)
        _write_json(partial / "config.json", _config(model, params, generation))
        for name, text in documents.items():
            (partial / name).write_text(text, encoding="utf-8")
        _replace(partial, folder)


def _config(model: LanguageModel, params: Params, generation: Mapping[str, Any]) -> dict[str, Any]:
    ids = {key: value for key, value in generation.items() if key.endswith("_token_id")}
    # transformers before 4.56 and servers read the old name; where both are, they agree.
    dtypes = dict.fromkeys(("dtype", "torch_dtype"), str(params["embed"].dtype))
    return architecture_to_hf(model.arch, dtypes | ids)


def _write_generation_config(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / GENERATION_CONFIG
    content = (read_json(path) if path.is_file() else {}) | dict(given)
    _write_json(path, content)
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(folder: Path | None, model: LanguageModel, params: Params) -> None:
    """Host memory: one tensor. `folder` is None on processes that only help to gather."""
    dtype, shapes = params["embed"].dtype, expected_shapes(model)
    shards = plan_shards(shapes, dtype.itemsize)
    arrays = _hf_arrays(model, params)
    for number, names in enumerate(shards, start=1):
        piece = itertools.islice(arrays, len(names))
        if folder is None:
            collections.deque(piece, maxlen=0)
            continue
        path = folder / _shard_name(number, len(shards))
        write_safetensors(path, {name: shapes[name] for name in names}, dtype, piece)
    if folder is not None and len(shards) > 1:
        _write_index(folder, shapes, shards, dtype.itemsize)


def plan_shards(
    shapes: Mapping[str, Shape], itemsize: int, limit: int | None = None
) -> list[list[str]]:
    """Tensor names in order, cut so that no file exceeds the limit (a single tensor may)."""
    limit = SHARD_BYTES if limit is None else limit
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_index(
    folder: Path, shapes: Mapping[str, Shape], shards: list[list[str]], itemsize: int
) -> None:
    weight_map = {
        name: _shard_name(number, len(shards))
        for number, names in enumerate(shards, start=1)
        for name in names
    }
    total = sum(int(np.prod(shape)) * itemsize for shape in shapes.values())
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _hf_arrays(model: LanguageModel, params: Params) -> Iterator[np.ndarray]:
    """Every tensor in the order of `expected_shapes`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        tensor = tensor_of(path, model.arch)
        for _, place in tensor.places(leaf.shape):
            yield tensor.to_hf(_to_host(leaf[place]))


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _replace(partial: Path, folder: Path) -> None:
    """Two renames: a reader sees the old folder, none, or the new one, never a mixture."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
