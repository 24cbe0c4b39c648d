"""What the writers of records and of scores have in common: a buffer that becomes segments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Generic, Self, TypeVar

from opd_jax.data.store_files import StoreFiles
from opd_jax.data.store_segments import next_segment_name

Row = TypeVar("Row")


class SegmentWriter(ABC, Generic[Row]):
    """Buffers rows and commits them as one segment per flush.

    Leaving the context flushes, also on an exception: what was appended is complete.

    Args:
        base: of the segments' names in the store.
        limit: the buffer flushes by itself when the sizes of its rows add up to this.
    """

    def __init__(self, files: StoreFiles, base: str, process_index: int, limit: int) -> None:
        self._files, self._base, self._process_index = files, base, process_index
        self._limit = limit
        self._rows: list[Row] = []
        self._size = 0
        self._begun: tuple[str, int] | None = None  # a segment's name, and how many rows it takes

    @abstractmethod
    def _write(self, name: str, rows: list[Row]) -> None:
        """Writes and commits a segment; the same rows give the same bytes."""

    def _buffer(self, row: Row, size: int) -> None:
        self._rows.append(row)
        self._size += size
        if self._size >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Commits what is buffered; nothing is buffered, nothing is written.

        After an exception in the middle of it the next flush writes the same segment again unless
        its commit is there: under another name the same rows would be there twice.
        """
        while self._rows:
            again = self._begun is not None
            if self._begun is None:
                name = next_segment_name(self._files, self._base, self._process_index)
                self._begun = name, len(self._rows)
            name, count = self._begun
            if not (again and self._files.exists(f"{self._base}commits/{name}.json")):
                self._write(name, self._rows[:count])
            self._rows, self._begun = self._rows[count:], None
        self._size = 0

    def close(self) -> None:
        """Commits the rest."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
