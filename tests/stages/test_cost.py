"""What `--plan` says a training will cost."""

from tiny_run import CONFIG, TINY

from opd_jax.config_load import load_config
from opd_jax.stages.cost import estimate, parameter_count
from opd_jax.stages.pipeline import open_run


def cost_of(tmp_path, *words):
    ctx = open_run(load_config(CONFIG, [f"run_dir={tmp_path / 'run'}", *TINY, *words]))
    return estimate(ctx, "train.opd"), parameter_count(ctx.program("student").arch)


def test_adapters_cost_their_own_state_and_no_gradient_of_frozen_weights(tmp_path):
    words = ("train.runs.opd.lora.rank=2", "train.runs.opd.lora.targets=[wq]")
    full, weights = cost_of(tmp_path)
    lora, _ = cost_of(tmp_path, *words)
    added = 2 * 2 * (64 + 64)  # two layers, rank 2, 64 inputs and 4 heads of 16
    assert full.flops == 6 * weights * full.tokens
    assert lora.flops == (4 * weights + 6 * added) * full.tokens
    assert full.stored_bytes == 12 * weights
    assert lora.stored_bytes == 4 * weights + 12 * added
