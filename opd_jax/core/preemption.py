"""SIGTERM, the notice that the machine is about to go: noted, and acted on between two steps."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Generator
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils

from opd_jax.errors import Preempted

_asked = itertools.count()  # how often this process has asked, in all its stages


class Preemption:
    """While it is entered, SIGTERM ends nothing by itself.

    with Preemption() as notice:
        for step in range(steps):
            ...
            notice.ask()
            if notice.came: save and stop
    """

    def __init__(self) -> None:
        self.came = False
        self._raises = False
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
        self.came = True
        if self._raises:
            raise Preempted("SIGTERM")

    @contextlib.contextmanager
    def raised(self, wanted: bool) -> Generator[None]:
        """Within, if it is wanted, SIGTERM raises Preempted: for work that can be given up.

        Among several processes the work itself asks (`told`) and raises: that uses the notice up.
        """
        self._raises = wanted
        try:
            if wanted and self.came:
                raise Preempted("SIGTERM")
            yield
        except Preempted:
            self.came = True
            raise
        finally:
            self._raises = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)  # pyright: ignore[reportArgumentType]

    def ask(self) -> None:
        """All processes have to ask equally often: `came` is then the same on all of them."""
        self.came = self.came or told()


def told() -> bool:
    """Whether SIGTERM came to one of several processes, of which all have to ask equally often.

    For a single process False: there SIGTERM raises, or is noted by `Preemption`.
    """
    # The service says so at one number alone, the next after its last question (0 at first). Steps
    # could miss it: a run that goes on, or the next training, begins with another.
    several = jax.process_count() > 1
    return several and bool(multihost_utils.reached_preemption_sync_point(next(_asked)))


@contextlib.contextmanager
def raising() -> Generator[None]:
    """SIGTERM raises Preempted, as Ctrl-C raises KeyboardInterrupt: a stage can end as it does.

    Only the main thread may do so; among several processes SIGTERM is jax.distributed's.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Preempted("SIGTERM")
