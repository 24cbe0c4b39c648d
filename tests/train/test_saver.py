"""Saves in the background: of the step they are of, one at a time, and what fails is told."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import run_python, run_two

from opd_jax.errors import DataError
from opd_jax.train import checkpoint
from opd_jax.train.checkpoint import Saver, complete_steps, restore

ROUNDS = 12
step_fn = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)


def abstract_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def place_of(tree):
    """Where its first buffer lies in memory."""
    return jax.tree.leaves(tree)[0].addressable_shards[0].data.unsafe_buffer_pointer()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_saved_step_is_that_step_though_its_buffers_are_donated_and_overwritten(
    tmp_path, sharded
):
    tree = {"a": jnp.zeros((64, 1024)), "b": jnp.zeros(16, jnp.bfloat16), "step": jnp.int32(0)}
    if sharded:
        axis = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((4,), ("fsdp",), axis_types=axis)
        cut, whole = (jax.NamedSharding(mesh, jax.P(*spec)) for spec in (("fsdp",), ()))
        tree = jax.device_put(tree, {"a": cut, "b": whole, "step": whole})
    in_place = 0
    with Saver(tmp_path) as saver:
        for number in range(ROUNDS):
            saver.save(number, tree, {"number": number})
            tree = step_fn(tree)
            before = place_of(tree)
            for _ in range(9):
                tree = step_fn(tree)
            in_place += place_of(tree) == before
    assert in_place > ROUNDS // 2  # else this test would prove nothing
    for number in range(ROUNDS):
        found, meta, _ = restore(tmp_path, number, abstract_of(tree))
        assert meta == {"number": number}
        for leaf in jax.tree.leaves(found):
            np.testing.assert_array_equal(np.asarray(leaf, np.float32), 10 * number)


@pytest.fixture
def held(monkeypatch):
    """Saves stop before they are complete until `held.set()`; `held.under_way` counts them."""
    gate, complete = threading.Event(), checkpoint._Save.complete
    gate.under_way, gate.most = 0, 0

    def slowly(save):
        gate.under_way += 1
        gate.most = max(gate.most, gate.under_way)
        assert gate.wait(60)
        complete(save)
        gate.under_way -= 1

    monkeypatch.setattr(checkpoint._Save, "complete", slowly)
    return gate


def test_two_quick_saves_do_not_overlap(tmp_path, held):
    tree = {"x": jnp.arange(4.0)}
    with Saver(tmp_path) as saver:
        saver.save(1, tree, {})
        saver.settle()  # between steps nothing waits for the disk
        assert complete_steps(tmp_path) == []
        threading.Timer(0.2, held.set).start()
        saver.save(2, tree, {})
        assert complete_steps(tmp_path)[0] == 1
    assert complete_steps(tmp_path) == [1, 2]
    assert held.most == 1


def test_an_exception_waits_for_the_save_under_way_and_stays_what_it_is(tmp_path, held):
    threading.Timer(0.2, held.set).start()

    def fail():
        with Saver(tmp_path) as saver:
            saver.save(1, {"x": jnp.arange(4.0)}, {})
            raise KeyError("step")

    with pytest.raises(KeyError, match="step"):
        fail()
    assert complete_steps(tmp_path) == [1]


def no_space(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("told", ["settle", "save", "finish", "exit"])
def test_a_full_disk_in_the_background_is_one_line_and_the_step_before_stays(
    tmp_path, monkeypatch, told
):
    tree = {"x": jnp.arange(4.0)}
    saver = Saver(tmp_path, keep=1)
    saver.save(1, tree, {})
    saver.finish()
    monkeypatch.setattr(checkpoint, "file_digests", no_space)
    saver.save(2, tree, {})
    saver._thread.join()
    with pytest.raises(DataError) as caught:
        {
            "settle": saver.settle,
            "save": lambda: saver.save(3, tree, {}),
            "finish": saver.finish,
            "exit": lambda: saver.__exit__(None, None, None),
        }[told]()
    assert str(caught.value) == (
        f"{tmp_path}/00000002: cannot be written ([Errno 28] No space left on device); free space "
        "or choose another run_dir"
    )
    saver.finish()  # told once
    assert complete_steps(tmp_path) == [1]
    monkeypatch.undo()
    saver.save(3, tree, {})
    saver.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["00000003"]


FULL = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp
import numpy as np
from opd_jax.errors import DataError
from opd_jax.train.checkpoint import Saver
noise = np.random.default_rng(0).random(100_000).astype(np.float32)
with Saver(Path(sys.argv[1])) as saver:
    saver.save(1, {"x": jnp.asarray(noise)}, {})
    saver.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000,) * 2)
    try:
        saver.save(2, {"x": jnp.asarray(noise)}, {})
        saver.finish()
    except DataError as error:
        print(error)
"""


def test_files_that_cannot_grow_are_one_line(tmp_path):
    """As on a full disk: Orbax's own writes fail, in its threads."""
    (line,) = run_python(FULL, tmp_path).splitlines()
    assert line.startswith(f"{tmp_path}/00000002: cannot be written (")
    assert line.endswith("); free space or choose another run_dir")
    assert complete_steps(tmp_path) == [1]


TWO = """
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec
from opd_jax.train.checkpoint import Saver, complete_steps, restore
sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("fsdp",)), PartitionSpec("fsdp"))
x = jax.make_array_from_callback((32,), sharding, lambda index: np.zeros(32, np.float32)[index])
step_fn = jax.jit(lambda x: x + 1, donate_argnums=0)
with Saver(Path(folder)) as saver:
    for step in range(8):
        if step % 3 == 0:
            saver.save(step, {"x": x}, {"step": step})
        x = step_fn(x)
        saver.settle()
        assert complete_steps(folder)[-1] == step // 3 * 3  # settled on both
abstract = {"x": jax.ShapeDtypeStruct((32,), jnp.float32, sharding=sharding)}
for step in (0, 3, 6):
    tree, meta, _ = restore(folder, step, abstract)
    assert meta == {"step": step}
    for shard in tree["x"].addressable_shards:
        assert (np.asarray(shard.data) == step).all()
say("done")
"""


@pytest.mark.slow
def test_two_processes_complete_a_save_between_steps(tmp_path):
    assert run_two(TWO, tmp_path) == ["done\n", "done\n"]
