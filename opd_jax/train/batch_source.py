"""What the training loop takes its batches from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from opd_jax.model.transformer import Params

NextBatch = Callable[[int, Callable[[], Params]], Any]
"""(step, current) -> host batch; `current()` gives the parameters of that step, which cost
something to make where only adapters are trained."""


class Source(NamedTuple):
    """Where batches come from: what step s gets does not depend on where a run started.

    Attributes:
        start: from the step to start at to the batches from there on.
        pieces: into how many micro-batches a step cuts each.
        stride: a run can only be resumed at a multiple of so many steps.
        names: the records that a step takes, for messages.
        draws: a batch is sampled when it is asked for, at each multiple of `stride`.
    """

    start: Callable[[int], NextBatch]
    pieces: int = 1
    stride: int = 1
    names: Callable[[int], list[str]] | None = None
    draws: bool = False
