"""Names of targets, and the tables behind them."""

import math
import subprocess
import sys

import pytest

from opd_jax.core.peak import peak_flops
from opd_jax.errors import ConfigError
from opd_jax.fit.hardware import CARDS, TPUS, card_text
from opd_jax.fit.targets import SHAPES, candidates, larger, parse_target
from opd_jax.fit.topology import environment

GOOD = {
    "v5e:4x4": ("v5e", 16, "4x4"),
    "v5e-16": ("v5e", 16, "4x4"),
    "v5e-256": ("v5e", 256, "16x16"),
    "v6e-8": ("v6e", 8, "2x4"),
    "v5p-32": ("v5p", 16, "2x2x4"),  # TensorCores, two in a chip
    "v5p-8": ("v5p", 4, "2x2x1"),
    "v4-16": ("v4", 8, "2x2x2"),
    "v5p:4x4x8": ("v5p", 128, "4x4x8"),
    "8xh100": ("h100", 8, ""),
    "h100:8": ("h100", 8, ""),
    "H200:2": ("h200", 2, ""),
    "a100-40:4": ("a100-40", 4, ""),
    "8xA100-80": ("a100-80", 8, ""),
    "b200": ("b200", 1, ""),
    "h100:16": ("h100", 16, ""),
    "2xv5e-16": ("v5e", 32, "4x4"),
    "4xv5p-32": ("v5p", 64, "2x2x4"),
    "2xv6e:2x4": ("v6e", 16, "2x4"),
}
SLICES = {"2xv5e-16": 2, "4xv5p-32": 4, "2xv6e:2x4": 2}
BAD = {
    "": "unknown target ''",
    "cpu": "unknown target 'cpu'",
    "v9-16": "unknown TPU 'v9'; known: v4, v5e, v5p, v6e",
    "v5e-17": "v5e slices have 1, 4, 8, 16, 32, 64, 128, 256 chips",
    "v5p-6": "TensorCores; or give a shape, such as v5p:2x2x4",
    "v5e:4x4x4": "a v5e slice has 2 sides",
    "v5p:4x4": "a v5p slice has 3 sides",
    "v5e:0x4": "a v5e slice has 2 sides",
    "v5e:32x32": "has 1024 chips; a v5e slice has at most 256",
    "8xa100": "unknown card 'a100'; known: a100-40, a100-80, h100, h200, b200",
    "h100:0": "0 cards; give 1 to 8, or whole nodes of 8",
    "h100:12": "12 cards",
    "0xv5e-16": "0 slices; give 1 to 64, as in 2xv5e-16",
    "65xv5e-16": "65 slices",
    "2xv5e-17": "target '2xv5e-17': v5e slices have",
    "2xv9-16": "unknown TPU 'v9'",
}


@pytest.mark.parametrize("name", GOOD)
def test_a_target_is_known_by(name):
    found = parse_target(name)
    assert (found.generation, found.count, found.shape) == GOOD[name]
    assert found.slices == SLICES.get(name, 1)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_target_says_what_is_wrong(name):
    with pytest.raises(ConfigError) as caught:
        parse_target(name)
    assert BAD[name] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shapes_have_as_many_chips_as_they_stand_for():
    for shapes in SHAPES.values():
        for chips, shape in shapes.items():
            assert math.prod(map(int, shape.split("x"))) == chips


def test_every_device_has_a_peak():
    for device in [*TPUS.values(), *(card.device for card in CARDS.values())]:
        assert peak_flops(device.kind) is not None, device.kind
    assert peak_flops(TPUS["v5p"].kind) == 459e12
    assert peak_flops(TPUS["v5e"].kind) == 197e12


def test_a_cards_text_holds_its_figures():
    text = card_text(CARDS["a100-80"])
    for line in (
        "core_count: 108",
        "fpus_per_core: 64",
        "memory_bandwidth: 2039000000000",
        "shared_memory_per_block_optin: 166912",
        "cuda_compute_capability { major: 8 minor: 0 }",
        "device_memory_size: 84986691584",
    ):
        assert f"  {line}\n" in text


def test_auto_tries_small_slices_first():
    assert candidates("auto")[:3] == ["v5e:1x1", "v5e:2x2", "v5e:2x4"]
    assert candidates("auto:h200") == [f"h200:{n}" for n in (1, 2, 4, 8, 16, 32)]
    counts = [parse_target(name).count for name in candidates("auto:v5p")]
    assert counts == sorted(counts)
    assert counts[-1] == 256
    with pytest.raises(ConfigError, match="after 'auto:' comes one of v4"):
        candidates("auto:v9")


@pytest.mark.slow
def test_every_kind_of_slice_and_card_has_as_many_devices_as_it_is_named_for():
    """In a process of its own, as the plugins settle what JAX sees."""
    names = ["v5e-1", "v5e-4", "v5e-256", "v6e-8", "v5p-32", "v4-16", "v5p:2x2x1"]
    names += ["2xv5e-16", "2xv5p-8", "2xv5e-1", "2xv4-16"]
    names += ["a100-40:4", "a100-80:8", "h100:8", "h200:2", "b200:8", "h100:16"]
    code = (
        "import sys\n"
        "from opd_jax.fit.topology import devices_of\n"
        f"for name in {names}:\n"
        "    devices = devices_of(name)\n"
        "    said = '|'.join(['found', name, str(len(devices)), devices[0].device_kind])\n"
        "    sys.stdout.write(f'\\n{said}\\n')  # at once: libraries print as well\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split("|")[1:] for line in done.stdout.splitlines() if line.startswith("found|")]
    assert [name for name, _, _ in lines] == names
    for name, count, kind in lines:
        target = parse_target(name)
        assert int(count) == target.count, name
        assert kind == target.device.kind, name


@pytest.mark.parametrize(
    ("target", "next_one"),
    [
        ("v5e-8", "v5e:4x4"),
        ("v5p-16", "v5p:2x2x4"),
        ("h100:8", "h100:16"),
        ("v5e-256", None),
        ("2xv5e-16", None),
    ],
)
def test_the_next_larger_target(target, next_one):
    assert larger(parse_target(target)) == next_one
