"""Two programs measured in turn: each in its own process, asked for one round at a time.

A side is a script's function that prepares its work and yields after every round. It runs in a
process of its own, so that its peak memory is its own; the parent asks the sides alternately, so
that what else the machine does meets both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median


def arguments(doc, sides, rounds, parts):
    """The command line: `rounds` and `only`. A child runs its side instead, and ends.

    Args:
        sides: functions by name, called with the folder and the piece of work.
        rounds: how many unless told.
        parts: what `--only` may name.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "FOLDER", "WHAT"))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--only", choices=parts)
    given = parser.parse_args()
    if given.side:
        name, folder, what = given.side
        sides[name](Path(folder), what)
        sys.exit()
    return given


def serve(rounds):
    """In the child: run one round per line on standard input, print its seconds and what it gave.

    Args:
        rounds: a function without arguments that does one round and returns a JSON value.
    """
    for line in sys.stdin:
        start = time.perf_counter()
        value = rounds()
        answer = {"seconds": time.perf_counter() - start, "value": value, "peak": peak_bytes()}
        print(json.dumps(answer), flush=True)
        if line.strip() == "last":
            return


def peak_bytes():
    """The largest resident size this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


class Side:
    """One child process."""

    def __init__(self, script, name, *arguments):
        self.seconds, self.values, self.peak = [], [], 0
        command = [sys.executable, script, "--side", name, *map(str, arguments)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=_env())

    def round(self, *, warm=False, last=False):
        """One round; a warm-up's time is not kept."""
        print("last" if last else "go", file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline() or "null")
        if answer is None:
            raise SystemExit(f"a side ended with exit code {self.process.wait()}")
        self.peak = answer["peak"]
        self.values.append(answer["value"])
        if not warm:
            self.seconds.append(answer["seconds"])
        return answer["seconds"]


def alternate(sides, rounds, warmups=1):
    """Warm every side up, then `rounds` rounds in turn; the sides end."""
    for _ in range(warmups):
        for side in sides:
            side.round(warm=True)
    for number in range(rounds):
        for side in sides:
            side.round(last=number == rounds - 1)
    for side in sides:
        side.process.wait()


def ratio(ours, theirs):
    """Throughput of ours over theirs, the median of the pairs."""
    return median(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True))


def _env():
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
