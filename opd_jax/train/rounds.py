"""The rounds of a run: each has rollouts by the student as it is when the round begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from opd_jax.config_train import LoopConfig, RefreshConfig
from opd_jax.data.loader import sequence_steps
from opd_jax.sampling.collect import requests_for
from opd_jax.sampling.queue import Request
from opd_jax.train.probes import held_out


@dataclass
class Rounds:
    """Which rounds of a run have begun. Its state is kept with the checkpoints.

    Attributes:
        steps: of the whole run.
        starts: how many steps were done when each round began; round 0 has the first rollouts.
        snapshots: of the rollouts of each round that has been drawn.
    """

    config: RefreshConfig
    steps: int
    starts: list[int] = field(default_factory=lambda: [0])
    snapshots: list[str] = field(default_factory=list[str])

    @property
    def number(self) -> int:
        """Of the round under way."""
        return len(self.starts) - 1

    @property
    def left(self) -> bool:
        """Whether another one may begin."""
        return self.config.rounds is None or self.number < self.config.rounds

    @property
    def end(self) -> int:
        """How many steps are done when the round under way ends, at the latest."""
        every = self.config.every
        if every is None or not self.left:
            return self.steps
        return min(self.starts[-1] + every, self.steps)

    def due(self, done: int) -> bool:
        """Whether the round under way ends after so many steps, and another one follows."""
        return done == self.end and done < self.steps

    def turn(self, done: int, drifted: bool, stopped: bool) -> bool:
        """Begin a round if it is time to, and say whether it is.

        Args:
            drifted: an evaluation after these steps gave a warning.
            stopped: the guard ends the run, unless drift begins a round.
        """
        drift = self.config.on_drift and drifted and self.left and done < self.steps
        if not drift and (stopped or not self.due(done)):
            return False
        self.starts.append(done)
        return True

    def lineage(self) -> list[dict[str, Any]]:
        """After how many steps each further round began, and with which rollouts."""
        drawn = zip(self.starts[1:], self.snapshots[1:], strict=True)
        return [{"step": start, "rollouts": snapshot} for start, snapshot in drawn]

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        return {"starts": [*self.starts], "snapshots": [*self.snapshots]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.starts, self.snapshots = [*state["starts"]], [*state["snapshots"]]


class PromptPlan(NamedTuple):
    """What a run's rounds sample.

    Attributes:
        everything: all samples of all prompts, as the first rollouts have them.
        steps: which of them each step takes, in the order of `offline_source`.
        kept: which are kept out of training.
    """

    everything: list[Request]
    steps: list[list[int]]
    kept: list[int]

    @staticmethod
    def of(
        prompts: Sequence[tuple[str, Sequence[int]]], samples: int, loop: LoopConfig, seed: int
    ) -> PromptPlan:
        """The plan of a run over `samples` of every prompt."""
        everything = requests_for(sorted(prompts), samples)
        members, kept = held_out([request.prompt_id for request in everything], loop.heldout)
        steps = sequence_steps(len(members), loop.batch_size, seed, loop.steps)
        return PromptPlan(everything, [[members[i] for i in step] for step in steps], kept)

    def requests(self, first: int, end: int) -> list[Request]:
        """What steps `first` to `end` take, each sample once, and what is kept out."""
        taken = dict.fromkeys(i for step in self.steps[first:end] for i in step)
        return [self.everything[i] for i in (*taken, *self.kept)]
