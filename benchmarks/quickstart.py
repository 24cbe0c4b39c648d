"""The quickstart over three seeds, with its control and the online baseline beside it.

    python benchmarks/quickstart.py

Runs `configs/quickstart.yaml` with every run of its table for each seed, on the evaluation problems
(the settings were chosen on other ones), and prints accuracy at temperature 1, greedy accuracy and
the reverse KL per token of fresh samples. `opd.kl_ratio` is that KL over the KL after SFT;
`opd.gain` is in points of accuracy at temperature 1, `opd.gain_sigma` in its standard errors.
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

RUNS = ("opd", "opd_topk", "opd_online", "sft_longer")
NAMES = ("base", "sft", *RUNS, "teacher")


def run_seed(seed, run_dir):
    """One whole run; returns its summary."""
    command = [
        *(sys.executable, "-m", "opd_jax.main"),
        *("--config", str(ROOT / "configs" / "quickstart.yaml")),
        *(f"run_dir={run_dir}", f"seed={seed}", f"train.enabled=[{','.join(RUNS)}]"),
    ]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)
    return json.loads((run_dir / "summary.json").read_text())


def row(summary, name):
    """Accuracy at temperature 1, its standard error, greedy accuracy, reverse KL, its error."""
    found = summary["eval"][name]
    return {
        "accuracy": 100 * found["accuracy"],
        "stderr": 100 * found["stderr"],
        "greedy": 100 * found["greedy_accuracy"],
        "kl": summary["reverse_kl"].get(name),
        "kl_stderr": summary["reverse_kl_stderr"].get(name),
    }


def gain(summary, name):
    """Points of accuracy over SFT, and that in standard errors of the difference."""
    after, before = row(summary, name), row(summary, "sft")
    points = after["accuracy"] - before["accuracy"]
    return points, points / (after["stderr"] ** 2 + before["stderr"] ** 2) ** 0.5


def figures(summaries):
    """The figures of all seeds; ratios and gains are medians and worst cases."""
    found = {}
    for name in RUNS:
        ratios = [s["reverse_kl"][name] / s["reverse_kl"]["sft"] for s in summaries]
        gains = [gain(s, name) for s in summaries]
        found[f"{name}.kl_ratio"] = median(ratios)
        found[f"{name}.kl_ratio_worst"] = max(ratios)
        found[f"{name}.gain"] = median(points for points, _ in gains)
        found[f"{name}.gain_worst"] = min(points for points, _ in gains)
        found[f"{name}.gain_sigma_worst"] = min(sigma for _, sigma in gains)
    seconds = [sum(stage["seconds"] for stage in s["stages"].values()) for s in summaries]
    found["seconds"] = median(seconds)
    stages = [stage for s in summaries for stage in s["stages"].values()]
    found["peak_host_gib"] = max(stage["peak_host_gib"] or 0.0 for stage in stages)
    return found


def print_table(seeds, summaries):
    print(f"{'':12}" + "".join(f"seed {seed:<31}" for seed in seeds))
    print(f"{'':12}" + "T=1 accuracy  greedy  reverse KL     " * len(seeds))
    for name in NAMES:
        cells = []
        for summary in summaries:
            r = row(summary, name)
            kl = "" if r["kl"] is None else f"{r['kl']:.3f} ± {r['kl_stderr']:.3f}"
            cells.append(f"{r['accuracy']:5.1f} ± {r['stderr']:3.1f}  {r['greedy']:6.1f}  {kl:15}")
        print(f"{name:12}" + "".join(cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.keep or Path(scratch)
        summaries = [run_seed(seed, root / f"seed{seed}") for seed in arguments.seeds]
    print_table(arguments.seeds, summaries)
    report("quickstart", figures(summaries), summaries[0]["environment"])


if __name__ == "__main__":
    main()
