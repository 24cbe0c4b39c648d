"""The configs of the paper: its settings, and an online twin that differs in one thing."""

import pytest

from opd_jax.config_load import load_config
from opd_jax.config_train import OptimConfig
from opd_jax.train.jobs import spread_batches

NAMES = {"qwen3_4b": 256, "qwen3_8b": 128, "qwen3_30b_a3b": 128}


@pytest.mark.parametrize(("name", "sft_batch"), NAMES.items())
def test_the_settings_are_the_papers(name, sft_batch):
    config = load_config(f"configs/{name}.yaml")
    run = config.train.runs["opd"]
    assert config.train.enabled == ("opd",)
    assert (run.algorithm, run.objective, run.average) == ("lightning_opd", "sampled", "sequence")
    assert (run.steps, run.batch_size, run.tau) == (150, 256, 10)
    wanted = OptimConfig(
        learning_rate=2e-6, schedule="constant", b1=0.9, b2=0.98, weight_decay=0.1, clip_norm=1
    )
    assert run.optim.model_copy(update={"moments": "float32"}) == wanted
    assert config.rollout.temperature == 0.8
    assert config.rollout.top_p == 1
    assert config.rollout.max_new_tokens == 4096
    sft = config.sft
    assert (sft.steps, sft.batch_size, sft.row_tokens) == (3000, sft_batch, 16384)
    assert (sft.optim.learning_rate, sft.optim.schedule) == (8e-5, "cosine")
    assert sft.optim.warmup_steps == 0.1 * sft.steps
    assert config.prompts.max_prompt_tokens + config.answer.max_new_tokens <= sft.row_tokens


@pytest.mark.parametrize("name", NAMES)
def test_the_online_twin_differs_in_where_the_samples_come_from(name):
    offline, online = (load_config(f"configs/{name}{end}.yaml") for end in ("", "_online"))
    twin = online.train.runs["opd_online"]
    assert online.train.enabled == ("opd_online",)
    # 30B-A3B has room for a live teacher with its moments on the host alone.
    assert twin.optim.offload == (name == "qwen3_30b_a3b")
    optim = twin.optim.model_copy(update={"offload": False})
    same = twin.model_copy(update={"algorithm": "lightning_opd", "optim": optim})
    assert same == offline.train.runs["opd"]
    assert online.model_copy(update={"train": offline.train}) == offline


@pytest.mark.parametrize("devices", [8, 16, 64, 128])
@pytest.mark.parametrize("name", [*NAMES, *(f"{name}_online" for name in NAMES)])
def test_rows_are_spread_over_more_devices_than_a_micro_batch_has_rows(name, devices):
    config = load_config(f"configs/{name}.yaml")
    spread, told = spread_batches(config, devices)
    [run] = config.train.enabled
    for key, before, after in (
        ("sft", config.sft, spread.sft),
        (f"train.runs.{run}", config.train.runs[run], spread.train.runs[run]),
    ):
        assert after.micro_batch_size == max(before.micro_batch_size, devices)
        assert after.batch_size == before.batch_size
        assert (devices == 8) != any(line.startswith(f"{key}.micro_batch_size: ") for line in told)
