"""Training curves as SVG text that takes its colours from the page around it.

Each step is another batch, so a metric's own path is mostly the batches' noise: it is drawn
faintly, and a running mean over it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TITLES = {
    "loss": ("Loss", "what the optimizer minimises"),
    "nll": ("Negative log-likelihood", "nats per answer token"),
    "half_squared_advantage": ("Half squared advantage", "½A², nats² per token"),
    "reverse_kl_estimate": ("Reverse KL estimate", "−mean A on the batch, nats per token"),
    "topk_kl": ("Top-k KL", "student to teacher on the teacher's stored tokens, nats per token"),
    "heldout_half_squared_advantage": ("Held-out ½A²", "on held-out rollouts, nats² per token"),
    "heldout_w_std": ("Held-out w", "standard deviation over tokens of held-out rollouts"),
    "heldout_token_log_w": ("Held-out log W", "per token, mean over held-out responses"),
    "heldout_iw_reverse_kl": ("Weighted reverse KL", "held-out rollouts weighted by W, per token"),
    "fresh_reverse_kl": ("Fresh reverse KL", "fresh samples scored by the teacher, per token"),
    "fresh_accuracy": ("Fresh accuracy", "fresh samples of held-out prompts"),
    "heldout_nll": ("Held-out NLL", "nats per token of held-out answers"),
    "heldout_gap": ("Held-out gap", "NLL over the teacher's own, nats per token"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "w": ("Importance weight w", "student over sampling policy; band: ± one standard deviation"),
    "entropy": ("Student entropy", "nats per token"),
    "large_advantage": ("Large advantages", "share of tokens with |A| > 1"),
    "clipped": ("Clipped advantages", "share of tokens with |A| > τ"),
    "update_ratio": ("Update ratio", "size of the update over size of the parameters"),
    "learning_rate": ("Learning rate", "after warm-up and schedule"),
    "tokens_per_second": ("Speed", "response tokens per second of a step"),
    "mfu": ("Model FLOPs utilisation", "of the devices' peak"),
}
"""The known metrics in the order of the page; others follow under their own names."""

_OF_EVALUATIONS = ("heldout_", "fresh_")
_UNSEEN = {
    *("w_std", "warnings", "skipped", "step_seconds", "data_wait", "padding", "memory_gib"),
    *("abs_advantage", "fresh_tokens", "fresh_truncated", "fresh_accuracy_stderr"),
    *("fresh_reverse_kl_stderr", "heldout_iw_reverse_kl_stderr", "heldout_w", "heldout_chi2"),
    *("heldout_effective_share", "heldout_reverse_kl_estimate", "heldout_teacher_nll"),
    "heldout_entropy",
}
"""For `metrics.jsonl` alone."""

SURROGATE = "a surrogate of the sampled objective: its value says nothing, ½A² is the objective's"
"""What the loss of a run of that objective is."""

SMOOTHED_SHARE = 1 / 8
"""The part of a run's points that one point of the running mean stands on."""
_LABELS = {"stage", "run", "step", "tokens", "seconds"}
# Colours that stand for a style of the page; no other part of the drawing has them.
_STYLES = {
    "#010203": "currentColor",
    "#040506": "var(--line)",
    "#070809": "var(--series)",
}
_INK, _LINE, _SERIES = _STYLES


@dataclass(frozen=True)
class Panel:
    """One drawing: its heading, what it shows, and the SVG."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class _Series:
    steps: list[int]
    values: list[float]


def draw_run(entries: Sequence[dict[str, Any]], label: str) -> list[Panel]:
    """The panels of one run's metrics. `label` keeps the ids of a page's drawings apart."""
    names = {name for entry in entries for name in entry} - _LABELS - _UNSEEN
    panels = []
    for name in [*(n for n in TITLES if n in names), *sorted(names - TITLES.keys())]:
        title, caption = TITLES.get(name, (name.replace("_", " "), ""))
        if name == "loss" and "half_squared_advantage" in names and "topk_kl" not in names:
            caption = SURROGATE
        band = _series(entries, "w_std") if name == "w" else None
        series = _series(entries, name)
        smooth = series.values if name == "learning_rate" else running_mean(series.values)
        panels.append(Panel(title, caption, _draw(series, smooth, band, label + name)))
    return panels


def running_mean(values: Sequence[float], share: float = SMOOTHED_SHARE) -> list[float]:
    """Centred means over about `share` of the values; towards an end over as many as there are."""
    reach = int(len(values) * share / 2)
    means = []
    for i, value in enumerate(values):
        window = [x for x in values[max(0, i - reach) : i + reach + 1] if math.isfinite(x)]
        means.append(sum(window) / len(window) if math.isfinite(value) else value)
    return means


def _series(entries: Sequence[dict[str, Any]], name: str) -> _Series:
    later = name.startswith(_OF_EVALUATIONS)  # these are of the state after the step
    points = [(entry["step"] + later, entry[name]) for entry in entries if name in entry]
    return _Series([step for step, _ in points], [value for _, value in points])


def _draw(series: _Series, smooth: list[float], band: _Series | None, salt: str) -> str:
    # Importing matplotlib takes a second; only the report needs it.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "text.color": _INK,
        "axes.edgecolor": _LINE, "axes.labelcolor": _INK, "xtick.color": _INK,
        "ytick.color": _INK, "grid.color": _LINE, "xtick.major.size": 0, "ytick.major.size": 0,
        "axes.formatter.useoffset": False, "axes.formatter.limits": (-4, 5),
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = figure.subplots()
        if band is not None and band.steps == series.steps:
            pairs = list(zip(series.values, band.values, strict=True))
            low, high = [w - std for w, std in pairs], [w + std for w, std in pairs]
            axes.fill_between(series.steps, low, high, color=_SERIES, alpha=0.18, linewidth=0)
        mark = "o" if len(series.steps) == 1 else ""
        if smooth != series.values:
            axes.plot(series.steps, series.values, color=_SERIES, linewidth=0.8, alpha=0.4)
        axes.plot(series.steps, smooth, color=_SERIES, linewidth=1.8, marker=mark)
        axes.set_xlabel("step")
        axes.grid(axis="y", linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _for_page(buffer.getvalue())


def _for_page(svg: str) -> str:
    """Drop the XML head, the metadata and the fixed size; put the page's styles in for colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib)[\w.]*"', "", svg)
    svg = re.sub(r"font: [^;\"]*?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for colour, style in _STYLES.items():
        svg = svg.replace(colour, style)
    return svg
