"""What each objective bears: accuracy and fresh reverse KL over learning rates and steps.

    python benchmarks/robustness.py
    python benchmarks/robustness.py --measure --seeds 0 1 2

On the quickstart's models: every objective at 0.3 to 30 times the learning rate of the quickstart's
`opd` run, evaluated every 30 of 300 steps on fresh samples of held-out prompts (which training
never sees), scored by the teacher; three seeds. `--measure` trains what
`benchmarks/robustness_runs/` does not have yet, one run at a time, and adds its evaluations there:
hours on two cores, which may be cut off; `--seeds`, `--rates` and `--objectives` choose a part.
Without it, the table of the last step and of the best is printed from what is there, how well the
figures that need no teacher tell states that are lost, and what the guard would have kept and when
it would have stopped; `--write` draws `docs/robustness.svg`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

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
    "refreshed": {"objective": "sampled", "refresh": {"every": 60}},
}
SHOWN = {
    "capped": "sampled, min(w, 2)",
    "online": "online OPD",
    "refreshed": "sampled, refresh.every=60",
}
RECORDS = ROOT / "benchmarks" / "robustness_runs"


def runs(objectives, rates):
    """The config's runs by name."""
    shared = {
        "steps": STEPS,
        "batch_size": 128,
        "micro_batch_size": 16,  # what a CPU's caches hold; the same gradient
        "save_every": STEPS,
        "eval_every": EVERY,
        "heldout": 400,
        "guard": {"teacher": True, "fresh": 200, "action": "off"},
    }
    return {
        run_name(name, rate): {
            **shared,
            **OBJECTIVES[name],
            "optim": {"learning_rate": BASE_RATE * rate, "warmup_steps": 5},
        }
        for name in objectives
        for rate in rates
    }


def run_name(objective, rate):
    return f"{objective}-{rate:g}".replace(".", "p")


def measure(seed, wanted):
    """Train the runs of a seed that are not recorded, and record each when it ends."""
    path = RECORDS / f"seed{seed}.json"
    with tempfile.TemporaryDirectory() as scratch:
        for name in wanted:
            known = json.loads(path.read_text()) if path.exists() else {}
            if name in known:
                continue
            command = [
                *(sys.executable, "-m", "opd_jax.main"),
                *("--config", str(ROOT / "configs" / "quickstart.yaml")),
                *("--stages", "answer,sft,rollout,score,train"),
                *(f"run_dir={scratch}", f"seed={seed}"),
                f"train={json.dumps({'runs': wanted, 'enabled': [name]})}",
            ]
            subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)
            known[name] = evaluations(Path(scratch), name)
            write(path, known)


def write(path, known):
    """One line for each run; never half a file."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known))
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_text(f"{{\n{lines}\n}}\n")
    path.with_suffix(".new").replace(path)


def evaluations(run_dir, name):
    """{steps done: figures} of a run, to four digits."""
    found = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["stage"] == "train" and entry.get("run") == name and "fresh_reverse_kl" in entry:
            figures = {k: v for k, v in entry.items() if k.startswith(("fresh_", "heldout_"))}
            found[entry["step"] + 1] = {k: float(f"{v:.4g}") for k, v in figures.items()}
    return found


def recorded(seed):
    """run name -> {steps done: figures}, as `measure` left it."""
    path = RECORDS / f"seed{seed}.json"
    runs = json.loads(path.read_text()) if path.exists() else {}
    return {name: {int(step): e for step, e in run.items()} for name, run in runs.items()}


def curve(seeds, objective, rate):
    """steps -> (accuracy, fresh reverse KL), means over the seeds that have them."""
    name = run_name(objective, rate)
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
    print(f"{'':26}" + "".join(f"{'x' + format(rate, 'g'):26}" for rate in rates))
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
        print(f"{SHOWN.get(name, name):26}" + "".join(cells))


def predictors(seeds):
    """How well each figure that needs no teacher orders states by their fresh reverse KL.

    `rank` is Spearman's correlation over all evaluations of runs of sampled tokens from one set of
    rollouts, which the limits are for; `limit` the value beyond which a state is called lost, with
    the share of lost states it finds and of others it blames. A state is lost if its reverse KL is
    above that before training.
    """
    states = []
    for found in seeds.values():
        for name, steps in found.items():
            if name.startswith(("sampled-", "capped-")) and 0 in steps:
                first = steps[0]["fresh_reverse_kl"]
                states += [(e, e["fresh_reverse_kl"] > first) for s, e in steps.items() if s]
    lines = {}
    for figure, sign in (
        ("heldout_w_std", 1),
        ("heldout_token_log_w", -1),
        ("heldout_half_squared_advantage", 1),
        ("heldout_iw_reverse_kl", 1),
        ("heldout_effective_share", -1),
        ("fresh_accuracy", -1),
    ):
        have = [(e, lost) for e, lost in states if figure in e]
        values = [(sign * e[figure], lost, e["fresh_reverse_kl"]) for e, lost in have]
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


def guarded(found, config, limited, blind):
    """What the guard makes of a recorded run: (stopped after, kept state, its reverse KL).

    Args:
        limited: as the run has its guard: drift is a danger to sampled tokens alone.
        blind: without the figures that need the teacher or a grader.
    """
    from opd_jax.train.guard import Guard

    guard, stopped = Guard(config, limited=limited), max(found)
    for step in sorted(found):
        figures = {k: v for k, v in found[step].items() if not (blind and k.startswith("fresh_"))}
        if guard.look(step, figures).stop:
            stopped = step
            break
    kept = guard.best[1]
    return stopped, kept, found[kept]["fresh_reverse_kl"]


def print_rescued(seeds, objectives, rates):
    """Median over seeds: what is left without a guard, with one, and with one without a teacher."""
    from opd_jax.config_train import GuardConfig

    config = GuardConfig(action="stop", final="best")
    print("reverse KL: before, after the last step; (kept, stopped after) by the guard, and by one")
    print("that sees neither fresh samples nor a teacher; medians of the seeds")
    for name in objectives:
        for rate in rates:
            runs = [found[run_name(name, rate)] for found in seeds.values()
                    if run_name(name, rate) in found]  # fmt: skip
            if not runs or any("heldout_token_log_w" not in run[0] for run in runs):
                continue
            ends = [median(run[step]["fresh_reverse_kl"] for run in runs) for step in (0, STEPS)]
            told, limited = [], OBJECTIVES[name]["objective"] == "sampled"
            for blind in (False, True):
                stopped, _, kl = zip(
                    *(guarded(r, config, limited, blind) for r in runs), strict=True
                )
                told.append(f"({median(kl):.3f}, {median(stopped):.0f})")
            cells = [f"{kl:.3f}" for kl in ends] + told
            print(f"{SHOWN.get(name, name):24} x{rate:<5g}" + "  ".join(f"{c:14}" for c in cells))


LIMITS = (-0.05, -0.08, -0.1, -0.12, -0.15, -0.2, -0.3)


def print_limits(seeds):
    """What a guard without fresh samples keeps with other limits of log W / T."""
    from opd_jax.config_train import GuardConfig

    found = [
        points
        for runs in seeds.values()
        for name in ("sampled", "capped")
        for rate in RATES
        if rate <= 3
        and "heldout_token_log_w" in (points := runs.get(run_name(name, rate), {})).get(0, {})
    ]
    if not found:
        return
    print(
        f"mean reverse KL of the state kept, {len(found)} runs of sampled tokens, by token_log_w:"
    )
    for limit in LIMITS:
        config = GuardConfig(action="stop", final="best", token_log_w=limit)
        kept = mean(guarded(points, config, limited=True, blind=True)[2] for points in found)
        print(f"  {limit:5.2f}  {kept:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--measure", action="store_true", help="train what is not recorded yet")
    parser.add_argument("--write", action="store_true", help="write the plot into docs/")
    given = parser.parse_args()
    if given.measure:
        for seed in given.seeds:
            measure(seed, runs(given.objectives, given.rates))
    seeds = {seed: recorded(seed) for seed in given.seeds}
    print_table(seeds, given.objectives, given.rates)
    for figure, values in predictors(seeds).items():
        print(f"{figure:34}" + "  ".join(f"{key} {value:.3g}" for key, value in values.items()))
    print_rescued(seeds, given.objectives, given.rates)
    print_limits(seeds)
    if given.write:
        plot(seeds, given.objectives, given.rates, ROOT / "docs" / "robustness.svg")
    figures = {}
    for name in given.objectives:
        curves = [points for rate in given.rates if (points := curve(seeds, name, rate))]
        if curves:
            figures[f"{name}.best_kl"] = min(kl for points in curves for _, kl in points.values())
            figures[f"{name}.worst_last_kl"] = max(points[STEPS][1] for points in curves)
    report("robustness", figures)


if __name__ == "__main__":
    main()
