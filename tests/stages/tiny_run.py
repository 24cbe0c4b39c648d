"""A whole run in seconds: the quickstart's models, few prompts, few steps."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"

TINY = (
    "prompts.sft_limit=24",
    "prompts.opd_limit=16",
    "prompts.eval_limit=12",
    "answer.slots=16",
    "rollout.slots=8",
    "evaluate.slots=16",
    "sft.steps=3",
    "sft.batch_size=4",
    "sft.row_tokens=136",
    "sft.save_every=1",
    "train.runs.opd.steps=3",
    "train.runs.opd.batch_size=8",
    "train.runs.opd.save_every=1",
    "train.runs.opd_topk.steps=2",
    "train.runs.opd_topk.batch_size=8",
    "train.runs.opd_topk.save_every=1",
    "train.runs.opd_online.steps=2",
    "train.runs.opd_online.batch_size=8",
    "train.runs.sft_longer.steps=2",
    "train.runs.sft_longer.batch_size=4",
    *(
        f"train.runs.{name}.{setting}"
        for name in ("opd", "opd_topk", "opd_online", "sft_longer")
        for setting in ("optim.warmup_steps=0", "eval_every=3")
    ),
    *(f"train.runs.{name}.guard.fresh=0" for name in ("opd", "opd_topk", "opd_online")),
    "sft.eval_every=3",
    "score.batch_tokens=512",
    "flush_seconds=0",
)

FRESH = tuple(f"train.runs.{name}.guard.fresh=8" for name in ("opd", "opd_topk", "opd_online"))
"""Evaluations sample and ask the teacher, too: several programs more to compile."""


def arguments(run_dir, *more):
    """The command line of a tiny run."""
    return ["--config", str(CONFIG), f"run_dir={run_dir}", *TINY, *more]
