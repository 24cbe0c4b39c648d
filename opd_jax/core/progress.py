"""What a stage shows while it runs: a bar on a terminal, a few plain lines in a log.

Only process 0 prints.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

NAME_WIDTH = 19
LOG_SECONDS = 30.0
"""Time between two lines of a running stage where there is no terminal."""
FIRST_SECONDS = 1.0
"""What is reported this soon after the first report belongs to the same batch."""
BAR_WIDTH = 28
ROOM_FOR_BAR = 120
"""In narrower terminals the words take the place of the bar: they say more."""

_console = Console(soft_wrap=True, highlight=False)


def say(text: str) -> None:
    """Print a line from process 0, above a running bar if there is one."""
    if jax.process_index() == 0:
        _console.print(Text(text))


def stage_line(name: str, text: str) -> str:
    """`text` about a stage, with the names of all stages in one column."""
    return f"{name:<{NAME_WIDTH}} {text}"


class StageProgress:
    """Counts what a stage does and shows it.

        with StageProgress("rollout", total=4000, unit="records") as progress:
            progress.add(1, tokens=53)

    `already` is what an earlier run had done: part of the total, not of the speed. Nor is the time
    up to the first report part of the speed that is shown meanwhile: it is the compiler's.
    """

    def __init__(self, name: str, total: int, unit: str = "records", already: int = 0) -> None:
        self.name, self.total, self.unit, self.already = name, total, unit, already
        self.done, self.tokens = already, 0
        self._note = ""
        self._start = self._last_line = time.monotonic()
        self._first: tuple[float, int, int] | None = None  # when the first batch was in, and what
        self._warm_until = 0.0
        self._stop: float | None = None
        self._bar: Progress | None = None

    @property
    def seconds(self) -> float:
        """Since the start; after the end, the whole duration."""
        return (self._stop or time.monotonic()) - self._start

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def _rates(self) -> tuple[float, float] | None:
        """Units and tokens a second since the first batch; `None` while there is only that."""
        if self._first is None or self.done == self._first[1]:
            return None
        seconds, done, tokens = self._first
        passed = max(time.monotonic() - seconds, 1e-9)
        return (self.done - done) / passed, (self.tokens - tokens) / passed

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if jax.process_index() == 0 and sys.stdout.isatty():
            bar = [BarColumn(BAR_WIDTH)] if _console.width >= ROOM_FOR_BAR else []
            title = stage_line(self.name, "") if bar else self.name
            first, rest = Column(no_wrap=True, min_width=len(title)), Column(no_wrap=True)
            name = TextColumn("{task.description}", table_column=first, markup=False)
            words = TextColumn("{task.fields[told]}", table_column=rest, markup=False)
            self._bar = Progress(name, *bar, words, console=_console, transient=True)
            self._bar.add_task(title, total=self.total, completed=self.done, told=self._told())
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop = time.monotonic()
        if self._bar is not None:
            self._bar.stop()
        say(self._final_line() if kind is None else f"{self._running_line()}  stopped")

    def add(self, count: int = 1, tokens: int = 0, note: str | None = None) -> None:
        """`count` more units with `tokens` tokens are done; `note` is a short text on the line."""
        self.done += count
        self.tokens += tokens
        self._note = self._note if note is None else note
        now = time.monotonic()
        if self._first is None:
            self._warm_until = now + FIRST_SECONDS
        if now < self._warm_until:
            self._first = (now, self.done, self.tokens)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, told=self._told())
        elif time.monotonic() - self._last_line >= LOG_SECONDS:
            self._last_line = time.monotonic()
            say(self._running_line())

    def _running_line(self) -> str:
        return stage_line(self.name, self._told())

    def _told(self) -> str:
        parts = [f"{self.done:,}/{self.total:,} {self.unit}"]
        rates = self._rates()
        if rates and self.tokens:
            parts.append(f"{rates[1]:,.0f} tok/s")
        if rates and self.done < self.total and self._stop is None:
            parts.append(f"{_duration((self.total - self.done) / rates[0])} left")
        return _joined([*parts, self._note])

    def _final_line(self) -> str:
        parts = [f"{self.done:,} {self.unit}"]
        if self.already:
            parts.append(f"({self.already:,} from before)")
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens  {self.tokens_per_second:,.0f} tok/s")
        return stage_line(self.name, _joined([*parts, _duration(self.seconds), self._note]))


def _joined(parts: list[str]) -> str:
    return "  ".join(part for part in parts if part)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
