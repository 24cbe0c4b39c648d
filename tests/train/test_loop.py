"""Runs through the loop: one that was cut off and resumed ends as an undisturbed one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from opd_jax.config import MeshConfig
from opd_jax.config_train import LoopConfig, LoraConfig, OptimConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.train import checkpoint
from opd_jax.train.batch_source import Source
from opd_jax.train.loop import TrainJob, run_training
from opd_jax.train.step import Objective

PLAIN = LoopConfig(steps=4, batch_size=2, save_every=2, optim=OptimConfig(learning_rate=1e-3))
SMALL = OptimConfig(
    learning_rate=1e-2, schedule="wsd", decay_share=0.5, moments="int8", ema=0.5, warmup_steps=1
)
OFFLOADED = OptimConfig(learning_rate=1e-2, ema=0.5, offload=True)
LORA = LoraConfig(rank=2, targets=("wq", "w_down"))


def batch_of(step, b=2, t=8):
    rng = np.random.default_rng(step)
    return {
        "input_bt": rng.integers(0, 64, (b, t)).astype(np.int32),
        "target_bt": rng.integers(0, 64, (b, t)).astype(np.int32),
        "positions_bt": np.tile(np.arange(t, dtype=np.int32), (b, 1)),
        "segments_bt": np.ones((b, t), np.int32),
        "mask_bt": np.ones((b, t), bool),
    }


def train(folder, seen=None, profile=None, **changes):
    """The trained parameters; `seen` collects the parameters that each step's source can have."""
    model, params = tiny(make_mesh(MeshConfig(fsdp=1)), num_layers=1)

    def next_batch(step, current):
        if seen is not None:
            seen.append(jax.device_get(current()))
        return batch_of(step)

    loop = PLAIN.model_copy(update=changes)
    job = TrainJob(model, Objective("sft"), loop, folder, "inputs", 3, profile)
    return run_training(job, lambda: params, Source(lambda _start: next_batch), lambda *_: None)


def assert_resumed_equals(straight, folder, **changes):
    """The last of two checkpoints is taken away, and the run goes on from the first."""
    (folder / "00000004" / "complete.json").unlink()
    assert checkpoint.latest_step(folder) == 2
    seen = []
    resumed = train(folder, seen, **changes)
    assert len(seen) == 2
    assert resumed.tokens == straight.tokens == 4 * 16
    for a, b in zip(jax.tree.leaves(straight.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"optim": SMALL}, {"optim": OFFLOADED}, {"lora": LORA}],
    ids=["plain", "small", "offloaded", "lora"],
)
def test_a_resumed_run_ends_with_the_bits_of_a_straight_one(tmp_path, changes):
    assert_resumed_equals(train(tmp_path, **changes), tmp_path, **changes)


@pytest.mark.slow
def test_adapters_with_small_moments_and_an_average(tmp_path):
    """The source sees the merged student, the result is the merged average; resumed = straight."""
    changes, seen = {"optim": SMALL, "lora": LORA}, []
    straight = train(tmp_path, seen, **changes)
    result, (_, start) = straight.params, tiny(num_layers=1)
    assert jax.tree.map(jnp.shape, seen[0]) == jax.tree.map(jnp.shape, start)
    np.testing.assert_array_equal(seen[0]["layers"]["wq"], start["layers"]["wq"])
    moved = [np.abs(x["layers"]["wq"] - start["layers"]["wq"]).max() for x in seen]
    assert 0 == moved[0] < moved[1] < moved[2] < moved[3]
    for params in (seen[-1], result):
        np.testing.assert_array_equal(params["embed"], start["embed"])
        np.testing.assert_array_equal(params["layers"]["wk"], start["layers"]["wk"])
    names = json.loads((tmp_path / "00000004" / "complete.json").read_text())["tree"]
    assert not any("embed" in name or "wk" in name for name in names)
    average = np.abs(result["layers"]["wq"] - start["layers"]["wq"]).max()
    assert 0 < average < moved[3]  # of all steps, the first ones too
    assert_resumed_equals(straight, tmp_path, **changes)


@pytest.mark.slow
def test_a_trace_has_a_few_steps_in_it(tmp_path):
    """Also of a run that ends while it is traced."""
    for steps in (5, 8):
        folder = tmp_path / f"trace{steps}"
        train(tmp_path / f"state{steps}", profile=folder, steps=steps)
        assert list(folder.rglob("*.xplane.pb"))


def test_what_a_draw_takes_belongs_to_the_step_that_it_is_for(tmp_path):
    """The step before is told before the draw begins; others once the next one is under way."""
    model, params = tiny(make_mesh(MeshConfig(fsdp=1)), num_layers=1)
    order = []

    def next_batch(step, current):
        order.append(f"draw {step}")
        return batch_of(step)

    job = TrainJob(model, Objective("sft"), PLAIN, tmp_path, "inputs", 3)
    source = Source(lambda _start: next_batch, 1, 2, draws=True)
    run_training(job, lambda: params, source, lambda step, _: order.append(f"told {step}"))
    assert order == ["draw 0", "draw 1", "told 0", "told 1", "draw 2", "draw 3", "told 2", "told 3"]
