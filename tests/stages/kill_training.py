"""Run in a process of its own: a training run, undisturbed and ended 20 times at random moments.

python tests/stages/kill_training.py FOLDER SCORED    # the run folder of a tiny run after `score`

Leaves FOLDER/straight and FOLDER/killed, and prints how each process ended and how long it was in
the stage. Processes are forked, as in kill_rollout.py, and end by SIGKILL, by SIGTERM or by
themselves. Some are ended while they only get ready, the others after at least one more step.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from kill_rollout import LIMIT_SECONDS, finish, fork

ENDS, SEED = 20, 5
SETTINGS = (
    "prompts.opd_limit=40",
    "train.runs.opd.steps=60",
    "train.runs.opd.eval_every=3",
    "train.runs.opd.guard.final=best",
    "evaluate.grader=none",  # nothing fresh judges: within the limits, the later state is better
)
STATE = "checkpoints/opd/state"


def saved(run_dir):
    """The newest complete step."""
    found = [int(path.parent.name) for path in (run_dir / STATE).glob("*/complete.json")]
    return max(found, default=0)


def touched(run_dir):
    """When the stage's note of its cost was last written."""
    note = run_dir / "stages" / "train.opd.started.json"
    return note.stat().st_mtime_ns if note.exists() else 0


def wait_until(pid, happened):
    deadline = time.monotonic() + LIMIT_SECONDS
    while not happened():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "ended by itself"
        assert time.monotonic() < deadline, "never came so far"
        time.sleep(0.002)


def end(pid, run_dir, number, after_step, delay):
    """End a process that trains; returns how, how long it was in the stage, and what it saved."""
    before, note = saved(run_dir), touched(run_dir)
    wait_until(pid, lambda: touched(run_dir) != note)
    began = time.monotonic()
    if after_step:
        wait_until(pid, lambda: saved(run_dir) > before)
    # A machine that has become faster since the delays were chosen takes a step or two, not all.
    ready = time.monotonic() + delay
    wait_until(pid, lambda: time.monotonic() >= ready or saved(run_dir) > before + 1)
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - began
    return {"code": code, "after_step": after_step, "seconds": seconds, "saved": saved(run_dir)}


def main(folder, scored):
    import opd_jax.stages.pipeline  # noqa: F401  what every run imports

    straight, killed, first = folder / "straight", folder / "killed", folder / "first"
    for copy in (straight, killed, first):
        shutil.copytree(scored, copy)
    train = (*SETTINGS, "--stages", "train.opd")
    finish(fork(folder, first, *train))  # compiles for all others: what follows is timed
    pid = fork(folder, straight, *train)
    wait_until(pid, lambda: touched(straight))
    began = time.monotonic()
    wait_until(pid, lambda: saved(straight))
    ready = time.monotonic() - began
    finish(pid)
    # All delays together are a quarter of the steps, and each end waits for one more. Beside other
    # work the straight run may take twice as long as these: the last one still has steps to do.
    longest = (time.monotonic() - began - ready) / (3 * ENDS)
    moments, ends = random.Random(SEED), []
    for i in range(ENDS):
        number = (signal.SIGKILL, signal.SIGTERM)[i % 2]
        after_step = i % 5 > 0
        delay = moments.uniform(0, longest if after_step else ready)
        pid = fork(folder, killed, *train)
        ends.append(end(pid, killed, number, after_step, delay))
    began = time.monotonic()
    finish(fork(folder, killed, *train))
    print(json.dumps({"ends": ends, "last": time.monotonic() - began}))


if __name__ == "__main__":
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(Path(sys.argv[1], "programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    main(Path(sys.argv[1]), Path(sys.argv[2]))
