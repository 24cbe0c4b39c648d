"""A run folder as the pipeline leaves it, with made-up figures."""

from __future__ import annotations

import json
import math

from opd_jax.core.metrics import MetricsWriter


def cost(seconds, tokens):
    speed, hours = tokens / seconds, seconds / 3600
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": speed, "device_hours": hours}


def scores(accuracy, stderr, greedy=None, greedy_stderr=None):
    sampled = {"accuracy": accuracy, "stderr": stderr, "n": 2000}
    return sampled | (
        {"greedy_accuracy": greedy, "greedy_stderr": greedy_stderr} if greedy is not None else {}
    )


SUMMARY = {
    "stages": {
        "answer": cost(12.0, 36000),
        "evaluate.opd": cost(1.0, 700),
        "train.opd": cost(41.5, 290304),
        "sft": cost(18.25, 61440),
    },
    "eval": {
        "teacher": scores(0.999, 0.0007, 1.0, 0.0),
        "opd": scores(0.726, 0.01, 0.81, 0.0088),
        "base": scores(0.03, 0.0038),
        "sft": scores(0.611, 0.0109, 0.659, 0.0106),
        "mine": scores(0.7, 0.01),
    },
    "reverse_kl": {"sft": 0.211, "opd": 0.096},
    "reverse_kl_stderr": {"sft": 0.004, "opd": 0.003},
    "lineage": {
        "opd": {
            "algorithm": "lightning_opd",
            "objective": "sampled",
            "teacher": {"weights": "ab" * 32},
            "teacher_mismatch": False,
        },
        "mine": {"parents": ["sft", "teacher"], "teacher_mismatch": True},
    },
    "teacher_mismatch": {"mine": "the scoring teacher is not the one of the answers: 63.1 < 69.9"},
    "environment": {"jax": "0.10.2", "devices": 1},
}


def make_run(folder):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "config.yaml").write_text("run_dir: runs/toy\nseed: 0\n")
    (folder / "stages").mkdir()
    score = {"seconds": 3.5, "tokens": 7000, "device_seconds": 3.6}
    (folder / "stages" / "score.json").write_text(json.dumps(score))
    (folder / "stages" / "evaluate.mine.started.json").write_text('{"seconds": 9.0}')
    write_metrics(folder)
    write_samples(folder)
    return folder


def write_metrics(folder):
    with MetricsWriter(folder, "sft", "sft") as writer:
        for step in range(0, 121, 5):
            nll = 0.2 + math.exp(-step / 30)
            writer.write(step, {"loss": nll, "nll": nll, "grad_norm": 1 + nll})
    with MetricsWriter(folder, "train", "opd") as writer:
        for step in range(0, 61, 2):
            decay = math.exp(-step / 20)
            figures = {
                "loss": -0.1 * decay,
                "half_squared_advantage": 0.05 + 0.4 * decay,
                "reverse_kl_estimate": 0.09 + 0.12 * decay,
                "grad_norm": 0.4 + decay,
                "w": 1 - 0.06 * (1 - decay),
                "w_std": 0.09 * (1 - decay),
                "clipped": 0.01 * decay,
                "tokens": 4096,
            }
            writer.write(step, figures)


def write_samples(folder):
    for name, response in [("sft", "6*6=36 > 519<b>"), ("teacher", "6*6=36 > 519336")]:
        path = folder / "evaluate" / name / "samples.jsonl"
        path.parent.mkdir(parents=True)
        lines = [
            {"prompt": f"{86556 + i}*6=", "response": response, "answer": "519336", "correct": good}
            for i, good in enumerate([name == "teacher"] * 6)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
