"""One immutable segment: token arrays, the columns that place records on them, the commit.

    <base>data/<segment>/<field>/       token arrays
    <base>data/<segment>/records.npz    start_<axis>, len_<axis> and more per record
    <base>commits/<segment>.json        written last: metadata and digests of all the above

A writer killed at any moment leaves at most a folder without a commit, which no reader lists.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import threading
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from opd_jax.data.store_arrays import (
    Field,
    KeepBudget,
    RowReads,
    StoredArray,
    choose_chunk,
    lay_out,
    place_rows,
    write_array,
)
from opd_jax.data.store_files import StoreFiles, write_failure_named
from opd_jax.errors import DataError

AT_A_TIME = 64  # segments that are loaded at once
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|][a-zA-Z]\d+)', 'fortran_order': False, "
    rb"'shape': \(([\d, ]*)\), \} *\n",
    re.DOTALL,
)
_NUMPY = threading.Lock()
Columns = Mapping[str, np.ndarray]
Ragged = Sequence[tuple[Field, Sequence[np.ndarray]]]


def commit_names(files: StoreFiles, base: str) -> list[str]:
    """The segments that exist, sorted by name."""
    return files.names(base + "commits/")


def next_segment_name(files: StoreFiles, base: str, process_index: int) -> str:
    """`w<process>-<seq>-<uuid8>`: unique even where two writers pick the same number."""
    prefix = f"w{process_index:05d}-"
    taken = [n for n in commit_names(files, base) if n.startswith(prefix)]
    sequence = int(taken[-1].split("-")[1]) + 1 if taken else 0
    return f"{prefix}{sequence:06d}-{uuid.uuid4().hex[:8]}"


def write_segment(
    files: StoreFiles,
    base: str,
    name: str,
    ragged: Ragged,
    more: Callable[[], Columns],
    extra: dict[str, Any],
) -> str:
    """Writes arrays, then columns, then the commit; returns the commit's digest.

    Args:
        ragged: a field and its rows, one per record; fields of one axis have rows of equal lengths.
        more: makes what else is kept per record, each [r] or [r, ...]; called while the arrays are
            compressed, for digests take as long.
        extra: goes into the commit as it is.
    """
    folder = f"{base}data/{name}/"
    placed: dict[str, np.ndarray] = {}
    chunks: dict[str, int] = {}
    described: dict[str, Any] = {}
    pending: list[Any] = []  # one array is laid out while the last is compressed
    for field, rows in ragged:
        lengths = np.array([len(row) for row in rows], np.int64)
        # The first field of an axis sets its borders; all chunks are powers of two, so they divide.
        border = chunks.setdefault(field.axis, choose_chunk(lengths, field.longest_chunk))
        starts, length = place_rows(lengths, border)
        placed[f"start_{field.axis}"], placed[f"len_{field.axis}"] = starts, lengths
        flat = lay_out(field, rows, starts, length)
        chunk = min(border, field.longest_chunk)
        begun, described[field.name] = write_array(
            files, f"{folder}{field.name}/", flat, field, chunk
        )
        pending.append(begun)
    columns = {**more(), **placed}
    with write_failure_named(files.path(folder)):
        for begun in pending:
            if begun is not None:
                begun.result()
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **columns)
    files.write(folder + "records.npz", packed.getvalue())
    commit = {
        **extra,
        "segment": name,
        "records": len(next(iter(columns.values()))),
        "records_sha256": hashlib.sha256(packed.getvalue()).hexdigest(),
        "fields": described,
    }
    return files.write_document(f"{base}commits/{name}.json", commit)


def segment_repair(files: StoreFiles, base: str, name: str) -> str:
    """What to do about a damaged segment."""
    commit = files.path(f"{base}commits/{name}.json")
    return f"delete {commit} and run the stage that wrote it again: it makes only what is missing"


def read_columns(
    files: StoreFiles, base: str, name: str, commit: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The columns of `records.npz`.

    Raises:
        DataError: they are missing or not those that were committed.
    """
    key, repair = f"{base}data/{name}/records.npz", segment_repair(files, base, name)
    raw = files.read(key, repair)
    if hashlib.sha256(raw).hexdigest() != commit["records_sha256"]:
        raise DataError(f"{files.path(key)}: damaged, digest differs; {repair}")
    with zipfile.ZipFile(io.BytesIO(raw)) as packed:
        return {
            name.removesuffix(".npy"): _array_of(packed.read(name)) for name in packed.namelist()
        }


def _array_of(raw: bytes) -> np.ndarray:
    """An array as `np.savez` writes it.

    NumPy reads a header by compiling it, which Python 3.11 cannot do in several threads at a time
    ("AST constructor recursion depth mismatch").
    """
    header = _HEADER.match(raw)
    if header is None:
        with _NUMPY:
            return np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
    shape = [int(size) for size in header[2].split(b",") if size.strip()]
    return np.frombuffer(raw, header[1].decode(), offset=header.end()).reshape(shape).copy()


class Segment:
    """A committed segment, its columns in memory and its arrays open.

    Raises:
        DataError: the commit or the columns are damaged.
    """

    def __init__(self, files: StoreFiles, base: str, name: str) -> None:
        self.name = name
        self.path = files.path(f"{base}data/{name}")
        self.repair = segment_repair(files, base, name)
        self.commit = files.read_document(f"{base}commits/{name}.json", self.repair)
        self.digest: str = self.commit["sha256"]
        self.columns = read_columns(files, base, name, self.commit)
        self._arrays = {
            field: StoredArray(files, f"{base}data/{name}/{field}/", described, self.repair)
            for field, described in self.commit["fields"].items()
        }

    def keep_within(self, budget: KeepBudget) -> None:
        """Keep arrays in memory as far as the budget goes."""
        for array in self._arrays.values():
            array.keep = budget.take(array.nbytes)

    def __len__(self) -> int:
        return self.commit["records"]

    def has(self, field: str) -> bool:
        """Whether the segment holds that array."""
        return field in self._arrays

    def _span(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        axis = self.commit["fields"][field]["axis"]
        return self.columns[f"start_{axis}"], self.columns[f"len_{axis}"]

    def start_rows(self, field: str, rows: np.ndarray) -> RowReads:
        """Issues the reads of one field's rows."""
        starts, lengths = self._span(field)
        return self._arrays[field].start_rows(starts[rows], lengths[rows])

    def read_field(self, field: str) -> list[np.ndarray]:
        """Every row of one field, by one read of the whole array: all its checksums are tested."""
        flat = self._arrays[field].read_all()
        starts, lengths = self._span(field)
        return [flat[start : start + n] for start, n in zip(starts, lengths, strict=True)]

    def verify(self) -> None:
        """Reads every chunk and every metadata file.

        Raises:
            DataError: one is damaged or missing.
        """
        for array in self._arrays.values():
            array.verify_metadata()
            array.read_all()


class SegmentCache:
    """The committed segments below one base, each loaded once: a commit never changes."""

    def __init__(self, files: StoreFiles, base: str) -> None:
        self._files = files
        self._base = base
        self._loaded: dict[str, Segment] = {}
        self._budget = KeepBudget()

    def load(self, names: Sequence[str]) -> list[Segment]:
        """The segments of these names; many are read at a time, for a server may be far away."""
        new = [name for name in names if name not in self._loaded]
        with ThreadPoolExecutor(max(min(len(new), AT_A_TIME), 1)) as pool:
            for segment in pool.map(functools.partial(Segment, self._files, self._base), new):
                segment.keep_within(self._budget)
                self._loaded[segment.name] = segment
        return [self._loaded[name] for name in names]

    def all(self) -> list[Segment]:
        """Every committed segment now, sorted by name."""
        return self.load(commit_names(self._files, self._base))
