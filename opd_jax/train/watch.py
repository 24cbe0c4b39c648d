"""The evaluations of a run: when, what they find, which state they keep, and whether to go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_jax.config_train import LoopConfig
from opd_jax.core.distributed import from_first
from opd_jax.model.transformer import Params
from opd_jax.train import checkpoint
from opd_jax.train.guard import Figures, Guard, Saturation, finite
from opd_jax.train.probes import Probe
from opd_jax.train.rounds import Rounds

Report = Callable[[int, Figures, list[str]], None]


@dataclass
class Watch:
    """Evaluates a run and remembers, with its checkpoints, what it found.

    Attributes:
        probes: give the figures, from the parameters.
        report: called with the steps done, the figures and what there is to warn of.
        directory: where the best state is kept.
        guard: judges the figures of OPD; `None`: nothing to judge.
        saturation: judges those of SFT.
        rounds: which of them begin when; `None`: the run has one.
    """

    loop: LoopConfig
    report: Report
    directory: Path
    probes: Sequence[Probe]
    guard: Guard | None = None
    saturation: Saturation | None = None
    rounds: Rounds | None = None
    stopped: bool = field(default=False, init=False)
    _drifted: bool = field(default=False, init=False)

    def due(self, steps: int) -> bool:
        """Whether to evaluate after so many steps: before the first, regularly, and at the end."""
        every = self.loop.eval_every or max(self.loop.steps // 10, 1)
        return bool(self.probes) and (steps % every == 0 or steps == self.loop.steps)

    def look(
        self,
        steps: int,
        current: Callable[[], Params],
        given_up: AbstractContextManager[None] | None = None,
    ) -> None:
        """Evaluate, keep the state if it is the best, and decide whether to go on.

        Args:
            current: gives the parameters.
            given_up: entered while figures are found. What it raises leaves the watch as it was.
        """
        figures: Figures = {}
        with given_up or nullcontext():
            params = current()
            for probe in self.probes:
                figures |= probe(params)
        warnings: list[str] = []
        if self.saturation is not None and steps > self.loop.optim.warmup_steps:
            flat = self.saturation.look(figures["heldout_gap"])
            warnings += [flat] if flat else []
            self.stopped = self.saturation.flat and self.saturation.stops
        if self.guard is not None:
            verdict = self.guard.look(steps, figures)
            warnings += verdict.warnings
            self.stopped = verdict.stop
            self._drifted = steps > 0 and bool(verdict.warnings)
            if verdict.best:
                meta = {"figures": finite(figures)}
                checkpoint.save(self.directory, steps, params, meta, keep=1)
        self.report(steps, figures, warnings)

    def turn(self, steps: int) -> bool:
        """Begin a round if it is time to; the state has to be saved before it is drawn."""
        drifted, self._drifted = self._drifted, False
        if self.rounds is None or not self.rounds.turn(steps, drifted, self.stopped):
            return False
        self.stopped = False
        if self.guard is not None:
            self.guard.turn()
        return True

    def chosen(self, params: Params, abstract: Params) -> tuple[Params, int | None]:
        """The trained model: `params` of the last step, or the best, with its number of steps."""
        if self.guard is None or self.guard.best is None:
            return params, None
        if not self.stopped and self.guard.config.final == "last":
            return params, None
        best, _, steps = checkpoint.restore(self.directory, self.guard.best[1], abstract)
        return best, steps

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        return {
            "stopped": self.stopped,
            "guard": None if self.guard is None else self.guard.state(),
            "gaps": None if self.saturation is None else self.saturation.gaps,
            "rounds": None if self.rounds is None else self.rounds.state(),
        }

    def restore(self, steps: int, state: dict[str, Any] | None, *, unseen: bool = False) -> None:
        """Go on from a checkpoint of so many steps; `None`: begin; `unseen`: it is looked at next.

        A best state that a killed try found later is dropped: this one finds its own.
        """
        if state is not None:
            self.stopped = state["stopped"]
            if self.guard is not None:
                self.guard = self.guard.restored(state["guard"])
            if self.saturation is not None:
                self.saturation.gaps = state["gaps"]
            if self.rounds is not None:
                self.rounds.restore(state["rounds"])
        best = self.guard.best if self.guard is not None else None
        kept = None if best is None else best[1]
        over = self.stopped or (steps == self.loop.steps and not unseen)
        there = from_first(str(kept in checkpoint.complete_steps(self.directory))) == "True"
        if self.guard and not over and not there:
            self.guard.best = kept = None  # that later one has replaced it: the next evaluation is
        checkpoint.discard_others(self.directory, kept)
