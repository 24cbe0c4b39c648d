"""What a run knows of its models stays true while it runs."""

import shutil

import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import CONFIG, ROOT

from opd_jax.config_load import load_config
from opd_jax.errors import ConsistencyError
from opd_jax.stages.pipeline import open_run


@pytest.fixture
def ctx(tmp_path):
    """A run whose teacher lies in a folder of the test's own."""
    shutil.copytree(ROOT / "configs" / "quickstart" / "teacher", tmp_path / "teacher")
    words = [f"run_dir={tmp_path / 'run'}", f"model.teacher={tmp_path / 'teacher'}"]
    return open_run(load_config(CONFIG, words))


def change(folder):
    """One value of one tensor; the file's size stays."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(tensors, folder / "model.safetensors")


def refusal(folder):
    return (
        f"model.teacher: model.safetensors of {folder} changed since this run first read it; run "
        "again: if the weights are others, that is another model"
    )


def test_weights_that_change_between_two_stages_are_refused(ctx, tmp_path):
    before = ctx.identity("teacher")
    ctx.model("teacher")
    ctx.release_models()
    change(tmp_path / "teacher")
    assert ctx.identity("teacher") == before  # known by now
    with pytest.raises(ConsistencyError) as caught:
        ctx.model("teacher")
    assert str(caught.value) == refusal(tmp_path / "teacher")


@pytest.mark.parametrize(
    ("step", "ask"),
    [
        ("read_model", lambda ctx: ctx.model("teacher")),
        ("weights_fingerprint", lambda ctx: ctx.identity("teacher")),
    ],
)
def test_weights_that_change_while_they_are_read_are_refused(ctx, tmp_path, monkeypatch, step, ask):
    monkeypatch.setattr(f"opd_jax.stages.context.{step}", lambda *_: change(tmp_path / "teacher"))
    with pytest.raises(ConsistencyError) as caught:
        ask(ctx)
    assert str(caught.value) == refusal(tmp_path / "teacher")


def test_where_moments_lie_and_how_rows_are_cut_is_no_input_of_a_stage(tmp_path):
    words = ("micro_batch_size=16", "optim.offload=true")
    run_dir = f"run_dir={tmp_path}"
    plain, other = (
        open_run(load_config(CONFIG, [run_dir, *(f"sft.{word}" for word in more)]))
        for more in ((), words)
    )
    assert other.config.sft.optim.offload
    assert plain.settings(plain.config.sft) == other.settings(other.config.sft)
    faster = load_config(CONFIG, [run_dir, "sft.optim.learning_rate=0.1"])
    assert plain.settings(plain.config.sft) != plain.settings(faster.sft)
