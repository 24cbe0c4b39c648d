"""Runs through the loop: one that was cut off and resumed ends as an undisturbed one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny

from opd_jax.config import LoopConfig, LoraConfig, MeshConfig, OptimConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.train import checkpoint
from opd_jax.train.loop import TrainJob, run_training
from opd_jax.train.step import Objective

PLAIN = LoopConfig(steps=4, batch_size=2, save_every=2, optim=OptimConfig(learning_rate=1e-3))
SMALL = OptimConfig(
    learning_rate=1e-2, schedule="wsd", decay_share=0.5, moments="int8", ema=0.5, warmup_steps=1
)
LORA = LoraConfig(rank=2, targets=("wq", "w_down"))


class CutError(Exception):
    pass


def batch_of(step, b=2, t=8):
    rng = np.random.default_rng(step)
    return {
        "input_bt": rng.integers(0, 64, (b, t)).astype(np.int32),
        "target_bt": rng.integers(0, 64, (b, t)).astype(np.int32),
        "positions_bt": np.tile(np.arange(t, dtype=np.int32), (b, 1)),
        "mask_bt": np.ones((b, t), bool),
    }


def train(folder, cut_at=None, seen=None, **changes):
    """The trained parameters; `seen` collects the parameters that each step's source can have."""
    model, params = tiny(make_mesh(MeshConfig(fsdp=1)), num_layers=1)
    loop = PLAIN.model_copy(update=changes)

    def next_batch(step, current):
        if step == cut_at:
            raise CutError
        if seen is not None:
            seen.append(jax.device_get(current()))
        return batch_of(step)

    job = TrainJob(model, Objective("sft"), loop, folder, "inputs", seed=3)
    return run_training(job, params, lambda _start: next_batch, lambda *_: None)


RUNS = [
    pytest.param({"optim": SMALL, "lora": LORA}, id="all"),
    pytest.param({}, id="plain", marks=pytest.mark.slow),
    pytest.param({"optim": SMALL}, id="small", marks=pytest.mark.slow),
    pytest.param({"lora": LORA}, id="lora", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("changes", RUNS)
def test_a_resumed_run_ends_with_the_bits_of_a_straight_one(tmp_path, changes):
    straight, tokens = train(tmp_path / "straight", **changes)
    with pytest.raises(CutError):
        train(tmp_path / "cut", cut_at=3, **changes)
    assert checkpoint.latest_step(tmp_path / "cut") == 2
    resumed, again = train(tmp_path / "cut", **changes)
    assert tokens == again == 4 * 16
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_source_sees_the_adapted_student_and_the_result_is_the_merged_average(tmp_path):
    seen = []
    optim = PLAIN.optim.model_copy(update={"ema": 0.5})
    result, _ = train(tmp_path, seen=seen, optim=optim, lora=LORA)
    _, start = tiny(num_layers=1)
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
