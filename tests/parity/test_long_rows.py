"""Rows of more than one attention tile, and packed ones, against transformers in float32."""

import numpy as np
import pytest
from side_by_side import (
    LENGTH,
    LLAMA3,
    MIXTURE,
    our_gradients,
    our_logits,
    random_hf_model,
    their_gradients,
    their_logits,
    worst_gradient,
)

from opd_jax.model.attention import ROW_BLOCK
from opd_jax.model.load import read_model

pytestmark = pytest.mark.parity


def scaled(**keys):
    return {"rope_parameters": {"rope_theta": 500.0, **keys}}


CASES = {
    "llama-llama3": ("llama", scaled(**LLAMA3, **{LENGTH: 128})),
    "qwen2": ("qwen2", {}),
    "qwen3-yarn": ("qwen3", scaled(rope_type="yarn", factor=8.0, **{LENGTH: 128})),
    "moe": ("qwen3_moe", MIXTURE),
}
TILES = {300: 3, 600: 5}
PIECES = (270, 130)  # the first ends inside the third tile, where the other begins


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """transformers' model, and ours with its parameters."""
    family, changes = CASES[request.param]
    theirs = random_hf_model(tmp_path, family, changes | {"max_position_embeddings": 1024})
    return theirs, *read_model(tmp_path)


def random_row(model, length, rows=1):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, model.arch.vocab_size, (rows, length))
    return tokens, rng.normal(size=(*tokens.shape, model.arch.vocab_size)).astype(np.float32)


def check_logits(ours, expected):
    difference = np.abs(ours - expected).max()
    print(f"logits: {difference:.1e} of {np.abs(expected).max():.1f}")
    assert np.abs(expected).max() > 1
    assert difference < 1e-4


def check_gradients(ours, expected):
    worst = worst_gradient(ours, expected)
    print(f"gradients: {worst:.1e} of a tensor's largest one")
    assert worst < 1e-4


@pytest.mark.parametrize("length", TILES)
def test_several_tiles(pair, length):
    theirs, model, params = pair
    assert -(-length // ROW_BLOCK) == TILES[length]
    tokens, weight = random_row(model, length, rows=2)
    check_logits(our_logits(model, params, tokens), their_logits(theirs, tokens))
    expected = their_gradients(theirs, [(tokens, weight)])
    check_gradients(our_gradients(model, params, tokens, weight), expected)


def test_packed_row_is_its_pieces_alone(pair):
    """
    segments_t   = [1 1 1 ... 1 | 2 2 ... 2]
    positions_t  = [0 1 2 ...   | 0 1 ...  ]
    """
    theirs, model, params = pair
    tokens, weight = random_row(model, sum(PIECES))
    cuts = [slice(0, PIECES[0]), slice(PIECES[0], None)]
    segments = np.repeat([1, 2], PIECES)[None]
    positions = np.concatenate([np.arange(length) for length in PIECES])[None]
    alone = [their_logits(theirs, tokens[:, cut]) for cut in cuts]
    ours = our_logits(model, params, tokens, positions, segments)
    check_logits(ours, np.concatenate(alone, axis=1))
    expected = their_gradients(theirs, [(tokens[:, cut], weight[:, cut]) for cut in cuts])
    check_gradients(our_gradients(model, params, tokens, weight, positions, segments), expected)
