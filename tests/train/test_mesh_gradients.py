"""A mesh changes neither losses nor gradients of packed rows."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh, put_batch
from opd_jax.errors import ConfigError
from opd_jax.train.step import Objective
from tests.train import mesh_gradients
from tests.train.mesh_gradients import EIGHT, EXPERTS, largest_differences, packed_batch

CONTEXT = MeshConfig(fsdp=2, context=2)


def test_segments_cross_the_cuts():
    segments = packed_batch()["segments_bt"]
    for ways in (2, 4):
        last = segments[:, :: segments.shape[1] // ways][:, 1:]
        before = segments[:, segments.shape[1] // ways - 1 :: segments.shape[1] // ways][:, :-1]
        assert np.mean((last == before) & (last > 0)) > 0.5


@pytest.mark.parametrize(
    ("objective", "pieces"),
    [
        (Objective("sampled"), 1),
        pytest.param(Objective("sampled"), 2, marks=pytest.mark.slow),
        pytest.param(Objective("sft"), 1, marks=pytest.mark.slow),
        pytest.param(Objective("topk", tail=True), 1, marks=pytest.mark.slow),
    ],
    ids=["sampled", "in two pieces", "sft", "topk"],
)
def test_tokens_cut_over_context(objective, pieces):
    assert max(largest_differences(objective, CONTEXT, pieces)) < 1e-5


@pytest.mark.slow
def test_experts_with_tokens_cut_over_context():
    balanced = Objective("sampled", router_balance=0.5)
    assert max(largest_differences(balanced, CONTEXT, **EXPERTS)) < 1e-5
    mesh = MeshConfig(fsdp=1, context=2, expert=2)
    assert max(largest_differences(balanced, mesh, **EXPERTS)) < 1e-5


@pytest.mark.slow
def test_eight_devices():
    """In a process of its own: this one has four."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, mesh_gradients.__file__]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    assert found.keys() == EIGHT.keys()
    assert max(max(apart) for apart in found.values()) < 1e-5, found


def test_rows_that_the_mesh_does_not_cut():
    mesh = make_mesh(CONTEXT)
    batch = {"input_bt": np.zeros((2, 9), np.int32), "count_b": np.zeros(2, np.int32)}
    message = (
        r"^batch input_bt: dim 'time'=9 is not divisible by mesh axis 'context'=2; "
        r"change mesh\.context$"
    )
    with pytest.raises(ConfigError, match=message):
        put_batch(mesh, batch)
    placed = put_batch(mesh, {**batch, "input_bt": np.zeros((2, 8), np.int32)})
    assert placed["input_bt"].sharding.shard_shape((2, 8)) == (1, 4)
    assert placed["count_b"].sharding.shard_shape((2,)) == (1,)
