"""What a train step takes and keeps, and where, in programs compiled for absent devices."""

import pytest

# Pipelined gathers take a turn out of each loop over layers, whose kernels would count twice.
UNPIPELINED = {"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=false"}


@pytest.fixture
def memory(compiled):
    def ask(target, remat, experts=0, moments="device", room=""):
        words = (target, remat, str(experts), moments, room)
        return compiled("compile_step.py", *words, **UNPIPELINED)

    return ask


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "h100:4"])
def test_layer_inputs_go_to_the_hosts_memory_on(memory, target):
    kept, offloaded = memory(target, "full"), memory(target, "offload")
    assert kept["host_bytes"] == 0
    assert offloaded["host_bytes"] == offloaded["layer_inputs"]
    assert kept["kernels"] == 4  # offloading unrolls the loop, so there they cannot be counted
    saved = kept["device_bytes"] - offloaded["device_bytes"]
    assert saved > 0.9 * kept["layer_inputs"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "h100:4"])
def test_without_rematerialisation_no_attention_kernel_runs_twice_on(memory, target):
    assert memory(target, "none")["kernels"] == 3  # forward, and two of the backward pass


@pytest.mark.slow
@pytest.mark.parametrize(("target", "room"), [("v5e:2x2", "400"), ("h100:4", "")])
def test_moments_on_the_host_visit_the_device_one_parameters_at_a_time_on(memory, target, room):
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


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "h100:4"])
def test_memory_grows_by_the_experts_weights_alone_on(memory, target):
    """Many experts take what their weights take, not a product with each of them."""
    few, many = (memory(target, "full", experts) for experts in (8, 64))
    weights = many["expert_weights"] - few["expert_weights"]
    # bfloat16 weights and gradients, whole or in shards: 3.9 bytes a weight on v5e, 3.3 on H100;
    # a dense product with every expert takes 66 on H100.
    assert many["device_bytes"] - few["device_bytes"] < 5 * weights


@pytest.mark.slow
def test_on_gpus_a_layers_weights_are_gathered_while_the_one_before_computes(compiled, memory):
    as_set = compiled("compile_step.py", "h100:4", "full")
    assert as_set["pipelined"] > memory("h100:4", "full")["pipelined"]
