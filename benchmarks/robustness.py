"""What each objective bears: accuracy and fresh reverse KL over learning rates and steps.

    python benchmarks/robustness.py --keep runs/robustness

On the quickstart's models: every objective at 0.3 to 30 times the learning rate of the quickstart's
`opd` run, evaluated every 30 of 300 steps on fresh samples of held-out prompts (which training
never sees), scored by the teacher; three seeds. Prints a table of the last step and of the best,
and how well the figures that need no teacher tell runs that are lost; `--write` puts the whole into
`docs/robustness.json` and `docs/robustness.svg`. Hours on two cores: a run folder that is kept goes
on where it was stopped, and `--seeds`, `--rates` and `--objectives` choose a part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from common import ROOT, report

BASE_RATE = 2e-5
RATES = (0.3, 1.0, 3.0, 10.0, 30.0)
STEPS, EVERY = 300, 30
TOPK = {
    f"top{k}{'_tail' if tail else ''}": {"objective": "topk", "support": k, "tail": tail}
    for k in (1, 4, 16)
    for tail in (False, True)
    if k > 1 or tail  # a support of one token, divided by its mass, has no loss
}
OBJECTIVES = {
    "sampled": {"objective": "sampled"},
    "capped": {"objective": "sampled", "weight_cap": 2.0},
    **TOPK,
    "online": {"algorithm": "opd", "objective": "sampled"},
}
SHOWN = {"capped": "sampled, min(w, 2)", "online": "online OPD"}


def runs(objectives, rates):
    """The config's runs by name."""
    shared = {
        "steps": STEPS,
        "batch_size": 128,
        "save_every": STEPS,
        "eval_every": EVERY,
        "heldout": 400,
        "guard": {"teacher": True, "fresh": 200, "action": "off"},
    }
    return {
        f"{name}-{rate:g}".replace(".", "p"): {
            **shared,
            **OBJECTIVES[name],
            "optim": {"learning_rate": BASE_RATE * rate, "warmup_steps": 5},
        }
        for name in objectives
        for rate in rates
    }


def train(seed, run_dir, wanted):
    """All runs of a seed; they end up in its metrics."""
    command = [
        *(sys.executable, "-m", "opd_jax.main"),
        *("--config", str(ROOT / "configs" / "quickstart.yaml")),
        *("--stages", "answer,sft,rollout,score,train"),
        *(f"run_dir={run_dir}", f"seed={seed}", f"train={json.dumps(wanted)}"),
    ]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)


def evaluations(run_dir):
    """run name -> {steps done: figures}."""
    found = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["stage"] == "train" and "fresh_reverse_kl" in entry:
            found.setdefault(entry["run"], {})[entry["step"] + 1] = entry
    return found


def curve(seeds, objective, rate):
    """steps -> (accuracy, fresh reverse KL), means over the seeds that have them."""
    name = f"{objective}-{rate:g}".replace(".", "p")
    have = [found[name] for found in seeds.values() if name in found]
    return {
        step: tuple(
            mean(h[step][figure] for h in have) for figure in ("fresh_accuracy", "fresh_reverse_kl")
        )
        for step in range(0, STEPS + 1, EVERY)
        if have and all(step in h for h in have)
    }


def print_table(seeds, objectives, rates):
    print("accuracy % / reverse KL of fresh samples after 300 steps (best KL, at which step)")
    print(f"{'':22}" + "".join(f"{'x' + format(rate, 'g'):26}" for rate in rates))
    for name in objectives:
        cells = []
        for rate in rates:
            points = curve(seeds, name, rate)
            if not points:
                cells.append(f"{'-':26}")
                continue
            last = points[max(points)]
            step = min(points, key=lambda s: points[s][1])
            text = f"{100 * last[0]:.0f} / {last[1]:.3f} ({points[step][1]:.3f} at {step})"
            cells.append(f"{text:26}")
        print(f"{SHOWN.get(name, name):22}" + "".join(cells))


def predictors(seeds):
    """How well each figure that needs no teacher orders states by their fresh reverse KL.

    `rank` is Spearman's correlation over all evaluations of offline runs; `limit` the value beyond
    which a state is called lost, with the share of lost states it finds and of others it blames. A
    state is lost if its reverse KL is above that before training.
    """
    states = []
    for found in seeds.values():
        for steps in found.values():
            if 0 in steps and "heldout_w_std" in steps[0]:
                first = steps[0]["fresh_reverse_kl"]
                states += [(e, e["fresh_reverse_kl"] > first) for s, e in steps.items() if s]
    lines = {}
    for figure, sign in (
        ("heldout_w_std", 1),
        ("heldout_log_w", -1),
        ("heldout_half_squared_advantage", 1),
        ("heldout_iw_reverse_kl", 1),
        ("heldout_effective_share", -1),
        ("fresh_accuracy", -1),
    ):
        values = [(sign * e[figure], lost, e["fresh_reverse_kl"]) for e, lost in states]
        lines[figure] = {"rank": spearman([(v, kl) for v, _, kl in values]), **split(values, sign)}
    return lines


def spearman(pairs):
    import numpy as np

    ranks = [np.argsort(np.argsort([pair[side] for pair in pairs])) for side in (0, 1)]
    return float(np.corrcoef(*ranks)[0, 1])


def split(values, sign):
    """The limit with the largest difference between the lost found and the others blamed."""
    lost = sum(is_lost for _, is_lost, _ in values)
    others = len(values) - lost
    if not lost or not others:
        return {"limit": float("nan"), "found": float("nan"), "blamed": float("nan")}
    best = (-1.0, 0.0, 0.0, 0.0)
    for limit in sorted({value for value, _, _ in values}):
        found = sum(is_lost for value, is_lost, _ in values if value > limit) / lost
        blamed = sum(not is_lost for value, is_lost, _ in values if value > limit) / others
        best = max(best, (found - blamed, limit, found, blamed))
    return {"limit": sign * best[1], "found": best[2], "blamed": best[3]}


def plot(seeds, objectives, rates, path):
    """Reverse KL against steps, one panel for each learning rate."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    panels, axes = plt.subplots(1, len(rates), figsize=(3 * len(rates), 3.2), sharey=True)
    for axis, rate in zip(axes, rates, strict=True):
        for name in objectives:
            points = curve(seeds, name, rate)
            if points:
                label = SHOWN.get(name, name)
                axis.plot(list(points), [kl for _, kl in points.values()], label=label, lw=1.3)
        axis.set_title(f"learning rate x {rate:g}", fontsize=9)
        axis.set_xlabel("steps", fontsize=8)
        axis.set_yscale("log")
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("fresh reverse KL, nats per token", fontsize=8)
    axes[-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panels.tight_layout()
    panels.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    parser.add_argument("--write", action="store_true", help="write the table and plot into docs/")
    given = parser.parse_args()
    wanted = runs(given.objectives, given.rates)
    with tempfile.TemporaryDirectory() as scratch:
        root = given.keep or Path(scratch)
        for seed in given.seeds:
            train(seed, root / f"seed{seed}", {"runs": wanted, "enabled": list(wanted)})
        seeds = {seed: evaluations(root / f"seed{seed}") for seed in given.seeds}
    print_table(seeds, given.objectives, given.rates)
    told = predictors(seeds)
    for figure, values in told.items():
        print(f"{figure:34}" + "  ".join(f"{key} {value:.3g}" for key, value in values.items()))
    if given.write:
        table = {
            f"{name} x{rate:g}": curve(seeds, name, rate)
            for name in given.objectives
            for rate in given.rates
        }
        (ROOT / "docs" / "robustness.json").write_text(json.dumps(table, indent=1) + "\n")
        plot(seeds, given.objectives, given.rates, ROOT / "docs" / "robustness.svg")
    figures = {}
    for name in given.objectives:
        kls = [kl for rate in given.rates for _, kl in curve(seeds, name, rate).values()]
        figures[f"{name}.best_kl"] = min(kls)
        figures[f"{name}.worst_last_kl"] = max(
            curve(seeds, name, rate)[STEPS][1] for rate in given.rates
        )
    report("robustness", figures)


if __name__ == "__main__":
    main()
