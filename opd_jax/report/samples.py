"""Which samples the page shows: above all those on which training made a difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd_jax.report.tables import in_order

SHOWN = 4
START, UNTRAINED = "sft", ("base", "sft", "teacher")


@dataclass(frozen=True)
class Example:
    """A prompt with its answer and what every checkpoint said to it."""

    prompt: str
    answer: str | None
    responses: dict[str, dict[str, Any]] = field(default_factory=dict)

    def correct(self, checkpoint: str) -> bool | None:
        """Whether the checkpoint was right; `None` if it was not asked or not graded."""
        return self.responses.get(checkpoint, {}).get("correct")


def pick_examples(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[list[Example], str]:
    """A few examples, and a sentence on how they were picked.

    First where the student after SFT is wrong and the first trained run right, one where that run
    is wrong, then where checkpoints disagree, then the rest; each kind in the order of the file.
    """
    examples = _examples(samples)
    trained = [name for name in in_order(list(samples)) if name not in UNTRAINED]
    after = trained[0] if trained else ""
    if not any(_verdicts(example, [START, after]) for example in examples):
        return examples[:SHOWN], f"The first of {len(examples):,} prompts."
    gained = [e for e in examples if e.correct(START) is False and e.correct(after) is True]
    failed = [e for e in examples if e.correct(after) is False]
    disputed = [e for e in examples if len(_verdicts(e, [START, *trained])) > 1]
    one_failed = failed[:1]
    chosen = [*gained[: SHOWN - len(one_failed)], *one_failed]
    for example in [*disputed, *examples]:
        if len(chosen) < SHOWN and example not in chosen:
            chosen.append(example)
    how = (
        f"Picked from the first {len(examples):,} prompts, each with one sample at temperature 1: "
        f"{START} is wrong and {after} right on {len(gained):,} of them (these come first), "
        f"{after} is wrong on {len(failed):,} (one is shown); then others on which "
        "checkpoints disagree, then any."
    )
    return chosen, how


def _examples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Example]:
    by_prompt: dict[str, Example] = {}
    for checkpoint in in_order(list(samples)):
        for sample in samples[checkpoint]:
            prompt = str(sample["prompt"])
            example = by_prompt.setdefault(prompt, Example(prompt, sample.get("answer")))
            example.responses.setdefault(checkpoint, dict(sample))
    return list(by_prompt.values())


def _verdicts(example: Example, checkpoints: Sequence[str]) -> set[bool]:
    found = {example.correct(name) for name in checkpoints}
    return {verdict for verdict in found if verdict is not None}
