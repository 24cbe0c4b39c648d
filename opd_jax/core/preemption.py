"""SIGTERM, the notice that the machine is about to go: noted, and acted on between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils


class Preemption:
    """While it is entered, SIGTERM ends nothing by itself.

    with Preemption() as notice:
        for step in range(steps):
            ...
            if notice.reached(step): save and stop
    """

    def __init__(self) -> None:
        self._noted = threading.Event()
        self._before: object = None
        self._ours = False

    def __enter__(self) -> Self:
        # Under jax.distributed its own handler tells all processes; elsewhere only the main thread
        # may have one.
        alone = jax.process_count() == 1
        self._ours = alone and threading.current_thread() is threading.main_thread()
        if self._ours:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.set()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)  # pyright: ignore[reportArgumentType]

    def reached(self, step: int) -> bool:
        """Whether to save after this step. All processes have to ask at every step: they agree."""
        if jax.process_count() == 1:
            return self._noted.is_set()
        return bool(multihost_utils.reached_preemption_sync_point(step))
