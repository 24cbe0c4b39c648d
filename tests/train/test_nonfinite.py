"""A step that is not finite changes no parameter: it ends the run, with names, or is skipped."""

import shutil

import jax
import numpy as np
import pytest
from models import tiny
from test_loop import PLAIN, batch_of

from opd_jax.config import MeshConfig
from opd_jax.config_train import OptimConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.errors import DataError
from opd_jax.train import checkpoint
from opd_jax.train.batch_source import Source
from opd_jax.train.loop import MOST_SKIPPED, TrainJob, run_training
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.step import Objective, abstract_state

pytestmark = pytest.mark.usefixtures("compiled_once")
OPTIM = OptimConfig(learning_rate=1e-3, schedule="wsd", decay_share=1.0, warmup_steps=2)


def opd_batch(step, poisoned):
    """Stored scores of a batch; those of one step have a NaN."""
    batch = batch_of(step)
    shape, rng = batch["mask_bt"].shape, np.random.default_rng(step + 100)
    batch["teacher_bt"] = -rng.random(shape, np.float32)
    batch["sampler_bt"] = -rng.random(shape, np.float32)
    batch["weight_bt"] = np.ones(shape, np.float32)
    if poisoned:
        batch["teacher_bt"][1, 3] = np.nan
    return batch


def source(bad):
    def next_batch(step, current):
        return opd_batch(step, step in bad)

    return Source(
        lambda _start: next_batch, names=lambda step: [f"'p{step}'/{i}" for i in range(5)]
    )


def train(folder, bad=(), log=None, **changes):
    model, params = tiny(make_mesh(MeshConfig(fsdp=1)), num_layers=1)
    loop = PLAIN.model_copy(update={"steps": 5, "save_every": 1, "optim": OPTIM, **changes})
    job = TrainJob(model, Objective("sampled"), loop, folder, "inputs", keep=9)
    return run_training(job, lambda: params, source(bad), log or (lambda *_: None))


def state_of(folder, step):
    """The saved state."""
    model, _ = tiny(make_mesh(MeshConfig(fsdp=1)), num_layers=1)
    loop = PLAIN.model_copy(update={"steps": 5, "optim": OPTIM})
    abstract = abstract_state(model, make_optimizer(model, loop))
    return checkpoint.restore(folder, step, abstract)[0]


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_finite(tree):
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(tree))


def test_stop_names_the_records_and_the_checkpoint_is_from_before(tmp_path):
    folder = tmp_path / "opd"
    with pytest.raises(DataError) as caught:
        train(folder, bad={2})
    named = tmp_path / "opd.step2.txt"
    assert str(caught.value) == (
        "step 2: loss nan, gradient norm nan, update ratio 0, of 'p2'/0, 'p2'/1, 'p2'/2 and 2 "
        f"more (all in {named}); the last checkpoint in {folder} is from before; lower "
        "optim.learning_rate and redo the stage with --force, or set on_nonfinite=skip to leave "
        "such steps out"
    )
    assert named.read_text().split() == [f"'p2'/{i}" for i in range(5)]
    assert checkpoint.complete_steps(folder) == [1, 2]
    assert_finite(state_of(folder, 2))


def test_skip_leaves_the_parameters_as_they_were_and_goes_on_and_so_does_a_resumed_run(
    tmp_path, capsys
):
    lines = {}
    straight = train(tmp_path / "a", {2}, lines.__setitem__, on_nonfinite="skip")
    assert "WARNING: step 2: loss nan" in capsys.readouterr().out
    assert [lines[step].get("skipped") for step in range(5)] == [None, None, 1.0, None, None]
    rates = [lines[step]["learning_rate"] for step in range(5)]
    before, after = (state_of(tmp_path / "a", step) for step in (2, 3))
    assert (int(before.step), int(after.step)) == (2, 3)
    assert_equal(before.params, after.params)
    for step in (3, 5):
        assert_finite(state_of(tmp_path / "a", step))
    for later in ("00000004", "00000005"):
        shutil.rmtree(tmp_path / "a" / later)
    again = {}
    resumed = train(tmp_path / "a", {2}, again.__setitem__, on_nonfinite="skip")
    assert straight.skipped == resumed.skipped == 1
    assert {step: values["learning_rate"] for step, values in again.items()} == {
        3: rates[3],
        4: rates[4],
    }
    assert_equal(straight.params, resumed.params)


@pytest.mark.slow
def test_steps_in_a_row_end_the_run_over_restarts_too(tmp_path):
    many = {"steps": 30, "on_nonfinite": "skip"}
    bad = {1, *range(3, 30)}
    with pytest.raises(DataError, match=r"^step 12: loss nan.*; the 10th in a row; the last check"):
        train(tmp_path, bad, **many)
    assert checkpoint.complete_steps(tmp_path)[-1] == 2 + MOST_SKIPPED
    for step in checkpoint.complete_steps(tmp_path):
        assert_finite(state_of(tmp_path, step))
    lines = []
    with pytest.raises(DataError, match=r"^step 12: "):
        train(tmp_path, bad, lambda step, _: lines.append(step), **many)
    assert lines == []  # it goes on with nine behind it


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_update_beyond_float32_ends_the_run_before_it_is_saved(tmp_path, policy):
    """Its loss and gradient are finite: the parameters are lost, the checkpoints are not."""
    optim = OptimConfig(learning_rate=3e38, weight_decay=10.0, warmup_steps=0)
    with pytest.raises(DataError, match=r"^step 0: loss [\d.-]+, .*update ratio (inf|nan)"):
        train(tmp_path, optim=optim, on_nonfinite=policy)
    assert checkpoint.complete_steps(tmp_path) == []
