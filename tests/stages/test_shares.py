"""Scoring shared out to two programs that meet in the store alone, one of which is killed."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_run import ROOT, arguments

from opd_jax.data.store import open_store

LIMIT_SECONDS = 200
SETTINGS = ("prompts.opd_limit=48", "score.batch_tokens=32", "score.top_k=4")


def start(run_dir, *more):
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(run_dir.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "opd_jax.main", *arguments(run_dir, *SETTINGS, *more)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process):
    output = process.communicate(timeout=LIMIT_SECONDS)[0].decode()
    assert process.returncode == 0, output
    return output


def share(run_dir, store, which):
    return start(run_dir, "--stages", "score", "--share", which, f"store={store}")


def commits_of(store, writer):
    return len(list(store.glob(f"rollouts/teacher/*/commits/{writer}-*.json")))


def kill_after_commits(process, store, writer):
    deadline = time.monotonic() + LIMIT_SECONDS
    while commits_of(store, writer) < 2:
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline, "never scored anything"
        time.sleep(0.002)
    process.kill()
    process.communicate()


def scores(root):
    store = open_store(root / "rollouts")
    snapshot = store.freeze()
    (folder,) = (root / "rollouts" / "teacher").iterdir()
    scoring = store.open_pass(folder.name)
    scoring.verify(snapshot)
    return scoring.read_many(snapshot, range(len(snapshot)))


@pytest.mark.slow
def test_two_shares_make_the_pass_of_one_run_though_one_was_killed(tmp_path):
    """Each has a run folder of its own, that holds the record of the rollouts and nothing else."""
    straight, store = tmp_path / "straight", tmp_path / "store"
    finish(start(straight, "--stages", "answer,sft,rollout"))
    shutil.copytree(straight / "rollouts", store / "rollouts")
    finish(start(straight, "--stages", "score"))
    first, second = tmp_path / "first", tmp_path / "second"
    for run_dir in (first, second):
        (run_dir / "stages").mkdir(parents=True)
        shutil.copy(straight / "stages" / "rollout.json", run_dir / "stages")
    kill_after_commits(share(second, store, "2/2"), store, "w00001")
    one = share(first, store, "1/2")
    before = commits_of(store, "w00001")
    finish(share(second, store, "2/2"))
    finish(one)
    assert 0 < before < commits_of(store, "w00001")
    assert commits_of(store, "w00000") > 2
    want, got = scores(straight), scores(store)
    assert len(want) == len(got) == 48
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a.logprob, b.logprob)
        np.testing.assert_array_equal(a.topk_ids, b.topk_ids)
        np.testing.assert_array_equal(a.topk_logprob, b.topk_logprob)
    records = [run_dir / "stages" / "score.json" for run_dir in (first, second)]
    done = [json.loads(record.read_text()) for record in records if record.exists()]
    assert done  # by the one that was last
    wanted = json.loads((straight / "stages" / "score.json").read_text())
    assert done[0]["outputs"] == wanted["outputs"]
    assert done[0]["counts"] == wanted["counts"]


@pytest.mark.slow
def test_shares_in_one_run_folder_add_up_to_the_cost_of_the_stage(tmp_path):
    run_dir = tmp_path / "run"
    finish(start(run_dir, "--stages", "answer,sft,rollout"))
    first = share(run_dir, run_dir, "1/2")
    second = share(run_dir, run_dir, "2/2")
    outputs = [finish(process) for process in (first, second)]
    assert sum("this share is done" in output for output in outputs) <= 1
    record = json.loads((run_dir / "stages" / "score.json").read_text())
    assert record["counts"]["records"] == 48
    assert record["seconds"] <= record["device_seconds"] < 2.001 * record["seconds"]
    assert "done before" in finish(start(run_dir, "--stages", "score"))
