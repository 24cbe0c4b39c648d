"""Device-seconds to the same student, offline and online, from the same student after SFT.

    python benchmarks/cost.py

On the quickstart's models: `opd` (offline) and `opd_online` (fresh samples and a live teacher in
each step) with the same objective, learning rate and batch. Both are evaluated every 6 of 60 steps
on fresh samples of held-out prompts, scored by the teacher (not counted). `quality` is the worse of
their two best reverse KLs; a side's cost is what it had spent when it first was as good: offline
the rollouts, their scores and its steps, online its steps, each as long as the median one. A short
first run of each seed, not counted, leaves its compiled programs for the one that is: what compiles
once is no cost of a method. `speedup` is online over offline, the median of the seeds; the paper
reports 3.6 to 4.0 for models of 4 and 8 billion parameters.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from common import ROOT, report

EVERY, STEPS = 6, 60
SIDES = ("opd", "opd_online")


def run_seed(seed, run_dir, compiled, steps=STEPS):
    """Train both sides; leaves metrics and stage records in `run_dir`, programs in `compiled`."""
    guard = "guard={teacher: true, fresh: 200, action: 'off'}"
    settings = (f"steps={steps}", f"eval_every={EVERY}", "heldout=400", guard)
    command = [
        *(sys.executable, "-m", "opd_jax.main"),
        *("--config", str(ROOT / "configs" / "quickstart.yaml")),
        *("--stages", "answer,sft,rollout,score,train"),
        *(f"run_dir={run_dir}", f"seed={seed}", f"train.enabled=[{','.join(SIDES)}]"),
        f"compile_cache={compiled}",
        *(f"train.runs.{side}.{setting}" for side in SIDES for setting in settings),
    ]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)


def side(run_dir, name):
    """Reverse KL after so many steps, and the seconds that these steps took."""
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    mine = [line for line in lines if line["stage"] == "train" and line["run"] == name]
    seconds = {line["step"] + 1: line["step_seconds"] for line in mine if "step_seconds" in line}
    typical = median(seconds.values())  # the first step compiles
    kl = {line["step"] + 1: line["fresh_reverse_kl"] for line in mine if "fresh_reverse_kl" in line}
    return kl, {step: step * typical for step in kl}


def stage_seconds(run_dir, name):
    return json.loads((run_dir / "stages" / f"{name}.json").read_text())["seconds"]


def compare(run_dir):
    """Quality, and what each side had spent when it first had it."""
    kls, spent = zip(*(side(run_dir, name) for name in SIDES), strict=True)
    quality = max(min(kl.values()) for kl in kls)
    first = [next(step for step in sorted(kl) if kl[step] <= quality) for kl in kls]
    once = {name: stage_seconds(run_dir, name) for name in ("rollout", "score")}
    return {
        "quality": quality,
        **once,
        "train": spent[0][first[0]],
        "steps": first[0],
        "offline": sum(once.values()) + spent[0][first[0]],
        "online": spent[1][first[1]],
        "online_steps": first[1],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    given = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        root, compiled = given.keep or Path(scratch), Path(scratch) / "compiled"
        for seed in given.seeds:
            run_seed(seed, Path(scratch) / f"first{seed}", compiled, EVERY)
            run_seed(seed, root / f"seed{seed}", compiled)
            rows[seed] = compare(root / f"seed{seed}")
    print("device-seconds until the reverse KL of fresh samples is first as low as `quality`")
    print(f"{'seed':>4} {'quality':>8} {'rollout':>8} {'score':>7} {'train':>12} {'offline':>8}"
          f" {'online':>14} {'speed-up':>9}")  # fmt: skip
    for seed, row in rows.items():
        train = f"{row['train']:.1f} ({row['steps']})"
        online = f"{row['online']:.1f} ({row['online_steps']})"
        print(
            f"{seed:4} {row['quality']:8.3f} {row['rollout']:8.1f} {row['score']:7.1f} {train:>12} "
            f"{row['offline']:8.1f} {online:>14} {row['online'] / row['offline']:9.2f}"
        )
    figures = {
        key: median(row[key] for row in rows.values())
        for key in ("quality", "rollout", "score", "train", "offline", "online")
    }
    figures["speedup"] = median(row["online"] / row["offline"] for row in rows.values())
    report("cost", figures)


if __name__ == "__main__":
    main()
