"""Is the student still near its rollouts: what an evaluation says, what is best, when to stop.

Without fresh samples nothing tells a better state from a worse one: on the rollouts themselves the
advantage and the weighted reverse KL fall while the student is lost (docs/method.md). What is known
then is whether it still is where its rollouts tell about it; there, more steps are better.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from opd_jax.config_train import GuardConfig, LoopConfig, SFTConfig

Figures = dict[str, float]

JUDGES = (("fresh_reverse_kl", -1), ("fresh_accuracy", 1))
"""What tells which of two states is better, the most trusted first; 1: the larger one is."""
LIMITED = (
    ("heldout_w_std", "w_std", 1, "standard deviation of w on held-out rollouts"),
    ("heldout_token_log_w", "token_log_w", -1, "mean log W per token of held-out rollouts"),
)
"""Figures of drift with their limits in the config; 1: larger ones are beyond it."""
REMEDY = "lower optim.learning_rate, or train fewer steps"
REFRESH = "lower optim.learning_rate, train fewer steps, or sample anew with refresh.every"
"""Where a run may: it trains on stored rollouts, and does not draw new ones yet."""


class Verdict(NamedTuple):
    """What an evaluation means: lines to print, whether it is the best so far, whether to stop."""

    warnings: list[str]
    best: bool
    stop: bool


@dataclass
class Guard:
    """Looks at every evaluation of a run. Its state is kept with the checkpoints.

    Attributes:
        first: figures before the first step.
        best: figures of the best evaluation so far, and the steps done by then.
        peak: the best value of each judge so far. A state that no judge tells from the best one may
            be a little worse: held against that one, ever worse ones could follow each other.
        warned: how many evaluations in a row had a warning.
        limited: whether drift is a danger, as it is for the sampled-token objective. One that knows
            the teacher's distribution finds its way far from its rollouts (docs/method.md).
        remedy: what to do about it, for warnings.
    """

    config: GuardConfig
    first: Figures = field(default_factory=dict)
    best: tuple[Figures, int] | None = None
    warned: int = 0
    limited: bool = True
    peak: Figures = field(default_factory=dict)
    remedy: str = REMEDY

    def look(self, steps: int, figures: Figures) -> Verdict:
        """Judge the figures after `steps` steps."""
        if not self.first:
            self.first = finite(figures)
        better = self._better(figures)
        if better:
            self.best = finite(figures), steps
            self._raise_peak(figures)
        warnings = self._warnings(figures)
        self.warned = self.warned + 1 if warnings else 0
        stop = self.config.action == "stop" and self.warned >= self.config.patience
        return Verdict(warnings, better, stop)

    def _raise_peak(self, figures: Figures) -> None:
        for name, sign in JUDGES:
            if name in figures and (
                name not in self.peak or sign * (figures[name] - self.peak[name]) > 0
            ):
                of_it = (name, f"{name}_stderr")
                self.peak |= finite({key: figures[key] for key in of_it if key in figures})

    def _warnings(self, figures: Figures) -> list[str]:
        if self.config.action == "off":
            return []
        return self._beyond(figures) + self._worse_than_at_first(figures)

    def _beyond(self, figures: Figures) -> list[str]:
        """A line for each limit that is crossed."""
        if not self.limited:
            return []
        return [
            f"{what} is {figures[name]:.3f}, beyond {limit:g}: the student samples them no more; "
            f"{self.remedy}"
            for name, key, sign, what in LIMITED
            if name in figures and sign * (figures[name] - (limit := getattr(self.config, key))) > 0
        ]

    def _better(self, figures: Figures) -> bool:
        """By the first judge that both have and that tells them apart, else by the limits.

        A state with a figure that is not finite is never the best. Two evaluations have the same
        draws, so that reverse KLs are compared as they are; an accuracy has to differ by a standard
        error. Of two states that no judge tells apart the later is better, if within the limits.
        """
        names = [name for name, *_ in (*JUDGES, *LIMITED) if name in figures]
        if not names or not all(math.isfinite(figures[name]) for name in names):
            return False
        if self.best is None:
            return True
        for name, sign in JUDGES:
            if name in figures and name in self.peak:
                change = sign * (figures[name] - self.peak[name])
                margin = _noise(name, figures, self.peak) / 2 if name == "fresh_accuracy" else 0.0
                if abs(change) > margin:
                    return change > 0
        return not self._beyond(figures)

    def _worse_than_at_first(self, figures: Figures) -> list[str]:
        found = []
        for name, sign in JUDGES:
            if name not in figures or name not in self.first:
                continue
            change = sign * (figures[name] - self.first[name])
            if change < -_noise(name, figures, self.first):
                found.append(
                    f"{name} is {figures[name]:.3f}, worse than {self.first[name]:.3f} before "
                    f"training; {self.remedy}"
                )
        return found

    def turn(self) -> None:
        """New rollouts: what was said of the old ones is no measure for them."""
        self.warned = 0
        for figures in (self.first, {} if self.best is None else self.best[0]):
            for name in [name for name in figures if name.startswith("heldout_")]:
                del figures[name]

    def state(self) -> dict[str, Any]:
        """What `restored` needs, as JSON values."""
        kept = {"first": self.first, "best": self.best, "warned": self.warned}
        return {**kept, "peak": self.peak}

    def restored(self, state: dict[str, Any] | None) -> Guard:
        """The same guard as a checkpoint has it; a new one without."""
        if state is None:
            return Guard(self.config, limited=self.limited, remedy=self.remedy)
        best = state["best"]
        found = None if best is None else (dict(best[0]), int(best[1]))
        own = {name: state[name] for name in ("first", "warned", "peak")}
        return dataclasses.replace(self, best=found, **own)


def finite(figures: Figures) -> Figures:
    """The figures that JSON can hold."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _noise(name: str, *figures: Figures) -> float:
    """Two standard errors of a difference; infinite where one is not known, as of one sample."""
    errors = [found.get(f"{name}_stderr", math.nan) for found in figures]
    known = all(math.isfinite(error) for error in errors)
    return 2.0 * math.sqrt(sum(error * error for error in errors)) if known else math.inf


@dataclass
class Saturation:
    """Has SFT learned what it can: the student's NLL of held-out answers over the teacher's own.

    Attributes:
        tolerance: nats a token within which three evaluations are flat.
        stops: whether that ends the run.
        gaps: of the last evaluations.
    """

    tolerance: float
    stops: bool = False
    gaps: list[float] = field(default_factory=list)

    @staticmethod
    def of(loop: LoopConfig, sft: SFTConfig) -> Saturation:
        """As SFT asks for it; a control that continues SFT is only told."""
        return Saturation(sft.saturation, sft.stop_when_saturated and isinstance(loop, SFTConfig))

    def look(self, gap: float) -> str | None:
        """A line to print at the first of three evaluations in a row that are flat."""
        before = self.flat
        self.gaps = [*self.gaps[-2:], gap] if math.isfinite(gap) else []
        if before or not self.flat:
            return None
        return (
            f"SFT has saturated: NLL of held-out answers over the teacher's own is {gap:.4f} nats "
            f"a token, within {self.tolerance:g} for three evaluations; more steps add little"
        )

    @property
    def flat(self) -> bool:
        """Whether the last three evaluations are."""
        return len(self.gaps) == 3 and max(self.gaps) - min(self.gaps) <= self.tolerance
