"""The rollout store: immutable segments of responses, frozen snapshots, and teacher passes.

<root>/dataset.json                 what the store is, written once
<root>/data/, <root>/commits/       responses, one segment per flush
<root>/shares.json                  into how many shares writers at work are divided
<root>/snapshots/<hash>.json        frozen, ordered content: what training opens
<root>/teacher/<pass>/              scores of a snapshot's records, segments of their own
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import numpy as np

from opd_jax.core.lineage import same_lineage, shown
from opd_jax.data.records import Record
from opd_jax.data.store_arrays import SHARD_TOKENS, Field
from opd_jax.data.store_files import StoreFiles, encode_document
from opd_jax.data.store_pass import TeacherPass
from opd_jax.data.store_rows import FINISH_REASONS, record_columns, record_keys, vector
from opd_jax.data.store_segments import SegmentCache, write_segment
from opd_jax.data.store_snapshot import RecordView, Snapshot, committed_segments, freeze
from opd_jax.data.store_writer import SegmentWriter
from opd_jax.errors import DataError

FIELDS = (
    Field("prompt_ids", "int32", "prompt", longest_chunk=256),
    Field("response_ids", "int32", "response"),
    Field("student_logprob", "float32", "response"),
)


ANOTHER_FOLDER = "choose another folder or delete this one"


def _settle_document(
    files: StoreFiles, key: str, meta: dict[str, Any], repair: str = ANOTHER_FOLDER
) -> None:
    """Writes `meta` once; an equal one that is there already is kept, another one refused.

    Models are equal when their fingerprints are: a folder that has moved is no other model.
    """
    wanted = json.loads(json.dumps(meta))
    files.write_new(key, encode_document({"meta": wanted}))
    found = files.read_document(key, "delete that folder and run again")["meta"]
    for name in sorted({*found, *wanted}):
        if name in found and name in wanted and same_lineage(found[name], wanted[name]):
            continue
        raise DataError(
            f"{files.path(key)}: {name!r} is {shown(found.get(name))}, this run has"
            f" {shown(wanted.get(name))}; {repair}"
        )


def create_store(root: str | os.PathLike[str], meta: dict[str, Any]) -> Store:
    """Creates a store, or opens the one at `root` when its meta is equal.

    Args:
        root: a folder, or a `gs://` or `s3://` address.
        meta: JSON values that say what the store is: fingerprints, settings.

    Raises:
        DataError: a store with another meta is there, or the root cannot be written.
    """
    _settle_document(StoreFiles(root), "dataset.json", meta)
    return Store(root)


def open_store(root: str | os.PathLike[str]) -> Store:
    """Opens an existing store.

    Raises:
        DataError: there is none, it is damaged, or of another schema version.
    """
    return Store(root)


class Store:
    """An open store. Reading is safe from many threads; every writer has segments of its own."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.files = StoreFiles(root)
        again = "there is no usable store: run the stage that writes it"
        self.meta: dict[str, Any] = self.files.read_document("dataset.json", again)["meta"]
        self._segments = SegmentCache(self.files, "")

    def committed_keys(self) -> set[tuple[str, int]]:
        """(prompt id, sample index) of every record that a restart need not make again."""
        return {key for segment in self._segments.all() for key in record_keys(segment.columns)}

    def writer(self, process_index: int = 0) -> StoreWriter:
        """A writer of new segments. Any number may write at once, on one machine or many."""
        return StoreWriter(self.files, process_index)

    def begin_shares(self, count: int) -> None:
        """Notes into how many shares its writers are divided, until `end_shares`.

        Raises:
            DataError: there are others at work, divided into another number.
        """
        key = "shares.json"
        self.files.write_new(key, encode_document({"shares": count}))
        found = self.files.read_document(key, "delete it and start the share again")["shares"]
        if found != count:
            raise DataError(
                f"{self.files.path(key)}: {found} shares are under way, this is one of {count}: "
                f"both would write the same records; start I/{found}, or delete that file once "
                "none of them runs any more"
            )

    def end_shares(self) -> None:
        """Forgets the number: all is written."""
        self.files.delete("shares.json")

    def freeze(self) -> Snapshot:
        """Fixes the committed records as a snapshot; the same records give the same one again.

        Raises:
            DataError: a (prompt id, sample index) was committed twice, or a segment is damaged.
        """
        return freeze(self.files, self._segments)

    def open_snapshot(self, snapshot_hash: str) -> Snapshot:
        """Opens a frozen snapshot and checks its segments against it."""
        return Snapshot(self.files, self._segments, snapshot_hash)

    def view(self) -> RecordView:
        """All that is committed now, frozen or not: to look at, for training opens a snapshot.

        Raises:
            DataError: nothing is committed, or a segment is damaged.
        """
        return RecordView(committed_segments(self.files, self._segments))

    def has_pass(self, name: str) -> bool:
        """Whether a teacher pass of that name was created."""
        return self.files.exists(f"teacher/{name}/pass.json")

    def create_pass(
        self, name: str, meta: dict[str, Any], repair: str = ANOTHER_FOLDER
    ) -> TeacherPass:
        """Creates a teacher pass, or opens the one of that name when its meta is equal.

        Args:
            repair: what to do about another meta, for the message.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise DataError(f"teacher pass {name!r}: use letters, digits, '.', '_' and '-' alone")
        _settle_document(self.files, f"teacher/{name}/pass.json", meta, repair)
        return self.open_pass(name)

    def settle_shares(self, name: str, count: int) -> None:
        """Binds a pass to a number of shares.

        Raises:
            DataError: it is bound to another one.
        """
        key = f"teacher/{name}/shares.json"
        repair = (
            f"share out as before, score the rest without --share, or delete {self.files.path(key)}"
            " once no share is at work"
        )
        _settle_document(self.files, key, {"shares": count}, repair)

    def open_pass(self, name: str) -> TeacherPass:
        """Opens an existing teacher pass."""
        return TeacherPass(self.files, name)


class StoreWriter(SegmentWriter[Record]):
    """Takes records; a full shard's worth of tokens flushes by itself."""

    def __init__(self, files: StoreFiles, process_index: int) -> None:
        super().__init__(files, "", process_index, SHARD_TOKENS)
        self._seen: set[tuple[str, int]] = set()

    def append(self, record: Record) -> None:
        """Takes a copy of the record.

        Raises:
            DataError: the record contradicts itself, or this writer has had its key before.
        """
        checked = _checked(record)
        key = (checked.prompt_id, checked.sample_index)
        if key in self._seen:
            raise DataError(
                f"{self._files.root}: prompt {key[0]!r}, sample {key[1]} is appended twice;"
                " give every sample its own index"
            )
        self._seen.add(key)
        self._buffer(checked, len(checked.prompt_ids) + len(checked.response_ids))

    def _write(self, name: str, rows: list[Record]) -> None:
        ragged = [(field, [getattr(r, field.name) for r in rows]) for field in FIELDS]
        write_segment(self._files, "", name, ragged, lambda: record_columns(rows), {})


def _checked(record: Record) -> Record:
    """A copy in the stored dtypes.

    Raises:
        DataError: lengths, dtypes or the finish reason are impossible.
    """
    where = f"record of prompt {record.prompt_id!r}, sample {record.sample_index}"
    response_ids = vector(record.response_ids, np.int32, f"{where}: response_ids")
    logprob = vector(record.student_logprob, np.float32, f"{where}: student_logprob")
    if len(logprob) != len(response_ids):
        raise DataError(
            f"{where}: {len(logprob)} student_logprob for {len(response_ids)} response tokens;"
            " the sampler must return one per token"
        )
    if record.finish_reason not in FINISH_REASONS:
        raise DataError(
            f"{where}: finish_reason {record.finish_reason!r}; use one of {FINISH_REASONS}"
        )
    return Record(
        prompt_id=record.prompt_id,
        sample_index=int(record.sample_index),
        prompt_ids=vector(record.prompt_ids, np.int32, f"{where}: prompt_ids"),
        response_ids=response_ids,
        student_logprob=logprob,
        finish_reason=record.finish_reason,
        reward=float(record.reward),
    )
