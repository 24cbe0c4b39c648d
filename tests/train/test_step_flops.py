"""What a traced step computes, over what the mathematics asks for (`meter.model_flops`)."""

import dataclasses

import jax
import numpy as np
import pytest
from models import tiny

from opd_jax.config_train import LoopConfig
from opd_jax.core.flops import count_flops
from opd_jax.model.architecture import Architecture
from opd_jax.model.transformer import LanguageModel
from opd_jax.train.meter import Load, model_flops
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.step import Objective, abstract_state, make_train_step

SMOLLM2 = Architecture(
    family="llama",
    vocab_size=49152,
    embed_dim=576,
    ffn_dim=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=1e5,
    norm_eps=1e-5,
    tie_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
    max_position=8192,
)
EXPERTS = {"family": "qwen3_moe", "sparse_layers": (1,), "num_experts": 4, "expert_ffn_dim": 12}


def full_rows(rows, tokens, filled):
    """One record in each of the first `filled` rows."""
    ints = np.zeros((rows, tokens), np.int32)
    floats = np.zeros((rows, tokens), np.float32)
    here = np.tile((np.arange(rows) < filled)[:, None], (1, tokens))
    return {
        "input_bt": ints,
        "target_bt": ints,
        "positions_bt": np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)),
        "segments_bt": here.astype(np.int32),
        "mask_bt": here,
        "weight_bt": floats,
        "teacher_bt": floats,
        "sampler_bt": floats,
    }


def step_flops(model, batch, pieces):
    optimizer = make_optimizer(model, LoopConfig())
    state = abstract_state(model, optimizer)
    step = make_train_step(model, Objective("sampled"), optimizer, pieces)
    given = [None] * len(jax.tree.leaves(state)) + jax.tree.leaves(batch)
    return count_flops(jax.make_jaxpr(step)(state, batch), given)


def over_the_model(remat, micro_rows, filled):
    """Four micro-batches of rows of 512 tokens, of which `filled` are not empty."""
    model = LanguageModel(SMOLLM2, remat=remat)
    batch = full_rows(4 * micro_rows, 512, 0)
    for i in range(filled):
        for name, value in full_rows(micro_rows, 512, micro_rows).items():
            batch[name][i::4] = value
    return step_flops(model, batch, 4) / model_flops(model, Load.of(batch, 4))


@pytest.mark.slow
@pytest.mark.parametrize("micro_rows", [1, 4])
def test_without_remat_a_step_computes_little_twice(micro_rows):
    """However many tokens a micro-batch has, its logits are kept."""
    assert 1 <= over_the_model("none", micro_rows, filled=3) <= 1.05


@pytest.mark.slow
@pytest.mark.parametrize("micro_rows", [1, 4])
def test_with_full_remat_it_computes_one_more_forward_pass(micro_rows):
    """With four rows the logits are computed again too."""
    assert 1.2 <= over_the_model("full", micro_rows, filled=2) <= 1.38


def test_empty_micro_batches_cost_nothing():
    model, _ = tiny()
    whole, half = (step_flops(model, full_rows(4, 16, filled), 4) for filled in (4, 2))
    assert 0 < half < whole
    assert whole == 2 * half


def test_the_model_side_is_a_hand_count():
    """Layers of 4 heads of 8 over width 32, and a head of 64 tokens, on 3 rows of 16 tokens."""
    model, _ = tiny()
    load = Load.of(full_rows(3, 16, 3), 1)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    products = 2 * (2 * layer + 64 * 32) * 3 * 16
    attention = 2 * 2 * (2 * 4 * 8) * 3 * (16 * 17 // 2)  # scores and values, causal
    assert model_flops(model, load) == pytest.approx(3 * (products + attention), rel=0.05)


def test_the_model_side_counts_chosen_experts_and_packed_records():
    model = LanguageModel(dataclasses.replace(tiny()[0].arch, experts_per_token=2, **EXPERTS))
    batch = full_rows(1, 16, 1)
    batch["segments_bt"][0, 8:] = 2
    batch["positions_bt"][0] = np.tile(np.arange(8), 2)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    weights = 2 * attention + 3 * 32 * 48 + 32 * 4 + 2 * 3 * 32 * 12 + 64 * 32
    pairs = 2 * (8 * 9 // 2) * 2 * 4 * 8
    expected = 3 * (2 * weights * 16 + 2 * 2 * pairs)
    assert model_flops(model, Load.of(batch, 1)) == pytest.approx(expected, rel=0.05)
