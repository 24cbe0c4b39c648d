"""The fingerprint of a model's weights, from its files: a tensor at a time, cached beside them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opd_jax.core.gguf_file import is_gguf
from opd_jax.core.lineage import leaf_header
from opd_jax.model.gguf import GGUFSource
from opd_jax.model.hf_import import check_tensors
from opd_jax.model.hf_tensors import HFTensor, Shape, tensor_of
from opd_jax.model.load import architecture_of
from opd_jax.model.safetensors_files import SafetensorsSource
from opd_jax.model.streaming import TensorSource
from opd_jax.model.transformer import LanguageModel

CACHE_NAME = "opd_jax_fingerprint.json"
CACHED_BYTES = 64 * 2**20
"""Smaller weights are read again each time: it takes no time, and leaves no file in the folder."""
ROWS_BYTES = 64 * 2**20
"""Of a tensor that lies in the files as it does here: so much is read at once."""
HEADER_BYTES = 64 * 2**10
"""Of each file: names, shapes and places of its tensors stand there, in either format."""
_VERSION = 2


def weights_fingerprint(path: str | Path, fallback: Path) -> str:
    """`core.lineage.fingerprint_params` of a model's float32 parameters, without loading them.

    That of large weights is kept in a file beside them, which counts for as long as the model's
    files are the same ones: by name, inode, size, times of content and of status, and first bytes.
    Who sets a file's time back cannot set back that of its status.

    Args:
        path: a Hugging Face folder or a .gguf file.
        fallback: a file that keeps it where nothing can be written beside the weights.

    Raises:
        ModelError: as loading the model would.
    """
    stamp = files_stamp(Path(path))
    if sum(file["bytes"] for file in stamp.values()) < CACHED_BYTES:
        return stream_fingerprint(path)
    beside, key = _beside(Path(path)), str(Path(path).resolve())
    for known in (_read(beside), _read(fallback).get(key, {})):
        if known.get("version") == _VERSION and known.get("files") == stamp:
            return str(known["weights"])
    entry = {"version": _VERSION, "weights": stream_fingerprint(path), "files": stamp}
    try:
        _write(beside, entry)
    except OSError:  # a read-only folder
        with contextlib.suppress(OSError):
            _write(fallback, {**_read(fallback), key: entry})
    return str(entry["weights"])


def stream_fingerprint(path: str | Path) -> str:
    """The same, always from the weights; the host holds one tensor."""
    model = LanguageModel(architecture_of(path))
    source = GGUFSource(path, model.arch) if is_gguf(path) else SafetensorsSource(Path(path))
    check_tensors(source, model)
    leaves = jax.tree_util.tree_leaves_with_path(model.abstract())
    digest = hashlib.sha256()
    for name, place, shape in sorted((jax.tree_util.keystr(p), p, x.shape) for p, x in leaves):
        digest.update(leaf_header(name, shape))
        for piece in _pieces(source, tensor_of(place, model.arch), shape):
            digest.update(np.ascontiguousarray(piece.astype(np.float32, copy=False)).data)
    return digest.hexdigest()


def _pieces(source: TensorSource, tensor: HFTensor, shape: Shape) -> Iterator[np.ndarray]:
    """A parameter's values in their order here."""
    inner = shape[tensor.stack_rank :]
    rows, *columns = tensor.hf_shape(inner)
    step = rows
    if not tensor.in_rank:  # no transpose: the order is that of the file
        step = max(1, ROWS_BYTES // (4 * int(np.prod(columns))))
    for name, _ in tensor.places(shape):
        for start in range(0, rows, step):
            array = source.read(name, start, min(start + step, rows))
            yield tensor.from_hf(array, inner) if tensor.in_rank else array


def files_stamp(path: Path) -> dict[str, dict[str, Any]]:
    """What tells every file that weights or architecture are read from, from one in its place."""
    files = [path, *sorted(path.glob("*.safetensors*")), path / "config.json"]
    return {file.name: _stamp_of(file) for file in files if file.is_file()}


def _stamp_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        stat, header = os.fstat(file.fileno()), file.read(HEADER_BYTES)
    return {
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
        "header_sha256": hashlib.sha256(header).hexdigest(),
    }


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{CACHE_NAME}") if is_gguf(path) else path / CACHE_NAME


def _read(path: Path) -> dict[str, Any]:
    """A cache that cannot be read is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    """In one rename, so that runs that start together do not read half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
