"""A run whose student samples anew on its way, through the command line."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
from forks import start_run
from processes import LIMIT_SECONDS
from tiny_run import ROOT, arguments

from opd_jax.data.store import open_store
from opd_jax.main import main

pytestmark = pytest.mark.slow  # each test trains

SETTINGS = (
    "prompts.opd_limit=32",
    "train.enabled=[opd]",
    "train.runs.opd.steps=6",
    "train.runs.opd.eval_every=2",
    "train.runs.opd.optim.learning_rate=1e-4",
)
EVERY = "train.runs.opd.refresh.every=2"
TRIES = 5


def command(run_dir, *words):
    return arguments(run_dir, *SETTINGS, *words)


def start(run_dir, log, *words):
    """A run of its own, on one device."""
    return start_run(command(run_dir, *words), cwd=ROOT, log=log)


@pytest.fixture(scope="module")
def scored(after_sft, tmp_path_factory):
    run_dir = shutil.copytree(after_sft, tmp_path_factory.mktemp("refresh") / "run")
    with (run_dir.parent / "log.txt").open("w") as log:
        assert start(run_dir, log, "--stages", "rollout,score").wait(LIMIT_SECONDS) == 0
    return run_dir


@pytest.fixture
def run(scored, tmp_path):
    return shutil.copytree(scored, tmp_path / "run")


def train(run_dir, *words):
    return main(command(run_dir, "mesh.fsdp=2", "mesh.tensor=2", "--stages", "train", *words))


def lineage_of(run_dir):
    return json.loads((run_dir / "checkpoints" / "opd" / "lineage.json").read_text())


def steps_of(run_dir):
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if x["run"] == "opd" and "loss" in x]


def test_every_two_steps_the_student_samples_and_is_scored(run, capsys):
    assert train(run, EVERY) == 0
    text = capsys.readouterr().out
    assert "round 1 begins after 2 steps" in text
    assert "sampled for round 2" in text
    assert "scored for round 2" in text
    assert text.count("self-test of the teacher") == 1
    assert "round 1: log-probs a token: teacher" in text
    assert "round 2: log-probs a token: teacher" in text
    lineage = lineage_of(run)
    assert [x["step"] for x in lineage["rounds"]] == [2, 4]
    teachers = set()
    for number, found in enumerate(lineage["rounds"], 1):
        store = open_store(run / "rounds" / "opd" / f"round_{number}" / "rollouts")
        snapshot = store.open_snapshot(found["rollouts"])
        assert store.meta["generator"]["name"] == f"train.opd after {found['step']} steps"
        assert store.meta["generator"]["weights"] != lineage["student"]["model"]["weights"]
        (name,) = (
            path.name for path in (run / f"rounds/opd/round_{number}/rollouts/teacher").iterdir()
        )
        scores = store.open_pass(name)
        assert len(scores.committed_records(snapshot)) == len(snapshot) <= 2 * 8 + 3
        teachers.add(scores.meta["teacher"]["fingerprint"])
    assert teachers == {lineage["teacher"]["fingerprint"]}
    steps = steps_of(run)
    assert [x["step"] for x in steps] == list(range(6))
    std = [x["w_std"] for x in steps]
    assert max(std[0], std[2], std[4]) < 1e-3 < min(std[1], std[3], std[5])  # of the round's own
    record = json.loads((run / "stages" / "train.opd.json").read_text())
    assert record["counts"]["rounds"] == 2
    again_and_forced(run, capsys)


def again_and_forced(run, capsys):
    """Done is done, in the plan too; what rounds depend on is an input; `--force` clears up."""
    assert (
        main(command(run, "mesh.fsdp=2", "mesh.tensor=2", "--stages", "train", EVERY, "--plan"))
        == 0
    )
    assert "train.opd" in capsys.readouterr().out.split("done")[0]
    assert train(run, EVERY) == 0
    assert "done before" in capsys.readouterr().out
    assert train(run, EVERY, "rollout.temperature=0.9") == 2
    assert "rounds.rollout.temperature changed from 1.0 to 0.9" in capsys.readouterr().err
    assert train(run, EVERY, "prompts.opd_limit=30", "--force", "train.opd") == 2
    assert "other prompts" in capsys.readouterr().err
    assert [x["step"] for x in lineage_of(run)["rounds"]] == [2, 4]  # it is put back
    assert (run / "rounds" / "opd" / "round_2").is_dir()
    assert train(run, "--force", "train.opd", "train.runs.opd.steps=2") == 0
    assert "rounds" not in lineage_of(run)
    assert list((run / "rounds").iterdir()) == []


def test_drift_begins_a_round_in_place_of_a_stop(run, capsys):
    words = [f"train.runs.opd.guard.{x}" for x in ("w_std=1e-4", "action=stop", "patience=1")]
    words += [f"train.runs.opd.refresh.{x}" for x in ("on_drift=true", "rounds=1")]
    assert train(run, *words) == 0
    assert [x["step"] for x in lineage_of(run)["rounds"]] == [2]
    assert "stopped after 4 of 6 steps" in capsys.readouterr().out
    counts = json.loads((run / "stages" / "train.opd.json").read_text())["counts"]
    assert lineage_of(run)["best_state_of_steps"] == counts["best_step"] <= 4


def test_a_first_rollout_may_be_longer_than_those_of_rounds(run):
    """Rows are as long as the longest of all rounds."""
    assert train(run, EVERY, "rollout.max_new_tokens=8") == 0
    assert [x["step"] for x in lineage_of(run)["rounds"]] == [2, 4]


INSIDE = {
    "sampling": "rounds/opd/round_1/rollouts/commits/*.json",
    "scoring": "rounds/opd/round_1/rollouts/teacher/*/pass.json",
    "training": "checkpoints/opd/state/00000003/complete.json",
    "the next one": "rounds/opd/round_2/rollouts/commits/*.json",
}
AFTER = {
    "sampling": "rounds/opd/round_1/rollouts/snapshots/*.json",
    "scoring": "checkpoints/opd/state/00000003/complete.json",
    "training": "rounds/opd/round_2/rollouts/dataset.json",
    "the next one": "rounds/opd/round_2/rollouts/snapshots/*.json",
}


def kill_while(run, what, log):
    """Kill a run in a part of round 1 or 2; once more from before if the part was over by then."""
    before = run.with_name("before")
    for _ in range(TRIES):
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(run, before)
        process = start(run, log, EVERY, "--stages", "train")
        deadline = time.monotonic() + LIMIT_SECONDS
        while not any(run.glob(INSIDE[what])):
            assert process.poll() is None, f"ended before {what}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not any(run.glob(AFTER[what])):
            return
        shutil.rmtree(run)
        before.rename(run)
    pytest.fail(f"{what} was over before the kill, {TRIES} times")


def test_killed_in_every_part_of_a_round_a_run_ends_with_the_same_bits(scored, tmp_path):
    straight, killed = (shutil.copytree(scored, tmp_path / x) for x in ("straight", "killed"))
    with (tmp_path / "log.txt").open("w") as log:
        assert start(straight, log, EVERY, "--stages", "train,export").wait(LIMIT_SECONDS) == 0
        for what in INSIDE:
            kill_while(killed, what, log)
        assert start(killed, log, EVERY, "--stages", "train,export").wait(LIMIT_SECONDS) == 0
    assert lineage_of(killed) == lineage_of(straight)  # the rollouts' hashes among it
    want, got = ((x / "export/opd/model.safetensors").read_bytes() for x in (straight, killed))
    assert want == got
    losses = [[x["loss"] for x in steps_of(folder)] for folder in (straight, killed)]
    np.testing.assert_array_equal(*losses)
    assert len(losses[0]) == 6
