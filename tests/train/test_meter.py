import jax
import numpy as np
import pytest
from models import tiny

from opd_jax.core.peak import PEAK_FLOPS, peak_flops, total_peak_flops
from opd_jax.data.collate import Scored, opd_batch, spread_rows
from opd_jax.data.records import Record, Scores
from opd_jax.train.meter import Load, Meter, active_weights, model_flops


def response(tokens):
    ids, logs = np.zeros(tokens - 2, np.int32), np.full(tokens - 2, -1.0, np.float32)
    return Scored(Record("p", 0, np.zeros(2, np.int32), ids, logs, "stop"), Scores(logs))


def test_the_load_counts_tokens_padding_and_context():
    rows = [[response(6), response(4)], [response(9)], [response(3)]]
    batch = opd_batch(spread_rows(rows, pieces=4, micro_rows=2), 8)
    load = Load.of(batch, pieces=4)
    lengths = [5, 3, 8, 2]  # the last token is never an input
    assert load.tokens == sum(lengths)
    assert load.computed == 2 * 2 * 8  # two micro-batches of four hold something
    assert load.context == sum(n * (n + 1) // 2 for n in lengths)


def test_active_weights_leave_out_a_lookup_and_idle_experts():
    tied, _ = tiny(tie_embeddings=True)
    free, _ = tiny(tie_embeddings=False)
    assert active_weights(tied) == active_weights(free)  # one head each
    everything = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tied.abstract()))
    assert active_weights(tied) == everything
    sizes = {"num_experts": 8, "experts_per_token": 2, "expert_ffn_dim": 16}
    mixture, _ = tiny(sparse_layers=(0, 1), **sizes)
    named = jax.tree_util.tree_flatten_with_path(mixture.abstract())[0]
    idle = sum(
        int(np.prod(leaf.shape)) * 6 // 8
        for path, leaf in named
        if "moe" in jax.tree_util.keystr(path) and "router" not in jax.tree_util.keystr(path)
    )
    total = sum(int(np.prod(leaf.shape)) for _, leaf in named)
    untied = 0 if mixture.arch.tie_embeddings else mixture.arch.vocab_size * 32
    assert active_weights(mixture) == total - idle - untied


def test_model_flops_by_hand():
    model, _ = tiny()
    arch = model.arch
    load = Load(tokens=10, computed=16, context=30)
    attention = 12 * arch.num_layers * arch.num_heads * arch.head_dim * 30
    assert model_flops(model, load) == pytest.approx(6 * active_weights(model) * 10 + attention)
    frozen = model_flops(model, load, frozen=True)
    assert frozen == pytest.approx(4 * active_weights(model) * 10 + attention)


def test_the_table_of_peaks_takes_the_longest_name():
    assert peak_flops("TPU v5 lite") == PEAK_FLOPS["TPU v5e"]
    assert peak_flops("TPU v5") == PEAK_FLOPS["TPU v5p"]
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("abacus") is None
    assert total_peak_flops() > 1e9


def test_figures_of_a_step():
    meter = Meter(tiny()[0])
    meter.waited(1e9)
    found = meter.figures(Load(12, 16, 40), 8.0)
    assert found["padding"] == 0.25
    assert found["data_wait"] == 1.0
    assert found["tokens_per_second"] == pytest.approx(8 / found["step_seconds"])
    assert found["mfu"] > 0
    assert found["memory_gib"] > 0
