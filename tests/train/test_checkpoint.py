"""Checkpoints come back bit for bit, on any mesh, or not at all."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec
from processes import run_two

from opd_jax.errors import DataError
from opd_jax.train.checkpoint import complete_steps, latest_step, restore, save


def mesh_of(*shape):
    axes = ("data", "fsdp")
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, axes, devices=jax.devices()[: np.prod(shape)], axis_types=kinds)


def abstract_of(tree, mesh, *spec):
    def leaf(x):
        fits = PartitionSpec(*spec) if x.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, fits))

    return jax.tree.map(leaf, tree)


def train_state(mesh):
    """Parameters and AdamW moments after an update, as a trainer holds them."""
    params = {
        "w": jnp.linspace(-1, 1, 64).reshape(8, 8),
        "layers": {"b": jnp.full((8,), 1 / 3, jnp.bfloat16)},
    }
    optimizer = optax.adamw(1e-3)
    _, moments = optimizer.update(params, optimizer.init(params), params)
    tree = {"params": params, "opt": moments, "step": jnp.int32(7)}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_of(tree, mesh, "fsdp"))
    return jax.device_put(tree, shardings)


def assert_bits_equal(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for value, expected in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert value.dtype == expected.dtype
        assert np.asarray(value).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1, 4), ("fsdp",)),
        ((2, 2), ("fsdp", "data")),
        ((1, 1), ()),
    ],
)
def test_restores_bit_for_bit_on_this_and_other_meshes(tmp_path, shape, spec):
    tree = train_state(mesh_of(1, 4))
    save(tmp_path, 7, tree, {"seed": 3})
    mesh = mesh_of(*shape)
    restored, meta, step = restore(tmp_path, None, abstract_of(tree, mesh, *spec))
    assert (meta, step) == ({"seed": 3}, 7)
    assert_bits_equal(restored, tree)
    assert restored["params"]["w"].sharding.is_equivalent_to(
        NamedSharding(mesh, PartitionSpec(*spec)), 2
    )


@settings(max_examples=6)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5)),
    hnp.arrays(np.int32, hnp.array_shapes(max_dims=2, max_side=5)),
)
def test_any_values_come_back(floats, integers):
    tree = {"f": jnp.asarray(floats), "i": [jnp.asarray(integers)]}
    with tempfile.TemporaryDirectory() as folder:
        save(folder, 0, tree, {})
        restored, _, _ = restore(folder, 0, abstract_of(tree, mesh_of(1, 1)))
        assert_bits_equal(restored, tree)


def test_the_newest_complete_step_counts_and_old_ones_go(tmp_path):
    tree = {"x": jnp.arange(4.0)}
    assert latest_step(tmp_path / "nowhere") is None
    for step in (2, 10, 100):
        save(tmp_path, step, {"x": tree["x"] + step}, {"step": step}, keep=2)
    assert complete_steps(tmp_path) == [10, 100]
    assert latest_step(tmp_path) == 100
    abstract = abstract_of(tree, mesh_of(1, 1))
    older, meta, step = restore(tmp_path, 10, abstract)
    assert (older["x"][0], meta["step"], step) == (10, 10, 10)
    (tmp_path / "00000100/complete.json").unlink()
    assert restore(tmp_path, None, abstract)[2] == 10
    save(tmp_path, 11, tree, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010", "00000011"]


def test_a_step_can_be_saved_again(tmp_path):
    abstract = abstract_of({"x": jnp.zeros(3)}, mesh_of(1, 1))
    for value in (1.0, 2.0):
        save(tmp_path, 5, {"x": jnp.full(3, value)}, {"value": value})
    tree, meta, _ = restore(tmp_path, 5, abstract)
    assert (tree["x"][0], meta["value"]) == (2, 2.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2 of a state, and its abstract tree."""
    directory = tmp_path_factory.mktemp("saved") / "sft"
    tree = train_state(mesh_of(1, 4))
    for step in (1, 2):
        save(directory, step, tree, {"seed": 3})
    return directory, abstract_of(tree, mesh_of(1, 4))


def test_every_flipped_bit_is_found_and_the_repair_works(saved, tmp_path):
    """2 bits of every file Orbax or we wrote."""
    directory = tmp_path / "sft"
    shutil.copytree(saved[0], directory)
    rng = np.random.default_rng(0)
    paths = sorted(path for path in (directory / "00000002").rglob("*") if path.is_file())
    assert len(paths) > 5
    for path in paths:
        raw = path.read_bytes()
        for _ in range(2 if raw else 0):
            bit = int(rng.integers(8 * len(raw)))
            harmed = bytearray(raw)
            harmed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bytes(harmed))
            with pytest.raises(DataError) as caught:
                restore(directory, None, saved[1])
            message = str(caught.value)
            assert str(path) in message
            assert f"delete {directory}/00000002 to go on from step 1" in message
            assert "\n" not in message
        path.write_bytes(raw)
    assert restore(directory, None, saved[1])[2] == 2
    path.write_bytes(harmed)
    shutil.rmtree(directory / "00000002")
    assert restore(directory, None, saved[1])[2] == 1


@pytest.mark.parametrize("harm", ["removed", "truncated"])
def test_missing_and_truncated_files_are_found(saved, tmp_path, harm):
    directory = tmp_path / "sft"
    shutil.copytree(saved[0], directory)
    shutil.rmtree(directory / "00000001")
    step = directory / "00000002"
    largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = largest.read_bytes()
    largest.unlink()
    if harm == "truncated":
        largest.write_bytes(raw[:-1])
    with pytest.raises(DataError, match=rf"{largest}: .*delete {step} to begin again"):
        restore(directory, 2, saved[1])


def test_missing_steps_and_other_trees_are_one_line(saved, tmp_path):
    directory, abstract = saved
    with pytest.raises(DataError, match=r"no checkpoint of step 9; complete are \[1, 2\]"):
        restore(directory, 9, abstract)
    with pytest.raises(DataError, match="no checkpoint; run the stage"):
        restore(tmp_path, None, abstract)
    whole = abstract["step"].sharding
    wide = {**abstract, "step": jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole)}
    others = {
        r"step: int32\[\] there, int32\[2\] here": wide,
        r"more: nothing there, int32\[\] here": {**abstract, "more": abstract["step"]},
        r"opt/0/count: int32\[\] there, nothing here": {"step": abstract["step"]},
    }
    for difference, other in others.items():
        with pytest.raises(DataError, match=f"another tree.*{difference}") as caught:
            restore(directory, 2, other)
        assert "\n" not in str(caught.value)


def test_unwritable_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        save(tmp_path / "file", 1, {"x": jnp.zeros(2)}, {})


KILLED = textwrap.dedent(
    """
    import sys, jax.numpy as jnp
    from opd_jax.train.checkpoint import save
    for step in range(10_000):
        save(sys.argv[1], step, {"x": jnp.full(100_000, step)}, {"step": step}, keep=3)
        print(step, flush=True)
    """
)


def test_kill_9_leaves_the_newest_complete_step(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        printed = next(int(line) for line in writer.stdout if int(line) >= 4)
        os.kill(writer.pid, signal.SIGKILL)
    abstract = abstract_of({"x": jnp.full(100_000, 0)}, mesh_of(1, 1))
    tree, meta, step = restore(tmp_path, None, abstract)
    assert step >= printed
    assert meta == {"step": step}
    assert (tree["x"] == step).all()


TWO = """
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from opd_jax.errors import DataError
from opd_jax.train.checkpoint import restore, save
sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("fsdp",)), PartitionSpec("fsdp"))
value = np.arange(32, dtype=np.float32)
x = jax.make_array_from_callback((32,), sharding, lambda index: value[index])
abstract = {"x": jax.ShapeDtypeStruct((32,), jnp.float32, sharding=sharding)}
for step in (1, 2):
    save(folder, step, {"x": x * step}, {"step": step}, keep=1)
tree, meta, step = restore(folder, None, abstract)
for shard in tree["x"].addressable_shards:
    assert (np.asarray(shard.data) == 2 * value[shard.index]).all()
if rank == 0:
    from pathlib import Path
    path = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.stat().st_size)[-1]
    path.write_bytes(path.read_bytes()[:-1])
jax.experimental.multihost_utils.sync_global_devices("harmed")
try:
    restore(folder, None, abstract)
except DataError:
    say("refused")
"""


@pytest.mark.slow
def test_two_processes_save_one_checkpoint_and_both_refuse_a_damaged_one(tmp_path):
    assert run_two(TWO, tmp_path) == ["refused\n", "refused\n"]
    assert [path.name for path in Path(tmp_path).iterdir()] == ["00000002"]
