"""Two processes run the pipeline together and find what one process finds."""

import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from forks import start_run
from processes import LIMIT_SECONDS, free_port, quick_environment
from safetensors.numpy import load_file
from tiny_run import FRESH, ROOT, arguments

from opd_jax.data.store import open_store

EVERY_KIND = (
    *FRESH,
    "train.enabled=[opd,opd_topk,opd_online]",
    "train.runs.opd.refresh.every=2",
)


def start(run_dir, devices, *more):
    return start_run(arguments(run_dir, *more), devices, cwd=ROOT)


def finish(process):
    output = process.communicate(timeout=LIMIT_SECONDS)[0].decode()
    assert process.returncode == 0, output
    return output


def losses(run_dir):
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {(x["stage"], x["run"], x["step"]): x["loss"] for x in lines if "loss" in x}


def assert_same_losses(one, other, runs=("sft", "opd", "opd_topk")):
    want, got = losses(one), losses(other)
    assert want.keys() == got.keys()
    assert {run for _, run, _ in want} == set(runs)
    for key, loss in want.items():
        # Of its size: a loss of 3 is a mean of products of up to 100, each rounded to 7 digits.
        assert got[key] == pytest.approx(loss, rel=1e-5, abs=1e-5), key


def assert_same_samples(one, other):
    """Token for token; log-probs of the answers alone: each run trained its own student."""
    for folder in ("answers", "rollouts"):
        want, got = (samples(run_dir / folder) for run_dir in (one, other))
        assert want.keys() == got.keys()
        for key, record in want.items():
            assert got[key].response_ids.tolist() == record.response_ids.tolist(), (folder, key)
            if folder == "answers":
                error = np.abs(got[key].student_logprob - record.student_logprob)
                assert error.max() < 1e-4, key


def samples(folder):
    snapshot = open_store(folder).freeze()
    records = snapshot.read_many(range(len(snapshot)))
    return {(r.prompt_id, r.sample_index): r for r in records}


@pytest.mark.slow
def test_four_devices_equal_one(tmp_path):
    """The same samples and losses of SFT; from one student after SFT, the same losses of OPD.

    Two students that were trained on different meshes differ by more than rounding: Adam divides by
    the gradient's own size.
    """
    one, four, again = tmp_path / "one", tmp_path / "four", tmp_path / "again"
    finish(start(one, 1, "--stages", "answer,sft,rollout,score,train"))
    assert "4 cpu devices" in finish(start(four, 4, "--stages", "answer,sft,rollout"))
    assert_same_samples(one, four)
    want, got = losses(one), losses(four)
    assert {stage for stage, _, _ in got} == {"sft"}
    for key, value in got.items():
        assert value == pytest.approx(want[key], rel=1e-5, abs=1e-5), key
    shutil.copytree(one, again)
    assert "4 cpu devices" in finish(start(again, 4, "--stages", "train", "--force", "train"))
    assert_same_losses(one, again)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["fsdp", "data"])
def test_two_processes_equal_one(tmp_path, axis):
    one, two = tmp_path / "one", tmp_path / "two"
    words = (*EVERY_KIND, f"mesh.{axis}=2")
    alone = start(one, 2, *words)
    output = alone.communicate(timeout=LIMIT_SECONDS)[0].decode()
    assert alone.returncode == 0, output
    flags = (*words, "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2")
    pair = [start(two, 1, *flags, "--rank", str(rank)) for rank in range(2)]
    for process in pair:
        output = process.communicate(timeout=LIMIT_SECONDS)[0].decode()
        assert process.returncode == 0, output
    counts = [
        {name: stage.get("tokens") for name, stage in json.loads(text)["stages"].items()}
        for text in ((run / "summary.json").read_text() for run in (one, two))
    ]
    assert counts[0] == counts[1]  # the same samples, so the same number of tokens
    assert_same_samples(one, two)
    assert_same_losses(one, two, ("sft", "opd", "opd_topk", "opd_online"))
    assert json.loads((two / "stages" / "train.opd.json").read_text())["counts"]["rounds"] == 1
    for name in ("opd", "opd_topk", "opd_online"):
        want = load_file(one / "export" / name / "model.safetensors")
        got = load_file(two / "export" / name / "model.safetensors")
        for tensor, value in want.items():
            np.testing.assert_array_equal(got[tensor], value, err_msg=tensor)


@pytest.mark.slow
def test_the_processes_of_a_slurm_step_find_each_other(tmp_path):
    job = 7 + free_port() % 4000  # JAX takes its port from the job's number
    step = quick_environment() | {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
    }
    words = arguments(tmp_path / "run", "--stages", "answer", "--distributed")
    command = [sys.executable, "-m", "opd_jax.main", *words]
    pair = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=LIMIT_SECONDS)[0].decode() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "2 cpu devices in 2 processes, mesh fsdp 2" in outputs[0]
    for rank in range(2):
        assert f"process {rank} on {socket.gethostname()}: 1 of them" in outputs[0]
    assert "processes" not in outputs[1]
    assert len(samples(tmp_path / "run" / "answers")) == 24
