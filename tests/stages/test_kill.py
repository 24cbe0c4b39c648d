"""Killed with -9 in every stage, a run goes on and ends with the same bits."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import start_run
from processes import LIMIT_SECONDS, quick_environment
from tiny_run import FRESH, ROOT, arguments

from opd_jax.data.store import open_store
from opd_jax.data.store_rows import record_digest

STAGES = (
    "answer",
    "sft",
    "rollout",
    "score",
    "train.opd",
    "train.opd_topk",
    "train.opd_online",
    "train.sft_longer",
    "evaluate.opd",
    "export.opd",
)
RUNS = (
    "train.enabled=[opd,opd_topk,opd_online,sft_longer]",
    *("evaluate.base=false", "evaluate.teacher=false"),
)
TRIES = 5


def start(run_dir, log):
    return start_run(arguments(run_dir, *RUNS, *FRESH), cwd=ROOT, log=log)


def inside(run_dir, stage):
    """The stage has begun and, where it can be cut in its middle, has kept something already."""
    if not (run_dir / "stages" / f"{stage}.started.json").exists():
        return False
    kind, _, name = stage.partition(".")
    kept = {
        "answer": "answers/commits/*.json",
        "rollout": "rollouts/commits/*.json",
        "score": "rollouts/teacher/*/commits/*.json",
        "sft": "checkpoints/sft/state/*/complete.json",
        "train": f"checkpoints/{name}/state/*/complete.json",
        "evaluate": f"evaluate/{name}/sampled/commits/*.json",
        "export": "export/*",
    }[kind]
    return any(run_dir.glob(kept))


def kill_inside(run_dir, stage, log):
    """Kill the run in the middle of a stage; once more from before if the stage was faster."""
    before = run_dir.with_name("before")
    for _ in range(TRIES):
        shutil.rmtree(before, ignore_errors=True)
        if run_dir.exists():
            shutil.copytree(run_dir, before)
        kill_when_inside(run_dir, stage, log)
        if not (run_dir / "stages" / f"{stage}.json").exists():
            return
        shutil.rmtree(run_dir)
        if before.exists():
            before.rename(run_dir)
    pytest.fail(f"{stage} was over before the kill, {TRIES} times")


def kill_when_inside(run_dir, stage, log):
    process = start(run_dir, log)
    deadline = time.monotonic() + LIMIT_SECONDS
    try:
        while not inside(run_dir, stage):
            if (run_dir / "stages" / f"{stage}.json").exists():
                break
            assert process.poll() is None, f"ended before {stage} could be killed"
            assert time.monotonic() < deadline, f"{stage} never began"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def model_files(run_dir):
    """The bytes of every exported parameter and of the metrics."""
    files = sorted((run_dir / "export").rglob("*.safetensors"))
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in files}


@pytest.mark.slow
def test_killed_once_in_each_stage_a_run_ends_with_the_same_parameters(tmp_path):
    with (tmp_path / "log.txt").open("w+") as log:
        straight, killed = tmp_path / "straight", tmp_path / "killed"
        assert start(straight, log).wait(LIMIT_SECONDS) == 0
        for stage in STAGES:
            kill_inside(killed, stage, log)
        assert start(killed, log).wait(LIMIT_SECONDS) == 0
    want, got = model_files(straight), model_files(killed)
    assert len(want) == 4
    assert want.keys() == got.keys()
    for name in want:
        assert want[name] == got[name], name
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((straight / "metrics.jsonl").read_text().splitlines())


def records(run_dir):
    """What the rollouts hold, and how many records that is."""
    snapshot = open_store(run_dir / "rollouts").freeze()
    found = snapshot.read_many(range(len(snapshot)))
    return {(r.prompt_id, r.sample_index): record_digest(r) for r in found}, len(found)


@pytest.mark.slow
def test_killed_again_and_again_rollouts_are_those_of_an_undisturbed_run(after_sft, tmp_path):
    script = Path(__file__).with_name("kill_rollout.py")
    command = [sys.executable, str(script), str(tmp_path), str(after_sft)]
    env = quick_environment()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + (tmp_path / "log.txt").read_text()
    found = json.loads(done.stdout.splitlines()[-1])
    assert "for prompts that samples share" in (tmp_path / "log.txt").read_text()
    kept = found["commits"]
    (want, straight), (got, killed) = (records(tmp_path / x) for x in ("straight", "killed"))
    data, commits = (tmp_path / "killed" / "rollouts" / x for x in ("data", "commits"))
    torn = len(list(data.iterdir())) - len(list(commits.glob("*.json")))
    print(f"commits at the kills: {found}; {torn} kills left a segment without its commit")
    assert len(kept) == 20
    assert len(found["early"]) >= 3
    assert kept == sorted(set(kept))  # every process committed something before its end
    assert kept[-1] < killed == straight == len(want) == 800
    assert any(before == after for before, after in found["early"])
    assert got == want
