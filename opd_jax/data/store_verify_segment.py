"""Everything that can be wrong with one segment by itself: all of it, not the first of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opd_jax.data.records import Record
from opd_jax.data.store_arrays import StoredArray
from opd_jax.data.store_files import StoreFiles
from opd_jax.data.store_rows import FINISH_REASONS, record_digest, record_keys
from opd_jax.data.store_segments import read_columns, segment_repair
from opd_jax.errors import DataError

ROUNDING = 1e-4
"""A sampler's log-prob may exceed 0 by as much; a teacher's score is cut at 0 when it is stored."""
ROLLOUT_COLUMNS = ("sample_index", "finish", "reward", "name_len", "digest")
TOKEN_FIELDS = ("prompt_ids", "response_ids", "student_logprob")
PASS_COLUMNS = ("source", "source_row")
Rows = list[np.ndarray | None]


@dataclass
class Findings:
    """What was found: `problems` are damage, `notes` are worth knowing. One line each."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, path: str, what: str, repair: str) -> None:
        """A problem, in the form that errors have."""
        self.problems.append(f"{path}: {what}; {repair}")

    @contextmanager
    def caught(self) -> Generator[None]:
        """Notes what the store's own readers raise inside."""
        try:
            yield
        except DataError as error:
            self.problems.append(str(error))


@dataclass
class CheckedSegment:
    """A segment as far as it could be read.

    Attributes:
        columns: `None` where they are damaged or contradict themselves.
        rows: for each field that was opened, its rows; `None` for a row that cannot be read.
    """

    name: str
    path: str
    repair: str
    commit: dict[str, Any]
    columns: dict[str, np.ndarray] | None
    rows: dict[str, Rows] = field(default_factory=dict)

    def label(self, row: int) -> str:
        """Which record that is, for people."""
        if self.columns is None or "name_len" not in self.columns:
            return f"row {row}"
        prompt_id, sample = record_keys(self.columns)[row]
        return f"prompt {prompt_id!r}, sample {sample}"

    def report(self, found: Findings, rows: Sequence[int], what: str, path: str = "") -> None:
        """One line for all the `rows` with the same thing wrong."""
        if rows:
            total = self.commit["records"]
            counted = f"{len(rows)} of {total} records (first: {self.label(rows[0])}) {what}"
            found.add(path or self.path, counted, self.repair)


def check_segment(
    files: StoreFiles, base: str, name: str, fields: Sequence[str], found: Findings
) -> CheckedSegment | None:
    """Commit, columns, every chunk of every array; `None` where the commit cannot be read.

    Args:
        fields: arrays that must be there.
    """
    path, repair = files.path(f"{base}data/{name}"), segment_repair(files, base, name)
    with found.caught():
        commit = files.read_document(f"{base}commits/{name}.json", repair)
        segment = CheckedSegment(name, path, repair, commit, None)
        missing = [f for f in fields if f not in commit["fields"]]
        if commit["segment"] != name or missing:
            where = files.path(f"{base}commits/{name}.json")
            what = f"lacks {', '.join(missing)}" if missing else f"is of {commit['segment']!r}"
            found.add(where, what, repair)
        with found.caught():
            segment.columns = read_columns(files, base, name, commit)
        _check_columns(segment, found, bool(base))
        for field_name, described in commit["fields"].items():
            _check_array(files, base, segment, field_name, described, found)
        return segment
    return None


def _check_columns(segment: CheckedSegment, found: Findings, scores: bool) -> None:
    """Drops columns that no row could be read by."""
    columns, records = segment.columns, segment.commit["records"]
    if columns is None:
        return
    fields = segment.commit["fields"].values()
    spans = sorted({f"{end}_{f['axis']}" for f in fields for end in ("start", "len")})
    wanted = [*spans, *(PASS_COLUMNS if scores else ROLLOUT_COLUMNS)]
    wrong = [name for name in wanted if name not in columns or len(columns[name]) != records]
    if wrong:
        what = f"column {wrong[0]!r} has not the {records} rows of the commit"
    else:
        lengths = {f["axis"]: f["metadata"]["shape"][0] for f in fields}
        what = next((f"{axis}s overlap or end beyond their array" for axis, length in
                     lengths.items() if not _apart(columns, axis, length)), "")  # fmt: skip
        if not what and not scores:
            what = _wrong_values(columns)
    if what:
        found.add(f"{segment.path}/records.npz", what, segment.repair)
        segment.columns = None


def _apart(columns: dict[str, np.ndarray], axis: str, length: int) -> bool:
    starts, sizes = columns[f"start_{axis}"], columns[f"len_{axis}"]
    ends = np.append(starts[1:], length)
    return bool((starts >= 0).all() and (sizes >= 0).all() and (starts + sizes <= ends).all())


def _wrong_values(columns: dict[str, np.ndarray]) -> str:
    names, finish = columns["name_len"], columns["finish"]
    if (names < 0).any() or names.sum() != len(columns.get("name_bytes", ())):
        return "name_len does not add up to name_bytes"
    if ((finish < 0) | (finish >= len(FINISH_REASONS))).any():
        return f"finish is not an index of {FINISH_REASONS}"
    return ""


def _check_array(
    files: StoreFiles,
    base: str,
    segment: CheckedSegment,
    name: str,
    described: dict[str, Any],
    found: Findings,
) -> None:
    folder = f"{base}data/{segment.name}/{name}/"
    with found.caught():
        array = StoredArray(files, folder, described, segment.repair)
        with found.caught():
            array.verify_metadata()
        columns, axis = segment.columns, described["axis"]
        if columns is None:
            spans = [(0, array.shape[0])]
        else:
            starts, sizes = columns[f"start_{axis}"], columns[f"len_{axis}"]
            spans = list(zip(starts.tolist(), (starts + sizes).tolist(), strict=True))
        try:
            flat = array.read_all()
            rows: Rows = [flat[start:end] for start, end in spans]
        except DataError as error:
            rows = _salvage(array, spans, segment, found, str(error))
        if columns is not None:
            segment.rows[name] = rows


def _salvage(
    array: StoredArray,
    spans: list[tuple[int, int]],
    segment: CheckedSegment,
    found: Findings,
    error: str,
) -> Rows:
    """The rows that can be read; a line for each file that holds others."""
    size = array.shard_tokens
    pieces = [
        (row, shard, (max(start, shard * size), min(end, (shard + 1) * size)))
        for row, (start, end) in enumerate(spans)
        for shard in range(start // size, -(-end // size))
    ]
    parts: dict[int, list[np.ndarray]] = {}
    failed: dict[int, list[int]] = {}
    causes: dict[int, str] = {}
    for (row, shard, _), value in zip(
        pieces, array.read_spans([p[2] for p in pieces]), strict=True
    ):
        if isinstance(value, str):
            failed.setdefault(shard, []).append(row)
            causes.setdefault(shard, value)
        else:
            parts.setdefault(row, []).append(value)
    for shard, rows in sorted(failed.items()):
        path = array.shard_path(shard)
        cause = f"cannot be read ({_without_files(causes[shard])})"
        if segment.columns is None:
            found.add(path, cause, segment.repair)
        else:
            segment.report(found, rows, cause, path)
    if not failed:
        found.problems.append(error)
    bad = {row for rows in failed.values() for row in rows}
    empty = np.zeros((0, *array.shape[1:]), np.int32)
    return [None if r in bad else np.concatenate(parts.get(r, [empty])) for r in range(len(spans))]


def _without_files(cause: str) -> str:
    """The line names the file already."""
    return re.sub(r' in (local file )?"[^"]*"', "", cause)


def check_records(segment: CheckedSegment, found: Findings) -> None:
    """Every record's digest, ids and log-probs."""
    columns = segment.columns
    if columns is None or not all(name in segment.rows for name in TOKEN_FIELDS):
        return
    prompts, responses, logprobs = (segment.rows[name] for name in TOKEN_FIELDS)
    other: list[int] = []
    for row, (key, *tokens) in enumerate(
        zip(record_keys(columns), prompts, responses, logprobs, strict=True)
    ):
        if any(part is None for part in tokens):
            continue
        finish, reward = FINISH_REASONS[columns["finish"][row]], float(columns["reward"][row])
        record = Record(*key, *tokens, finish, reward)  # type: ignore[arg-type]
        if record_digest(record) != columns["digest"][row].tobytes():
            other.append(row)
    segment.report(found, other, "are not what was written: their digests differ")
    for name in ("prompt_ids", "response_ids"):
        bad = rows_where(segment.rows[name], lambda ids: ids < 0)
        segment.report(found, bad, "have negative token ids", f"{segment.path}/{name}")
    bad = rows_where(logprobs, lambda x: ~(np.isfinite(x) & (x <= ROUNDING)))
    where = f"{segment.path}/student_logprob"
    segment.report(found, bad, "have log-probs that are not finite or above 0", where)


def rows_where(rows: Rows, wrong: Callable[[np.ndarray], np.ndarray]) -> list[int]:
    """The rows, among those that could be read, of which any element is `wrong`."""
    return [n for n, row in enumerate(rows) if row is not None and bool(wrong(row).any())]
