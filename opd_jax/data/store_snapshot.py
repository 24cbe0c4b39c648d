"""Frozen content of a store: which records, in which order, and the hash that names just that."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from opd_jax.data.records import Record, blank_record
from opd_jax.data.store_files import StoreFiles
from opd_jax.data.store_rows import FINISH_REASONS, record_digest, record_keys
from opd_jax.data.store_segments import Segment, SegmentCache
from opd_jax.errors import DataError


class RecordOrder:
    """Records of some segments by (prompt id, sample index), whoever wrote what and when.

    Attributes:
        keys: the sorted (prompt id, sample index) pairs.
        segment_r: for each record, which of `segments` holds it.
        row_r: its row there.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = list(segments)
        rows = sorted(
            (key, index, row)
            for index, segment in enumerate(segments)
            for row, key in enumerate(record_keys(segment.columns))
        )
        self.keys = [key for key, _, _ in rows]
        self.segment_r = np.array([index for _, index, _ in rows], np.int64)
        self.row_r = np.array([row for _, _, row in rows], np.int64)

    def duplicates(self) -> Iterator[tuple[tuple[str, int], str, str]]:
        """Every pair that was committed twice, and the names of the two segments."""
        for index in range(1, len(self.keys)):
            if self.keys[index] == self.keys[index - 1]:
                first, second = self.segment_r[index - 1], self.segment_r[index]
                yield self.keys[index], self.segments[first].name, self.segments[second].name

    def refuse_duplicates(self) -> None:
        """Raises DataError naming the first pair that was committed twice."""
        for key, first, second in self.duplicates():
            raise DataError(
                f"prompt {key[0]!r}, sample {key[1]} was committed twice, in {first} and"
                f" {second}; delete commits/{second}.json and run the stage again"
            )

    def column(self, name: str) -> np.ndarray:
        """A column of all segments in record order."""
        parts = [segment.columns[name] for segment in self.segments]
        offsets = np.cumsum([0, *(len(part) for part in parts)])
        return np.concatenate(parts)[offsets[self.segment_r] + self.row_r]

    def content_hash(self) -> str:
        """sha256 over the records' digests in order."""
        return hashlib.sha256(self.column("digest").tobytes()).hexdigest()


def committed_segments(files: StoreFiles, cache: SegmentCache) -> list[Segment]:
    """The segments that hold anything.

    Raises:
        DataError: there are none, or one is damaged.
    """
    segments = [segment for segment in cache.all() if len(segment)]
    if not segments:
        raise DataError(f"{files.root}: nothing is committed; run the stage that writes it first")
    return segments


def freeze(files: StoreFiles, cache: SegmentCache) -> Snapshot:
    """Writes the snapshot of all that is committed now."""
    segments = committed_segments(files, cache)
    order = RecordOrder(segments)
    order.refuse_duplicates()
    snapshot_hash = order.content_hash()
    body = {
        "records": len(order.keys),
        "segments": [{"name": s.name, "digest": s.digest} for s in segments],
    }
    files.write_document(f"snapshots/{snapshot_hash}.json", body)
    return Snapshot(files, cache, snapshot_hash)


class RecordView:
    """Records in the order of their keys, open for reading, frozen or not.

    Attributes:
        hash: names the content; independent of segments, processes and time.
        keys: (prompt id, sample index) per record, sorted.
        rewards: float64 [r], NaN where nothing was graded.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._order = RecordOrder(segments)
        self.hash = self._order.content_hash()
        self.keys = self._order.keys
        self._finish = self._order.column("finish")
        self.rewards = self._order.column("reward")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def segments(self) -> list[Segment]:
        """Where the records lie."""
        return self._order.segments

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(segment index, row in it) of each record."""
        return self._order.segment_r, self._order.row_r

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response lengths, int64 [r] each, without reading a token."""
        return self._lengths

    @functools.cached_property
    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        return self._order.column("len_prompt"), self._order.column("len_response")

    def truncated(self) -> float:
        """Share of the responses that the limit cut."""
        return float((self._finish == FINISH_REASONS.index("length")).mean())

    def read_many(self, indices: Iterable[int]) -> list[Record]:
        """The records at `indices`, in their order; all reads are in flight together.

        Raises:
            DataError: a chunk is missing or damaged.
        """
        wanted = checked_indices(indices, len(self))
        places = self._order.segment_r[wanted], self._order.row_r[wanted]
        fields = ("prompt_ids", "response_ids", "student_logprob")
        tokens = read_fields(self.segments, *places, fields)
        return [
            self._record(index, *row) for index, row in zip(wanted.tolist(), tokens, strict=True)
        ]

    def blank(self, index: int) -> Record:
        """Zeros in the place of a record that is not read."""
        prompt_r, response_r = self._lengths
        return blank_record(self.keys[index], int(prompt_r[index]), int(response_r[index]))

    def _record(
        self, index: int, prompt: np.ndarray, response: np.ndarray, logprob: np.ndarray
    ) -> Record:
        prompt_id, sample = self.keys[index]
        finish = FINISH_REASONS[self._finish[index]]
        reward = float(self.rewards[index])
        return Record(prompt_id, sample, prompt, response, logprob, finish, reward)

    def verify(self) -> None:
        """Reads everything and compares every record with the digest taken when it was written.

        Raises:
            DataError: names the first damaged piece.
        """
        index_at = {
            place: index
            for index, place in enumerate(
                zip(self._order.segment_r.tolist(), self._order.row_r.tolist(), strict=True)
            )
        }
        fields = ("prompt_ids", "response_ids", "student_logprob")
        for number, segment in enumerate(self.segments):
            segment.verify()
            columns = zip(*(segment.read_field(field) for field in fields), strict=True)
            for row, tokens in enumerate(columns):
                record = self._record(index_at[number, row], *tokens)
                if record_digest(record) != segment.columns["digest"][row].tobytes():
                    raise DataError(
                        f"{segment.path}: row {row} is not the record written; {segment.repair}"
                    )


class Snapshot(RecordView):
    """A frozen snapshot, open for reading.

    Raises:
        DataError: it is missing or damaged, or a segment is not the one that was frozen.
    """

    def __init__(self, files: StoreFiles, cache: SegmentCache, snapshot_hash: str) -> None:
        key = f"snapshots/{snapshot_hash}.json"
        body = files.read_document(key, "freeze the store again by running the stage that wrote it")
        self.path = files.path(key)
        segments = cache.load([entry["name"] for entry in body["segments"]])
        for segment, entry in zip(segments, body["segments"], strict=True):
            self._check(segment, entry["digest"])
        super().__init__(segments)
        if self.hash != snapshot_hash:
            raise DataError(f"{self.path}: is not the snapshot its name says; freeze again")

    def _check(self, segment: Segment, digest: str) -> None:
        if segment.digest != digest:
            raise DataError(
                f"{self.path}: segment {segment.name} is not the one that was frozen;"
                " freeze the store again and redo what was made from this snapshot"
            )


def checked_indices(indices: Iterable[int], records: int) -> np.ndarray:
    """`indices` as an array, all within the snapshot: a negative one would silently wrap."""
    wanted = np.array(list(indices), np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= records):
        raise IndexError(f"record {wanted.min()} to {wanted.max()} of a snapshot of {records}")
    return wanted


def read_fields(
    segments: Sequence[Segment], segment_r: np.ndarray, row_r: np.ndarray, fields: Sequence[str]
) -> list[tuple[np.ndarray, ...]]:
    """Rows of several fields and segments; every read is issued before the first is awaited."""
    groups = [np.flatnonzero(segment_r == number) for number in np.unique(segment_r)]
    pending = [
        [segments[int(segment_r[group[0]])].start_rows(field, row_r[group]) for field in fields]
        for group in groups
    ]
    rows: list[tuple[np.ndarray, ...]] = [()] * len(segment_r)
    for group, reads in zip(groups, pending, strict=True):
        values = zip(*(read() for read in reads), strict=True)
        for position, value in zip(group.tolist(), values, strict=True):
            rows[position] = value
    return rows
