"""Offline and online runs keep the same prompts out of their training."""

import pytest
from tiny_run import CONFIG, FRESH, TINY, arguments

from opd_jax.config_load import load_config
from opd_jax.main import main
from opd_jax.stages import train
from opd_jax.stages.pipeline import open_run

pytestmark = pytest.mark.slow  # needs rollouts and their scores
WORDS = ("prompts.opd_limit=40", "rollout.samples_per_prompt=2", *FRESH)


def test_with_several_samples_a_prompt_both_keep_out_the_same(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    assert main(arguments(run_dir, *WORDS, "--stages", "answer,sft,rollout,score")) == 0
    ctx = open_run(load_config(CONFIG, [f"run_dir={run_dir}", *TINY, *WORDS]))
    kept, trained = {}, {}

    def probed(ctx, run, names, teacher):
        kept[run.algorithm] = set(names)

    def offline(snapshot, scores, members, *rest):
        trained["lightning_opd"] = {snapshot.keys[i] for i in members}

    def online(live, *rest):
        samples = range(live.sampling.samples_per_prompt)
        trained["opd"] = {(name, i) for name, _ in live.prompts for i in samples}

    monkeypatch.setattr(train, "fresh_probe", probed)
    monkeypatch.setattr(train, "offline_source", offline)
    monkeypatch.setattr(train, "online_source", online)
    for name, make in (("opd", train._offline), ("opd_online", train._online)):
        make(ctx, name, ctx.config.train.runs[name])
    assert kept["opd"] == kept["lightning_opd"]
    assert len(kept["opd"]) == 4  # a tenth
    assert trained["opd"] == trained["lightning_opd"]
    assert {name for name, _ in trained["opd"]}.isdisjoint(kept["opd"])
    assert len(trained["opd"]) == 2 * (40 - 4)
