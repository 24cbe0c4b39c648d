"""A teacher pass: log-probs for the response tokens of a store's records, committed on their own.

Scores come in whatever order the scorer batched the records, so a pass has its own record-aligned
axis: a row of scores says which row of which rollout segment it belongs to, and the commit holds
that segment's digest. Token t of the scores is token t of the response; scores of any other length
are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from opd_jax.data.records import Scores
from opd_jax.data.store_arrays import Field
from opd_jax.data.store_files import StoreFiles
from opd_jax.data.store_rows import vector
from opd_jax.data.store_segments import Segment, SegmentCache, write_segment
from opd_jax.data.store_snapshot import RecordView, Snapshot, checked_indices, read_fields
from opd_jax.data.store_writer import SegmentWriter
from opd_jax.errors import DataError

FIELDS = (
    Field("logprob", "float32", "response"),
    Field("topk_ids", "int32", "response", 256, 262_144, "zstd", "shuffle"),
    Field("topk_logprob", "float16", "response", 256, 262_144, "zstd", "shuffle"),
    Field("topk_rest", "float32", "response"),
    Field("entropy", "float32", "response"),
)
WIDE = ("topk_ids", "topk_logprob")  # k values per token
BUFFER_BYTES = 256_000_000


class TeacherPass:
    """An open pass.

    Raises:
        DataError: it is missing or damaged.
    """

    def __init__(self, files: StoreFiles, name: str) -> None:
        self.name = name
        self._files = files
        self._base = f"teacher/{name}/"
        repair = f"run the score stage for pass {name!r}"
        self.meta: dict[str, Any] = files.read_document(self._base + "pass.json", repair)["meta"]
        self._segments = SegmentCache(files, self._base)
        self._index: ScoreIndex | None = None

    @property
    def path(self) -> str:
        """Where it lies."""
        return self._files.path(self._base)

    def committed_records(self, snapshot: RecordView) -> set[int]:
        """Indices of the snapshot's records that have scores.

        Raises:
            DataError: scores belong to another segment of the same name, or a record has two.
        """
        return set(self._refreshed(snapshot).scored().tolist())

    def _refreshed(self, snapshot: RecordView) -> ScoreIndex:
        self._index = ScoreIndex(self._files.path(self._base), self._segments.all(), snapshot)
        return self._index

    def _indexed(self, snapshot: RecordView, wanted: np.ndarray) -> ScoreIndex:
        """The index that has all of `wanted`, re-read only where the one in memory has not."""
        index = self._index
        if index is None or index.snapshot_hash != snapshot.hash or index.lacks(wanted).size:
            index = self._refreshed(snapshot)
        lacking = index.lacks(wanted)
        if lacking.size:
            prompt_id, sample = snapshot.keys[lacking[0]]
            raise DataError(
                f"{self._files.path(self._base)}: no scores for prompt {prompt_id!r}, sample"
                f" {sample} ({lacking.size} of {wanted.size} records lack them);"
                " run the score stage again"
            )
        return index

    def writer(self, snapshot: Snapshot, process_index: int = 0) -> PassWriter:
        """A writer of scores for that snapshot's records."""
        return PassWriter(self._files, self._base, snapshot, process_index)

    def read_many(
        self, snapshot: RecordView, indices: Iterable[int], topk: bool = True
    ) -> list[Scores]:
        """Scores of the records at `indices`, in their order.

        Args:
            topk: whether to read the top-k as well, where it is stored: most of the bytes.

        Raises:
            DataError: a record has none, or they are damaged.
        """
        wanted = checked_indices(indices, len(snapshot))
        index = self._indexed(snapshot, wanted)
        places = index.segment_r[wanted], index.row_r[wanted]
        used = [index.segments[i] for i in set(places[0].tolist())]
        if topk and self.meta.get("top_k"):
            _check_topk(used)
        names = [f.name for f in FIELDS if topk or f.name not in WIDE]
        fields = [name for name in names if all(segment.has(name) for segment in used)]
        rows = read_fields(index.segments, *places, fields)
        return [Scores(**dict(zip(fields, row, strict=True))) for row in rows]

    def verify(self, snapshot: Snapshot) -> None:
        """Reads every score of the snapshot's records.

        Raises:
            DataError: names the first damaged piece.
        """
        for segment in self._refreshed(snapshot).segments:
            segment.verify()


def _check_topk(segments: Iterable[Segment]) -> None:
    for segment in segments:
        lacking = [name for name in WIDE if not segment.has(name)]
        if lacking:
            raise DataError(
                f"{segment.path}: has no {lacking[0]}, and pass.json says that the top-k is stored;"
                f" {segment.repair}"
            )


class ScoreIndex:
    """Where each record of a snapshot has its scores.

    Attributes:
        segment_r: which of `segments` holds record r's scores, -1 where none does.
        row_r: the row there.
    """

    def __init__(self, path: str, segments: list[Segment], snapshot: RecordView) -> None:
        self.snapshot_hash = snapshot.hash
        self.segments = segments
        self.segment_r = np.full(len(snapshot), -1, np.int64)
        self.row_r = np.zeros(len(snapshot), np.int64)
        self._path = path
        self._record_at = _record_numbers(snapshot)
        self._digests = {segment.name: segment.digest for segment in snapshot.segments}
        response_len = snapshot.lengths()[1]
        for number, segment in enumerate(segments):
            self._enter(number, segment, response_len)

    def _enter(self, number: int, segment: Segment, response_len: np.ndarray) -> None:
        for source, (name, digest) in enumerate(segment.commit["scored_segments"]):
            if name not in self._record_at:
                continue  # a segment that this snapshot does not hold
            if digest != self._digests[name]:
                raise self._stale(segment, name)
            rows = np.flatnonzero(segment.columns["source"] == source)
            records = self._record_at[name][segment.columns["source_row"][rows]]
            if (segment.columns["len_response"][rows] != response_len[records]).any():
                raise self._stale(segment, name)
            taken = records[self.segment_r[records] >= 0]
            if taken.size:
                other = self.segments[self.segment_r[taken[0]]].name
                raise DataError(
                    f"{self._path}: record {taken[0]} has scores in {other} and in {segment.name};"
                    f" delete {self._path}commits/{segment.name}.json"
                )
            self.segment_r[records], self.row_r[records] = number, rows

    def _stale(self, segment: Segment, name: str) -> DataError:
        return DataError(
            f"{self._path}: {segment.name} scored another segment {name} than the snapshot holds;"
            f" delete {self._path} and run the score stage again"
        )

    def scored(self) -> np.ndarray:
        """Sorted indices of records with scores."""
        return np.flatnonzero(self.segment_r >= 0)

    def lacks(self, wanted: np.ndarray) -> np.ndarray:
        """Those of `wanted` without scores."""
        return wanted[self.segment_r[wanted] < 0]


def _record_numbers(snapshot: RecordView) -> dict[str, np.ndarray]:
    """For each segment's name, the record index of each of its rows."""
    segment_r, row_r = snapshot.places()
    numbers = [np.zeros(len(segment), np.int64) for segment in snapshot.segments]
    for record, (number, row) in enumerate(zip(segment_r, row_r, strict=True)):
        numbers[number][row] = record
    return {s.name: rows for s, rows in zip(snapshot.segments, numbers, strict=True)}


class PassWriter(SegmentWriter[tuple[int, Scores]]):
    """Takes the scores of records, each with the record's index in the snapshot."""

    def __init__(
        self, files: StoreFiles, base: str, snapshot: Snapshot, process_index: int
    ) -> None:
        super().__init__(files, base, process_index, BUFFER_BYTES)
        self._snapshot = snapshot
        self._places = snapshot.places()
        self._response_len = snapshot.lengths()[1]
        self._seen: set[int] = set()

    def append(self, record_index: int, scores: Scores) -> None:
        """Takes a copy of one record's scores; a full buffer flushes by itself.

        Raises:
            DataError: they are not one per response token, or the record has some already.
        """
        checked_indices([record_index], len(self._snapshot))
        checked = self._checked(record_index, scores)
        self._seen.add(record_index)
        size = sum(array.nbytes for array in _arrays(checked).values())
        self._buffer((record_index, checked), size)

    def _checked(self, record_index: int, scores: Scores) -> Scores:
        prompt_id, sample = self._snapshot.keys[record_index]
        where = f"scores of prompt {prompt_id!r}, sample {sample}"
        tokens = int(self._response_len[record_index])
        if record_index in self._seen:
            raise DataError(f"{where}: appended twice; score each record once")
        if (scores.topk_ids is None) != (scores.topk_logprob is None):
            raise DataError(f"{where}: top-k ids and log-probs come together or not at all")
        given = _arrays(scores)
        if self._rows and given.keys() != _arrays(self._rows[0][1]).keys():
            names = ", ".join(given)
            raise DataError(f"{where}: has {names}, the others differ; give all the same")
        arrays = {
            field.name: vector(
                given[field.name],
                np.dtype(field.dtype).type,
                f"{where}: {field.name}",
                rank=2 if field.name in WIDE else 1,
            )
            for field in FIELDS
            if field.name in given
        }
        checked = Scores(**arrays)
        self._check_width(checked, where)
        for array in arrays.values():
            if len(array) != tokens:
                raise DataError(
                    f"{where}: {len(array)} scores for a response of {tokens} tokens;"
                    " score the stored tokens, one value per token"
                )
        return checked

    def _check_width(self, scores: Scores, where: str) -> None:
        if scores.topk_ids is None or scores.topk_logprob is None:
            return
        first = (self._rows[0][1] if self._rows else scores).topk_ids
        before = 0 if first is None else first.shape[1]
        widths = scores.topk_ids.shape[1], scores.topk_logprob.shape[1]
        if not widths[0] == widths[1] == before > 0:
            raise DataError(
                f"{where}: top-k widths {widths[0]} and {widths[1]}, others {before};"
                " give one k for the whole pass"
            )

    def _write(self, name: str, rows: list[tuple[int, Scores]]) -> None:
        records = np.array([index for index, _ in rows], np.int64)
        held, source = np.unique(self._places[0][records], return_inverse=True)
        scored = [self._snapshot.segments[number] for number in held]
        columns = {"source": source.astype(np.int64), "source_row": self._places[1][records]}
        arrays = [_arrays(scores) for _, scores in rows]
        extra = {"scored_segments": [[segment.name, segment.digest] for segment in scored]}
        held_fields = [field for field in FIELDS if field.name in arrays[0]]
        ragged = [(field, [row[field.name] for row in arrays]) for field in held_fields]
        write_segment(self._files, self._base, name, ragged, lambda: columns, extra)


def _arrays(scores: Scores) -> dict[str, np.ndarray]:
    """The arrays that are there, by the names of FIELDS."""
    found = {field.name: getattr(scores, field.name) for field in FIELDS}
    return {name: array for name, array in found.items() if array is not None}
