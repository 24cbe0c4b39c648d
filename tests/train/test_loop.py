"""Runs through the loop: one that was cut off and resumed ends as an undisturbed one."""

import jax
import numpy as np
import pytest
from models import tiny

from opd_jax.config import LoopConfig, OptimConfig
from opd_jax.train import checkpoint
from opd_jax.train.loop import TrainJob, run_training
from opd_jax.train.step import Objective

PLAIN = OptimConfig(learning_rate=1e-3)
SMALL = OptimConfig(
    learning_rate=1e-3, schedule="wsd", decay_share=0.5, moments="int8", ema=0.5, warmup_steps=1
)


class Cut(Exception):
    pass


def batch_of(step, b=2, t=8):
    rng = np.random.default_rng(step)
    return {
        "input_bt": rng.integers(0, 64, (b, t)).astype(np.int32),
        "target_bt": rng.integers(0, 64, (b, t)).astype(np.int32),
        "positions_bt": np.tile(np.arange(t, dtype=np.int32), (b, 1)),
        "mask_bt": np.ones((b, t), bool),
    }


def train(folder, optim, cut_at=None, seen=None):
    """The trained parameters; `seen` collects what each step's source is given."""
    model, params = tiny(num_layers=1)
    loop = LoopConfig(steps=4, batch_size=2, save_every=2, optim=optim)

    def next_batch(step, current):
        if step == cut_at:
            raise Cut
        if seen is not None:
            seen.append(current)
        return batch_of(step)

    job = TrainJob(model, Objective("sft"), loop, folder, "inputs")
    return run_training(job, params, lambda _start: next_batch, lambda *_: None)


@pytest.mark.parametrize("optim", [PLAIN, SMALL], ids=["plain", "small"])
def test_a_resumed_run_ends_with_the_bits_of_a_straight_one(tmp_path, optim):
    straight, tokens = train(tmp_path / "straight", optim)
    with pytest.raises(Cut):
        train(tmp_path / "cut", optim, cut_at=3)
    assert checkpoint.latest_step(tmp_path / "cut") == 2
    resumed, again = train(tmp_path / "cut", optim)
    assert tokens == again == 4 * 16
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_trained_model_is_the_average(tmp_path):
    average, _ = train(tmp_path / "average", PLAIN.model_copy(update={"ema": 0.5}))
    last, _ = train(tmp_path / "last", PLAIN)
    assert not np.array_equal(average["embed"], last["embed"])
    assert np.abs(average["embed"] - last["embed"]).max() < 4e-3  # 4 steps of at most 1e-3
