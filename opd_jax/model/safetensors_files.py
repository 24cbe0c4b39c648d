"""The safetensors files of a Hugging Face folder, read and written a tensor or less at a time.

Only safetensors: a pickled checkpoint can run code. Nothing stays mapped or cached: bytes are read
where they are asked for, so that a file's pages never count as this process's memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from opd_jax.errors import ModelError
from opd_jax.model.hf_config import read_json
from opd_jax.model.hf_tensors import Shape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARDS = "model-*-of-*.safetensors"
_FLOATS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor's bytes lie; `kind` is safetensors' name of its dtype."""

    path: Path
    kind: str
    shape: Shape
    offset: int
    """Of the first byte in the file."""
    size: int


class SafetensorsSource:
    """One folder's tensors, from a single file or from shards with an index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._indexed = _read_index(folder)
        self._tensors: dict[str, _Stored] = {}
        for path in _weight_files(folder, self._indexed):
            self._add(path)

    def _add(self, path: Path) -> None:
        for name, stored in _read_header(path).items():
            place = self._indexed.get(name) if self._indexed else path
            if place != path:
                says = f"places it in {place.name}" if place else "does not name it"
                raise ModelError(
                    f"{path}: tensor '{name}' {list(stored.shape)} is here, but {INDEX_FILE} "
                    f"{says}; copy the model folder again"
                )
            self._tensors[name] = stored

    def shapes(self) -> dict[str, Shape]:
        """Every tensor in the folder; raises ModelError for a dtype that is no plain float."""
        for name, stored in self._tensors.items():
            if stored.kind not in _FLOATS:
                raise ModelError(
                    f"{stored.path}: tensor '{name}' is {stored.kind}; "
                    f"only {', '.join(_FLOATS)} are read: give the unquantised weights"
                )
        return {name: stored.shape for name, stored in self._tensors.items()}

    def file_of(self, name: str) -> str:
        """The file that holds a tensor or should, or the folder."""
        if name in self._tensors:
            return str(self._tensors[name].path)
        return str(self._indexed.get(name, self._folder))

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of one tensor in its stored dtype."""
        stored = self._tensors[name]
        dtype, shape = _FLOATS[stored.kind], (stop - start, *stored.shape[1:])
        row_bytes = math.prod(stored.shape[1:]) * dtype.itemsize
        size = math.prod(shape) * dtype.itemsize
        raw = np.fromfile(stored.path, np.uint8, size, offset=stored.offset + start * row_bytes)
        if raw.nbytes != size:
            raise ModelError(
                f"{stored.path}: tensor '{name}' {list(stored.shape)} ends early: the file shrank "
                "while it was read; copy the file again"
            )
        return raw.view(dtype).reshape(shape)


def _read_header(path: Path) -> dict[str, _Stored]:
    if not path.is_file():
        raise ModelError(
            f"{path}: missing, though {INDEX_FILE} names it; copy the model folder again"
        )
    try:
        # Refuses a header that is no JSON, or whose tensors overlap or do not fill the file.
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ModelError(
            f"{path}: truncated or damaged safetensors ({_cut_off(path) or error}); "
            "copy the file again"
        ) from error
    return _parse_header(path)


def _parse_header(path: Path) -> dict[str, _Stored]:
    """Raises ValueError, TypeError or LookupError when the header is not what it should be."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path}: a header of {length} bytes")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors: dict[str, _Stored] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors[name] = _Stored(path, entry["dtype"], shape, 8 + length + begin, end - begin)
    return tensors


def _cut_off(path: Path) -> str | None:
    """The first tensor that does not end in the file; None if the header does not say."""
    try:
        tensors = sorted(_parse_header(path).items(), key=lambda item: item[1].offset)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    there = path.stat().st_size
    for name, stored in tensors:
        if stored.offset + stored.size > there:
            return (
                f"tensor '{name}' {list(stored.shape)} has {stored.size} bytes, "
                f"{max(0, there - stored.offset)} of them are here; the file has {there} bytes of "
                f"{max(stored.offset + stored.size for _, stored in tensors)}"
            )
    return None


def _read_index(folder: Path) -> dict[str, Path]:
    """Tensor name -> file; empty without an index."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: has no weight_map; copy the model folder again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(
                f"{index}: tensor '{name}' is placed in {file!r}, which is no file name; "
                "copy the model folder again"
            )
    return {name: folder / file for name, file in weight_map.items()}


def _weight_files(folder: Path, indexed: dict[str, Path]) -> list[Path]:
    single = folder / SINGLE_FILE
    if indexed:
        named = sorted(set(indexed.values()))
        if single.is_file() and named != [single]:
            raise ModelError(
                f"{single}: {INDEX_FILE} beside it names other files, and transformers would read "
                "this one alone; remove the one that is not the model"
            )
        for path in sorted(folder.glob(_SHARDS)):
            if path not in named:
                raise ModelError(
                    f"{path}: {INDEX_FILE} does not name this file; "
                    "remove it, or copy the model folder again"
                )
        return named
    if single.is_file():
        return [single]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; {pickled[0]} is pickled: convert it to safetensors" if pickled else ""
    raise ModelError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is here{hint}")


def write_safetensors(
    path: Path, shapes: Mapping[str, Shape], dtype: np.dtype, arrays: Iterable[np.ndarray]
) -> None:
    """One file of tensors of one dtype; `arrays` come in the order of `shapes`, one at a time."""
    kind = next(kind for kind, known in _FLOATS.items() if known == dtype)
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(np.ascontiguousarray(array, dtype).view(np.uint8).data)
