"""A run with adapters and small moments, through the command line."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import CONFIG, arguments

from opd_jax.errors import ConfigError
from opd_jax.main import main
from opd_jax.model.load import read_model
from opd_jax.model.lora import Adapters

LORA = (
    "sft.lora={rank: 2, targets: [wq, w_down]}",
    "train.runs.opd_online.lora={rank: 4, alpha: 8.0}",
    "train.runs.opd_online.optim.learning_rate=1e-2",
    "train.runs.opd_online.optim.moments=int8",
    *("train.enabled=[opd_online]", "evaluate.base=false", "evaluate.teacher=false"),
)


@pytest.mark.slow
def test_adapters_are_trained_merged_and_exported(tmp_path):
    words = arguments(tmp_path / "run", *LORA, "mesh.fsdp=2", "mesh.tensor=2")
    assert main(words) == 0
    folder = tmp_path / "run" / "export" / "opd_online"
    base = load_file(CONFIG.parent / "quickstart" / "student" / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == base.keys()
    moved = {name for name in base if not np.array_equal(base[name], found[name])}
    projections = {name for name in base if "_proj.weight" in name}
    assert moved == projections
    model, params = read_model(str(folder), "float32", "float32", "none", None, "auto", None)
    assert params["layers"]["wq"].shape[0] == model.arch.num_layers
    state = tmp_path / "run" / "checkpoints" / "sft" / "state" / "00000003" / "complete.json"
    names = [name for name in json.loads(state.read_text())["tree"] if name.startswith("params")]
    assert len(names) == 4
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {x["run"] for x in lines} == {"sft", "opd_online"}
    assert all(np.isfinite(x["loss"]) for x in lines if "loss" in x)


def test_adapters_that_cannot_be_are_refused_before_any_work(tmp_path, capsys, monkeypatch):
    """The student has every target: the refusal of one it has not is put in its place."""

    def refuse(_):
        raise ConfigError("lora.targets names 'w_up', which is not there")

    monkeypatch.setattr(Adapters, "abstract", refuse)
    assert main(arguments(tmp_path / "run", "sft.lora={}")) == 2
    text = capsys.readouterr().err.strip()
    assert text == "opd_jax: error: sft.lora.targets names 'w_up', which is not there"
    assert not (tmp_path / "run" / "answers").exists()
