"""`--profile`: a trace of a few training steps, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

from pathlib import Path

import jax

FIRST, STEPS = 3, 3  # the first steps compile and fill caches


class Trace:
    """Traces some steps of a run into a folder; without a folder it does nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._steps, self._running = folder, 0, False

    def step(self) -> None:
        """Called before each step."""
        if self._folder is not None and self._steps == FIRST:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        self._steps += 1
        if self._running and self._steps > FIRST + STEPS:
            self.close()

    def close(self) -> None:
        """Writes what there is of it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
