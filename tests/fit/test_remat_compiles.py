"""What `model.remat` keeps of the layers, and where, in programs compiled for absent devices."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_jax.fit.topology import environment

SCRIPT = Path(__file__).with_name("compile_step.py")


@functools.cache
def memory(target, remat, experts=0, moments="device", room=""):
    command = [sys.executable, str(SCRIPT), target, remat, str(experts), moments, room]
    # Pipelined gathers take a turn out of each loop over layers, whose kernels would count twice.
    env = environment({**os.environ, "XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=false"})
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "h100:4"])
def test_layer_inputs_go_to_the_hosts_memory_on(target):
    kept, offloaded = memory(target, "full"), memory(target, "offload")
    assert kept["host_bytes"] == 0
    assert offloaded["host_bytes"] == offloaded["layer_inputs"]
    assert kept["kernels"] == 4  # offloading unrolls the loop, so there they cannot be counted
    saved = kept["device_bytes"] - offloaded["device_bytes"]
    assert saved > 0.9 * kept["layer_inputs"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "h100:4"])
def test_without_rematerialisation_no_attention_kernel_runs_twice_on(target):
    assert memory(target, "none")["kernels"] == 3  # forward, and two of the backward pass


@pytest.mark.slow
@pytest.mark.parametrize(("target", "room"), [("v5e:2x2", "400"), ("h100:4", "")])
def test_moments_on_the_host_visit_the_device_one_parameters_at_a_time_on(target, room):
    """A TPU that has room to spare fetches some before the backward pass: this one has none."""
    kept, offloaded = memory(target, "full"), memory(target, "full", moments="host", room=room)
    moments = kept["moments"]
    assert kept["host_argument_bytes"] == 0
    assert offloaded["host_argument_bytes"] > 0.99 * moments
    saved = kept["argument_bytes"] - offloaded["argument_bytes"]
    assert saved > 0.99 * moments
    # Two moments of the largest parameter come, and go back as new ones.
    more = offloaded["device_bytes"] - kept["device_bytes"]
    assert more < 4 * offloaded["largest_parameter"] < 0.5 * moments
