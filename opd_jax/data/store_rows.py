"""A record as a row of columns, its digest, and the check of what goes into a row."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

from opd_jax.data.records import FinishReason, Record
from opd_jax.data.store_segments import Columns
from opd_jax.errors import DataError

FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length")


def vector(value: np.ndarray, dtype: type[np.generic], what: str, rank: int = 1) -> np.ndarray:
    """A copy of `value` in `dtype`.

    Raises:
        DataError: another rank, another kind of number, or an integer that does not fit.
    """
    array = np.asarray(value)
    kinds = "iu" if np.issubdtype(dtype, np.integer) else "f"
    if array.ndim != rank or (array.size and array.dtype.kind not in kinds):
        raise DataError(
            f"{what}: {array.dtype}{list(array.shape)}; give {np.dtype(dtype)} of rank {rank}"
        )
    copy = np.array(array, dtype)
    if kinds == "iu" and array.dtype != copy.dtype and not np.array_equal(copy, array):
        raise DataError(f"{what}: {array.min()} to {array.max()} does not fit {np.dtype(dtype)}")
    return copy


def record_digest(record: Record) -> bytes:
    """sha256 over everything a record holds; equal records are equal wherever they were written."""
    name = record.prompt_id.encode("utf-8", "surrogatepass")
    sizes = (len(name), len(record.prompt_ids), len(record.response_ids), record.sample_index)
    digest = hashlib.sha256(struct.pack("<4q", *sizes) + name)
    digest.update(struct.pack("<bd", FINISH_REASONS.index(record.finish_reason), record.reward))
    for tokens in (record.prompt_ids, record.response_ids, record.student_logprob):
        digest.update(np.ascontiguousarray(tokens, tokens.dtype.newbyteorder("<")).tobytes())
    return digest.digest()


def record_columns(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """What `records.npz` holds beside starts and lengths.

    Names are UTF-8 bytes: numpy's texts drop trailing NULs.
    """
    names = [r.prompt_id.encode("utf-8", "surrogatepass") for r in records]
    digests = b"".join(record_digest(r) for r in records)
    return {
        "sample_index": np.array([r.sample_index for r in records], np.int64),
        "finish": np.array([FINISH_REASONS.index(r.finish_reason) for r in records], np.int8),
        "reward": np.array([r.reward for r in records], np.float64),
        "name_len": np.array([len(n) for n in names], np.int64),
        "name_bytes": np.frombuffer(b"".join(names), np.uint8),
        "digest": np.frombuffer(digests, np.uint8).reshape(-1, 32),
    }


def record_keys(columns: Columns) -> list[tuple[str, int]]:
    """(prompt id, sample index) of each row."""
    text = columns["name_bytes"].tobytes()
    ends = np.cumsum(columns["name_len"]).tolist()
    starts = [0, *ends[:-1]]
    names = [text[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends, strict=True)]
    return list(zip(names, columns["sample_index"].tolist(), strict=True))
