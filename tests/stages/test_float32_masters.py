"""Weights that are kept in bfloat16 are trained in float32."""

import json

import pytest
from tiny_run import arguments

from opd_jax.main import main

pytestmark = pytest.mark.slow  # runs two stages


def dtypes_of(checkpoint, below=""):
    """Of the leaves of its newest step."""
    newest = max(path for path in checkpoint.iterdir() if (path / "complete.json").exists())
    tree = json.loads((newest / "complete.json").read_text())["tree"]
    return {text.split("[")[0] for name, text in tree.items() if name.startswith(below)}


def test_a_bfloat16_model_has_float32_parameters_while_it_is_trained(tmp_path):
    words = ("model.param_dtype=bfloat16", "--stages", "answer,sft")
    assert main(arguments(tmp_path / "run", *words)) == 0
    sft = tmp_path / "run" / "checkpoints" / "sft"
    assert dtypes_of(sft / "state", "params") == {"float32"}
    assert dtypes_of(sft / "model") == {"bfloat16"}
