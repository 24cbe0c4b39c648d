"""Digests of the files below a folder; several processes read a share each."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from opd_jax.core.distributed import await_seen, from_first
from opd_jax.core.lineage import fingerprint_json
from opd_jax.errors import DataError

SHA256_BYTES = 32


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its name there. Called by every process.

    The shares meet in memory: who dies on the way leaves nothing behind.

    Raises:
        OSError: this process could not read its share.
        DataError: another one could not.
    """
    names, rank, count = _names(folder), jax.process_index(), jax.process_count()
    if count == 1:
        return {name: sha256_of(folder / name) for name in names}
    names = _as_first_sees(folder, names)
    share = np.zeros((1 + math.ceil(len(names) / count), SHA256_BYTES), np.uint8)
    error: OSError | None = None
    try:
        for row, name in enumerate(names[rank::count], 1):
            share[row] = np.frombuffer(bytes.fromhex(sha256_of(folder / name)), np.uint8)
    except OSError as found:
        error = found
        share[0, 0] = 1
        share[0, 1:5] = np.frombuffer(np.int32(found.errno or 0).tobytes(), np.uint8)
    shares = np.asarray(multihost_utils.process_allgather(share))
    if error is not None:
        raise error
    failed = shares[:, 0, 0] > 0
    if failed.any():
        first = int(failed.argmax())
        number = int(np.frombuffer(shares[first, 0, 1:5].tobytes(), np.int32)[0])
        cause = OSError(number, os.strerror(number))  # whether a restart may help hangs on it
        raise DataError(
            f"{folder}: process {first} could not read back its share ({cause.strerror})"
        ) from cause
    rows = shares[:, 1:].swapaxes(0, 1).reshape(-1, SHA256_BYTES)[: len(names)]
    return {name: row.tobytes().hex() for name, row in zip(names, rows, strict=True)}


def _names(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _as_first_sees(folder: Path, names: list[str]) -> list[str]:
    """Process 0's `names`, on every process: shares of different lists would leave files out."""
    told = from_first(fingerprint_json(names))

    def seen() -> bool:
        nonlocal names
        if fingerprint_json(names) != told:
            with contextlib.suppress(OSError):  # of a listing that is old
                names = _names(folder)
        return fingerprint_json(names) == told

    await_seen(seen, str(folder))
    return names
