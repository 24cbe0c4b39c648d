"""Run in a process of its own: a run's rollouts, undisturbed and with 20 kills at random moments.

python tests/stages/kill_rollout.py FOLDER

Leaves FOLDER/straight and FOLDER/killed. Every run is a process that ends by itself or by SIGKILL.
They are forked from this one, which has imported everything and never touches a JAX backend: so a
start costs milliseconds, and no thread or lock of JAX is copied. Compiled programs are kept on
disk for the next.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

KILLS, SEED, LIMIT_SECONDS = 20, 11, 120
SETTINGS = ("prompts.opd_limit=200", "rollout.slots=8", "rollout.samples_per_prompt=2")


def fork(folder, run_dir, *words):
    """Start `python -m opd_jax.main` with these words; returns its process id."""
    from tiny_run import arguments

    from opd_jax.main import main

    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = main(arguments(run_dir, *words))
    finally:
        os._exit(code)


def finish(pid):
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def commits(run_dir):
    folder = run_dir / "rollouts" / "commits"
    return len(list(folder.glob("*.json"))) if folder.exists() else 0


def await_commit(pid, run_dir):
    """Wait until a process commits its first records."""
    before, deadline = commits(run_dir), time.monotonic() + LIMIT_SECONDS
    while commits(run_dir) == before:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "ended before it began to sample"
        assert time.monotonic() < deadline, "never began to sample"
        time.sleep(0.002)


def kill_while_sampling(pid, run_dir, delay):
    """Kill a process some seconds after its first commit; returns how many commits there are."""
    await_commit(pid, run_dir)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "over before the kill"
    return commits(run_dir)


def main(folder):
    import opd_jax.stages.pipeline  # noqa: F401  what every run imports

    straight, killed = folder / "straight", folder / "killed"
    before, rollout = ((*SETTINGS, "--stages", names) for names in ("answer,sft", "rollout"))
    finish(fork(folder, straight, *before))
    shutil.copytree(straight, killed)
    pid = fork(folder, straight, *rollout)
    await_commit(pid, straight)
    started = time.monotonic()
    finish(pid)
    # All kills together leave a fifth of the sampling to the last process, at the very least.
    longest = (time.monotonic() - started) / (KILLS + 5)
    moments, kept = random.Random(SEED), []
    for _ in range(KILLS):
        pid = fork(folder, killed, *rollout)
        kept.append(kill_while_sampling(pid, killed, moments.uniform(0, longest)))
    finish(fork(folder, killed, *rollout))
    print(json.dumps({"commits": kept}))


if __name__ == "__main__":
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(Path(sys.argv[1], "programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    main(Path(sys.argv[1]))
