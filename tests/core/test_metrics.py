"""The metrics file: whole after a kill, without duplicates after a resume."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.core.metrics import MetricsWriter, read_metrics
from opd_jax.errors import ConfigError, DataError


def steps(run_dir, run="opd"):
    return [entry["step"] for entry in read_metrics(run_dir) if entry["run"] == run]


def write(run_dir, first, last, run="opd", **options):
    with MetricsWriter(run_dir, "train", run, first, **options) as writer:
        for step in range(first, last):
            writer.write(step, {"loss": 1 / (step + 1)})


def test_scalars_of_every_kind_are_read_back(tmp_path):
    with MetricsWriter(tmp_path, "sft", "sft") as writer:
        writer.write(np.int64(1), {"loss": jnp.float32(0.5), "tokens": np.int32(7), "w": 1})
        writer.write(2, {"loss": math.nan, "tokens": math.inf})
    first, second = read_metrics(tmp_path)
    assert first == {
        "stage": "sft", "run": "sft", "step": 1, "loss": 0.5, "tokens": 7.0, "w": 1.0
    }  # fmt: skip
    assert math.isnan(second["loss"])
    assert math.isnan(second["tokens"])


def test_every_line_is_strict_json(tmp_path):
    with MetricsWriter(tmp_path, "sft", "sft") as writer:
        writer.write(1, {"loss": math.nan})

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_no_file_means_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_resumed_run_drops_its_later_steps_and_nobody_elses(tmp_path):
    write(tmp_path, 0, 6, run="opd")
    write(tmp_path, 0, 6, run="opd_topk")
    write(tmp_path, 4, 8, run="opd")
    assert steps(tmp_path, "opd") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert steps(tmp_path, "opd_topk") == [0, 1, 2, 3, 4, 5]


def test_an_evaluation_that_comes_anew_is_dropped_with_what_follows(tmp_path):
    for stage in ("sft", "train"):
        with MetricsWriter(tmp_path, stage, "a") as writer:
            for step in range(3):
                writer.write(step, {"loss": step})
                writer.write(step, {"warnings": 0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with MetricsWriter(tmp_path, "train", "a", 2, again=True) as writer:
        # One that ends before it has a line leaves the earlier run's.
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        writer.write(1, {"warnings": 0})
    steps = [("sft", s, what) for s in range(3) for what in ("loss", "warnings")]
    steps += [("train", s, what) for s in range(2) for what in ("loss", "warnings")]
    found = read_metrics(tmp_path)
    assert [(x["stage"], x["step"], "loss" if "loss" in x else "warnings") for x in found] == steps


def test_the_same_run_name_in_another_stage_is_another_run(tmp_path):
    write(tmp_path, 0, 3)
    with MetricsWriter(tmp_path, "sft", "opd") as writer:
        writer.write(0, {"loss": 1})
    assert len(read_metrics(tmp_path)) == 4


def test_a_torn_last_line_is_dropped_by_reader_and_next_writer(tmp_path):
    write(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert steps(tmp_path) == [0, 1]
    write(tmp_path, 3, 4)
    assert steps(tmp_path) == [0, 1, 3]


@pytest.mark.parametrize("damage", [b"{broken\n", b"[1]\n", b'{"step": 1}\n'])
def test_damage_elsewhere_names_the_line(tmp_path, damage):
    write(tmp_path, 0, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage + path.read_bytes())
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: .*delete that line"):
        read_metrics(tmp_path)


def test_what_was_written_survives_a_kill(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from opd_jax.core.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1], 'train', 'opd')\n"
        "for step in range(5): writer.write(step, {'loss': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path) == [0, 1, 2, 3, 4]


def test_tensorboard_gets_the_same_figures(tmp_path):
    write(tmp_path, 0, 3, tensorboard=True)
    (events,) = (tmp_path / "tensorboard" / "train" / "opd").iterdir()
    assert b"loss" in events.read_bytes()


def test_tensorboard_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install tensorboardX"):
        write(tmp_path, 0, 1, tensorboard=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_weights_and_biases_gets_the_same_figures(tmp_path):
    code = (
        "import sys\n"
        "from opd_jax.core.metrics import MetricsWriter\n"
        "with MetricsWriter(sys.argv[1], 'train', 'opd', wandb='demo') as writer:\n"
        "    for step in range(3): writer.write(step, {'loss': step})\n"
    )
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    # A process of its own: its end is what the service that writes the file waits for.
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, check=True)
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"loss" in log.read_bytes()
    assert steps(tmp_path) == [0, 1, 2]


def test_weights_and_biases_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb=demo, but .* pip install wandb"):
        write(tmp_path, 0, 1, wandb="demo")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line_with_the_file(tmp_path):
    with MetricsWriter(tmp_path, "train", "opd") as writer:
        writer.write(0, {"loss": 1.0})
        writer._file.close()
        writer._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
        with pytest.raises(DataError, match=r"/dev/full: cannot be written \(No space left on dev"):
            writer.write(1, {"loss": 1.0})
    assert steps(tmp_path) == [0]
