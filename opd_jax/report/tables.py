"""The rows of the results and stages tables, for the page and for the terminal alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIRST, LAST = ("base", "sft", "sft_longer", "opd", "opd_topk", "opd_online"), ("teacher",)
"""The order of the usual checkpoints; others stand between."""

PIPELINE = ("answer", "sft", "rollout", "score", "train", "evaluate", "export", "report")


@dataclass(frozen=True)
class Figure:
    """A mean with its standard error, where one is known."""

    mean: float
    stderr: float | None = None

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """`61.1 ± 1.1`, both multiplied by `scale`."""
        mean = f"{self.mean * scale:.{digits}f}"
        if self.stderr is None:
            return mean
        return f"{mean} ± {self.stderr * scale:.{digits}f}"


@dataclass(frozen=True)
class ResultRow:
    """One checkpoint: accuracies are fractions, reverse KL is in nats per token."""

    name: str
    accuracy: Figure | None
    greedy: Figure | None
    reverse_kl: Figure | None
    problems: int | None

    def cells(self) -> tuple[str, str, str, str]:
        """Accuracy and greedy accuracy in percent, reverse KL, number of problems."""
        percents = [figure.text(100) if figure else "–" for figure in (self.accuracy, self.greedy)]
        kl = self.reverse_kl.text(digits=3) if self.reverse_kl else "–"
        return percents[0], percents[1], kl, f"{self.problems:,}" if self.problems else "–"


@dataclass(frozen=True)
class StageRow:
    """What a stage cost."""

    name: str
    seconds: float | None
    tokens: int | None
    tokens_per_second: float | None
    device_hours: float | None

    def cells(self) -> tuple[str, str, str, str]:
        """Seconds, tokens, tokens/s, device-hours."""
        return (
            "–" if self.seconds is None else f"{self.seconds:,.1f}",
            "–" if not self.tokens else f"{self.tokens:,}",
            "–" if not self.tokens_per_second else f"{self.tokens_per_second:,.0f}",
            "–" if self.device_hours is None else f"{self.device_hours:,.4f}",
        )


def result_rows(summary: Mapping[str, Any]) -> list[ResultRow]:
    """A row for every checkpoint under `eval` or `reverse_kl`, base student first, teacher last."""
    evaluated = summary.get("eval", {})
    kl, kl_stderr = summary.get("reverse_kl", {}), summary.get("reverse_kl_stderr", {})
    rows = []
    for name in in_order([*evaluated, *kl]):
        scores = evaluated.get(name, {})
        rows.append(
            ResultRow(
                name=name,
                accuracy=_figure(scores.get("accuracy"), scores.get("stderr")),
                greedy=_figure(scores.get("greedy_accuracy"), scores.get("greedy_stderr")),
                reverse_kl=_figure(kl.get(name), kl_stderr.get(name)),
                problems=scores.get("n"),
            )
        )
    return rows


TRAINED_AS = {
    ("lightning_opd", "sampled"): "sft, then offline distillation on stored rollouts",
    ("lightning_opd", "topk"): "sft, then offline with the teacher's likeliest tokens everywhere",
    ("opd", "sampled"): "sft, then online distillation: fresh rollouts, live teacher",
    ("opd", "topk"): "sft, then online with the teacher's likeliest tokens everywhere",
    ("sft", "sft"): "the control, sft and then more of the same SFT",
}
"""What a run of an algorithm with an objective is, as its lineage names them."""


def descriptions(names: list[str], lineage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A checkpoint's name with what it is, as far as that is known."""
    fixed = {
        "base": "the student before any training",
        "sft": "the student after SFT on the teacher's answers",
        "teacher": "the model that wrote the SFT answers and scored the rollouts",
    }
    found = []
    for name in names:
        made = lineage.get(name, {})
        trained = TRAINED_AS.get((made.get("algorithm"), made.get("objective")))
        if what := fixed.get(name, trained):
            found.append((name, what))
    return found


def stage_rows(stages: Mapping[str, Mapping[str, Any]]) -> list[StageRow]:
    """A row for every stage that ran, in the order of the pipeline (`train.opd` with `train`)."""
    rows = []
    for name in sorted(stages, key=_place):
        stage = stages[name]
        seconds, tokens = stage.get("seconds"), stage.get("tokens")
        speed, hours = stage.get("tokens_per_second"), stage.get("device_hours")
        if speed is None and tokens and seconds:
            speed = tokens / seconds
        if hours is None and "device_seconds" in stage:
            hours = stage["device_seconds"] / 3600
        rows.append(StageRow(name, seconds, tokens, speed, hours))
    return rows


def _place(stage: str) -> int:
    kind = stage.split(".", maxsplit=1)[0]
    return PIPELINE.index(kind) if kind in PIPELINE else len(PIPELINE)


def in_order(names: list[str]) -> list[str]:
    """Checkpoint names without repeats: the usual ones in their usual order, others between."""
    unique = list(dict.fromkeys(names))
    others = [name for name in unique if name not in FIRST + LAST]
    return [name for name in [*FIRST, *others, *LAST] if name in unique]


def _figure(mean: float | None, stderr: float | None) -> Figure | None:
    return None if mean is None else Figure(mean, stderr)
