"""Flat token arrays: zarr3, sharded, compressed, with a crc32c on every chunk and every index.

Each record starts on an inner-chunk border, so a read decodes nothing of its neighbours:

    inner = 4      record 0 = [a b c]   record 1 = [d e f g h]
    axis_t   = [a b c . | d e f g | h . . .]     start_r = [0 4], len_r = [3 5]; a dot is fill
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts

from opd_jax.data.store_files import (
    TENSORSTORE_ERRORS,
    StoreFiles,
    damage_named,
    shared_context,
    short_cause,
    write_failure_named,
)
from opd_jax.errors import DataError

SHARD_TOKENS = 16_777_216
SHORTEST_CHUNK = 16
RowReads = Callable[[], list[np.ndarray]]


@dataclass(frozen=True)
class Field:
    """One array of a segment: a row per record, ragged along one token axis.

    Attributes:
        axis: which `start_<axis>` and `len_<axis>` columns place a record on it.
        longest_chunk: upper bound of the inner chunk, in tokens.
        compressor, shuffle: of blosc. On ids and log-probs lz4 on shuffled bits takes a third of
            zstd's time for the same size.
    """

    name: str
    dtype: str
    axis: str
    longest_chunk: int = 4096
    shard_tokens: int = SHARD_TOKENS
    compressor: str = "lz4"
    shuffle: str = "bitshuffle"

    @property
    def fill(self) -> int | str:
        """JSON spelling of the value between records."""
        return -1 if self.dtype == "int32" else "NaN"

    def codecs(self) -> list[dict[str, Any]]:
        """Codecs inside a shard; the crc32c comes last, over the compressed bytes."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        size = np.dtype(self.dtype).itemsize
        setting = {"cname": self.compressor, "clevel": 1, "shuffle": self.shuffle}
        blosc = {"name": "blosc", "configuration": {**setting, "typesize": size, "blocksize": 0}}
        return [little, blosc, {"name": "crc32c"}]


def choose_chunk(lengths: np.ndarray, longest: int) -> int:
    """The smallest power of two, within [16, longest], that holds the median record.

    It holds a quarter of the mean record too: a few very long records among short ones would else
    be cut into very many chunks.
    """
    if not len(lengths):
        return SHORTEST_CHUNK
    wanted = int(max(np.median(lengths), np.mean(lengths) / 4))
    return min(longest, max(SHORTEST_CHUNK, 1 << max(wanted - 1, 0).bit_length()))


def place_rows(lengths: np.ndarray, chunk: int) -> tuple[np.ndarray, int]:
    """Where each record starts when borders are `chunk` apart, and the length of the axis."""
    borders = np.concatenate([[0], np.cumsum(-(-lengths // chunk) * chunk)]).astype(np.int64)
    return borders[:-1], int(borders[-1])


def array_metadata(field: Field, chunk: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """The zarr3 metadata of one array.

    A shard is never longer than the array: its index has an entry per chunk, present or not.
    """
    whole = max(chunk, -(-shape[0] // chunk) * chunk)
    sharding = {
        "chunk_shape": [chunk, *shape[1:]],
        "codecs": field.codecs(),
        "index_codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
        "index_location": "end",
    }
    grid = {"chunk_shape": [min(field.shard_tokens, whole), *shape[1:]]}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": field.dtype,
        "fill_value": field.fill,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def lay_out(
    field: Field, rows: Sequence[np.ndarray], starts: np.ndarray, length: int
) -> np.ndarray:
    """The flat array with every record at its start and the fill value between."""
    tail = rows[0].shape[1:] if len(rows) else ()
    flat, fill, end = np.empty((length, *tail), field.dtype), float(field.fill), 0
    for row, start in zip(rows, starts, strict=True):  # in the order of the starts
        flat[end:start] = fill
        end = start + len(row)
        flat[start:end] = row
    flat[end:] = fill
    return flat


def write_array(
    files: StoreFiles, folder: str, flat: np.ndarray, field: Field, chunk: int
) -> tuple[Any, dict[str, Any]]:
    """Begins to write one array, whole shards only; an interrupted write of it is made good.

    Args:
        flat: must not change any more: it is read until the write has ended, and perhaps later.

    Returns:
        what to await the end with (`None`: nothing is left), and what a commit must say of it.
    """
    metadata = array_metadata(field, chunk, flat.shape)
    spec = {
        "driver": "zarr3",
        "kvstore": (files.kvstore / folder).spec().to_json(),
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }
    with write_failure_named(files.path(folder)):
        store = ts.open(spec, open=True, create=True, context=shared_context()).result()
    # Nothing changes `flat` from here on, so that it need not be copied.
    write = functools.partial(store.write, can_reference_source_data_indefinitely=True)
    begun = write(flat) if flat.size else None
    zarr_json = files.read(folder + "zarr.json", "write the segment again")
    return begun, {
        "axis": field.axis,
        "metadata": json.loads(zarr_json),
        "zarr_json_sha256": hashlib.sha256(zarr_json).hexdigest(),
    }


class KeepBudget:
    """Bytes of decoded arrays that one store may keep whole in memory.

    Reading a hundred short records one by one costs 25 ms, slicing them out of a kept array less
    than one. First come, first kept, and no eviction: a store of many small segments must not read
    a whole array again for each record.
    """

    def __init__(self, available: int = 64_000_000, largest: int = 16_000_000) -> None:
        self._available = available
        self._largest = largest

    def take(self, size: int) -> bool:
        """Whether an array of `size` bytes may be kept."""
        if size > min(self._largest, self._available):
            return False
        self._available -= size
        return True


class StoredArray:
    """One array, opened from the metadata in its commit; `zarr.json` is for other programs.

    It is opened when it is first read: a store of a thousand segments opens without that.
    """

    def __init__(
        self, files: StoreFiles, folder: str, described: dict[str, Any], repair: str
    ) -> None:
        self._files = files
        self._folder = folder
        self._described = described
        self._repair = repair
        self.keep = False

    @functools.cached_property
    def _array(self) -> Any:
        with damage_named(self._files.path(self._folder), self._repair):
            return ts.open(
                {
                    "driver": "zarr3",
                    "kvstore": (self._files.kvstore / self._folder).spec().to_json(),
                    "metadata": self._described["metadata"],
                    "fill_missing_data_reads": False,
                    "recheck_cached_data": "open",
                },
                open=True,
                assume_metadata=True,
                context=shared_context(),
            ).result()

    @property
    def nbytes(self) -> int:
        """Decoded size."""
        metadata = self._described["metadata"]
        return math.prod(metadata["shape"]) * np.dtype(metadata["data_type"]).itemsize

    @functools.cached_property
    def _whole(self) -> np.ndarray:
        return self.read_all()

    def start_rows(self, starts: np.ndarray, lengths: np.ndarray) -> RowReads:
        """Issues one read per record, all at once; the call of the result awaits them.

        Raises:
            DataError: on that call: a chunk is missing, cut short or fails its checksum.
        """
        spans = list(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))
        if self.keep:
            return lambda: [self._whole[start:end].copy() for start, end in spans]
        reads = [self._array[start:end].read() for start, end in spans]
        return lambda: self._await(reads)

    def _await(self, reads: list[Any]) -> list[np.ndarray]:
        with damage_named(self._files.path(self._folder), self._repair):
            return [read.result() for read in reads]

    def read_all(self) -> np.ndarray:
        """The whole axis, fill values included."""
        with damage_named(self._files.path(self._folder), self._repair):
            return self._array.read().result()

    @property
    def shape(self) -> tuple[int, ...]:
        """[tokens] or [tokens, k]."""
        return tuple(self._described["metadata"]["shape"])

    @property
    def shard_tokens(self) -> int:
        """Length of the token axis that one file holds."""
        return self._described["metadata"]["chunk_grid"]["configuration"]["chunk_shape"][0]

    def shard_path(self, shard: int) -> str:
        """The file of that shard, for messages."""
        return self._files.path(f"{self._folder}c/{shard}{'/0' * (len(self.shape) - 1)}")

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> list[np.ndarray | str]:
        """Each span of the axis, or what hinders reading it: for one who wants all the damage."""
        reads = [self._array[start:end].read() for start, end in spans]
        found: list[np.ndarray | str] = []
        for read in reads:
            try:
                found.append(read.result())
            except TENSORSTORE_ERRORS as error:
                found.append(short_cause(error))
        return found

    def verify_metadata(self) -> None:
        """Compares `zarr.json`, which no reader here needs, with what the commit says of it."""
        key = self._folder + "zarr.json"
        raw = self._files.read(key, self._repair)
        if hashlib.sha256(raw).hexdigest() != self._described["zarr_json_sha256"]:
            raise DataError(f"{self._files.path(key)}: damaged, digest differs; {self._repair}")
        if json.loads(raw) != self._described["metadata"]:
            raise DataError(
                f"{self._files.path(key)}: is not the metadata in the commit; {self._repair}"
            )
