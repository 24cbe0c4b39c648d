"""The real compilers of absent devices take attention, and no [t, t] array exists."""

import pytest

from opd_jax.errors import ConfigError
from opd_jax.fit.topology import devices_of, environment

CASES = [
    ("v5e:2x2", "splash", "bfloat16", 16384, 128, "packed", "fsdp"),
    ("v5e:2x2", "splash", "float32", 4096, 64, "whole", "fsdp"),
    ("h100:4", "triton", "bfloat16", 16384, 128, "packed", "fsdp"),
    ("h100:4", "triton", "float32", 4096, 64, "whole", "fsdp"),
    ("v5e:2x2", "chunked", "bfloat16", 16384, 128, "packed", "fsdp"),
    ("h100:4", "chunked", "bfloat16", 16384, 256, "packed", "fsdp"),
    ("v5e:2x2", "splash", "bfloat16", 16384, 128, "packed", "context"),
    ("h100:4", "chunked", "bfloat16", 16384, 128, "packed", "context"),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_forward_and_backward_compile_for(compiled, case):
    tokens = case[3]
    found = compiled("compile_attention.py", *map(str, case))
    assert found["chosen"] == case[1]
    assert found["devices"] == 4
    if case[1] != "chunked":
        assert found["kernel_calls"] >= 3  # forward, and two of the backward pass
    assert found["square_arrays"] == 0
    # The scores of a single head; a device has eight of them. What is linear in t remains.
    assert found["temp_bytes"] < 4 * tokens**2


@pytest.mark.parametrize("target", ["h100:", "v5e", "abacus:4"])
def test_an_unknown_target(target):
    with pytest.raises(ConfigError, match=f"fit: unknown target '{target}'; name a TPU slice"):
        devices_of(target)


def test_the_environment_keeps_fake_devices_out():
    made = environment({"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "HOME": "/home"})
    assert "host_platform" not in made["XLA_FLAGS"]
    assert made["HOME"] == "/home"
    assert made["JAX_PLATFORMS"] == "cpu"
