"""Run in a process of its own: a run's rollouts, undisturbed and with kills at random moments.

20 fall while it samples, 3 or more in the time before a process's first commit, until one is before
it, and one as soon as the last record is committed.

python tests/stages/kill_rollout.py FOLDER AFTER_SFT    # the run folder of a tiny run after `sft`

Leaves FOLDER/straight and FOLDER/killed. Every run is a process that ends by itself or by SIGKILL.
They are forked from this one, which has imported everything and never touches a JAX backend: so a
start costs milliseconds, and no thread or lock of JAX is copied. Compiled programs are kept on
disk for the next.
"""

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

KILLS, EARLY, SEED, LIMIT_SECONDS = 20, 3, 11, 1200
SECONDS_OF_A_COMMIT = 0.06  # roughly: a kill falls anywhere between two commits
SETTINGS = (
    *("prompts.opd_limit=100", "rollout.samples_per_prompt=8"),
    *("rollout.slots=8", "rollout.max_new_tokens=40"),  # so short that samples share their prompts
)


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


def committed_records(run_dir):
    paths = (run_dir / "rollouts" / "commits").glob("*.json")
    return sum(map(records_of, paths))


@functools.cache
def records_of(commit):
    return json.loads(commit.read_text())["records"]


def await_count(pid, what, least):
    """Wait until a process has made a number this large."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while what() < least:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "ended before it began to sample"
        assert time.monotonic() < deadline, "never began to sample"
        time.sleep(0.002)


def await_commit(pid, run_dir):
    """Wait until a process commits its first records; returns how many seconds that took."""
    began = time.monotonic()
    await_count(pid, lambda: commits(run_dir), commits(run_dir) + 1)
    return time.monotonic() - began


def kill_at_the_end(start, run_dir, total):
    """Kill a process as soon as all records are committed: it has not said so yet.

    One that ends first, as the machine did something else just then, does not count.
    """
    before = shutil.copytree(run_dir, run_dir.with_name("before"))
    for _ in range(5):
        pid, deadline = start(), time.monotonic() + LIMIT_SECONDS
        while committed_records(run_dir) < total:
            assert time.monotonic() < deadline, "never came to the end"
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if not (run_dir / "stages" / "rollout.json").exists():
            return commits(run_dir)
        shutil.rmtree(run_dir)
        shutil.copytree(before, run_dir)
    raise AssertionError("over before each of five kills")


def kill(pid, run_dir):
    """Returns how many commits there are."""
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "over before the kill"
    return commits(run_dir)


def main(folder, after_sft):
    import opd_jax.stages.pipeline  # noqa: F401  what every run imports

    straight, killed = folder / "straight", folder / "killed"
    rollout = (*SETTINGS, "--stages", "rollout")
    for copy in (straight, killed):
        shutil.copytree(after_sft, copy)
    finish(fork(folder, straight, *rollout))
    total = committed_records(straight)
    # Counted in records, so that no change of the machine's speed lets a process come to the end.
    most = total // KILLS  # half of it on average
    moments, kept, early = random.Random(SEED), [], []
    for number in range(KILLS):
        pid = fork(folder, killed, *rollout)
        starting = await_commit(pid, killed)
        more = committed_records(killed) + moments.randrange(most)
        await_count(pid, lambda: committed_records(killed), more)
        ready = time.monotonic() + moments.uniform(0, SECONDS_OF_A_COMMIT)
        while time.monotonic() < ready and committed_records(killed) < more + most // 4:
            time.sleep(0.002)
        kept.append(kill(pid, killed))
        if number < EARLY or not any(before == after for before, after in early):
            pid = fork(folder, killed, *rollout)
            time.sleep(moments.uniform(0, starting))
            early.append((kept[-1], kill(pid, killed)))
    last = kill_at_the_end(lambda: fork(folder, killed, *rollout), killed, total)
    finish(fork(folder, killed, *rollout))
    print(json.dumps({"commits": kept, "early": early, "last": last}))


if __name__ == "__main__":
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(Path(sys.argv[1], "programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    main(Path(sys.argv[1]), Path(sys.argv[2]))
