"""Our decoder against transformers' in float32, by way of the files they exchange.

    python -m pytest -m parity tests/parity

Torch is imported inside the tests: without the marker nothing here needs it.
"""

import copy
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from side_by_side import (
    LENGTH,
    LLAMA3,
    MIXTURE,
    YARN,
    hf_model_of_gguf,
    our_gradients,
    our_logits,
    random_hf_model,
    their_gradients,
    their_logits,
    worst_gradient,
)
from tiny_gguf import write_gguf
from tiny_tokenizers import write_tokenizer

from opd_jax.data.tokenizer import load_tokenizer
from opd_jax.model.hf_export import export_folder
from opd_jax.model.load import read_model
from opd_jax.model.moe import balance_loss

pytestmark = pytest.mark.parity


def rope(**keys):
    return {"rope_parameters": {"rope_theta": 500.0, **keys}, "head_dim": 16}


ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3 | {LENGTH: 32},
    "yarn": YARN,
}
# family, rope, vocabulary, kv heads, layers, head size (none: not in config.json), tied.
# Width over heads is 8. Any two columns hold every pair of their values.
GRID = [
    ("llama", "default", 4288, 1, 1, None, True),
    ("llama", "linear", 151936, 1, 2, None, False),
    ("llama", "llama3", 4288, 2, 1, 16, False),
    ("llama", "yarn", 151936, 2, 2, 16, True),
    ("qwen2", "default", 151936, 2, 1, None, False),
    ("qwen2", "linear", 4288, 2, 2, None, True),
    ("qwen2", "llama3", 151936, 1, 1, 16, True),
    ("qwen2", "yarn", 4288, 1, 2, 16, False),
    ("qwen3", "default", 4288, 1, 2, 16, False),
    ("qwen3", "linear", 151936, 1, 1, 16, True),
    ("qwen3", "llama3", 4288, 2, 2, None, True),
    ("qwen3", "yarn", 151936, 2, 1, None, False),
    ("qwen3_moe", "default", 151936, 2, 2, 16, True),
    ("qwen3_moe", "linear", 4288, 2, 1, 16, False),
    ("qwen3_moe", "llama3", 151936, 1, 2, None, False),
    ("qwen3_moe", "yarn", 4288, 1, 1, None, True),
]


def grid_case(family, rope_name, vocabulary, kv_heads, layers, head_dim, tied):
    """Its name, and its entry of CASES."""
    head = "derived" if head_dim is None else head_dim
    name = f"{family}-{rope_name}-v{vocabulary}-kv{kv_heads}-l{layers}-h{head}"
    changes = rope(**ROPES[rope_name]) | {
        "hidden_size": 32,
        "vocab_size": vocabulary,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
    }
    extra = MIXTURE if family == "qwen3_moe" else {}
    return name + "-tied" * tied, (family, extra | changes)


# name -> family and what differs from the tiny default.
CASES = {
    **dict(grid_case(*row) for row in GRID),
    "qwen2-yarn-mscale": (
        "qwen2",
        rope(**YARN, mscale=1.2, mscale_all_dim=0.5) | {"num_key_value_heads": 4},
    ),
    "qwen3-yarn-betas": (
        "qwen3",
        rope(**YARN | {LENGTH: 40}, beta_fast=4.0, beta_slow=0.5, truncate=False)
        | {"num_hidden_layers": 4},
    ),
    "qwen3-yarn-attention-factor": ("qwen3", rope(**YARN, attention_factor=0.8)),
    "qwen3-large-eps-and-base": (
        "qwen3",
        {
            "rms_norm_eps": 1e-2,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        },
    ),
    "moe-not-normed": ("qwen3_moe", MIXTURE | {"norm_topk_prob": False}),
    "moe-dense-between": (
        "qwen3_moe",
        MIXTURE | {"num_hidden_layers": 4, "mlp_only_layers": [1], "num_experts": 8},
    ),
    "moe-every-second": (
        "qwen3_moe",
        MIXTURE | {"num_hidden_layers": 3, "decoder_sparse_step": 2},
    ),
}


@pytest.fixture(scope="module")
def theirs_of(tmp_path_factory):
    """Their model of a case, not to be changed, and its folder."""
    import torch

    @functools.cache
    def make(case):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("theirs")
        return random_hf_model(folder, *CASES[case]), folder

    return make


def test_grid_holds_every_pair():
    for one, two in itertools.combinations(zip(*GRID, strict=True), 2):
        pairs = set(itertools.product(one, two))
        assert set(zip(one, two, strict=True)) == pairs


@pytest.mark.parametrize("case", CASES)
def test_float32_logits(theirs_of, case):
    theirs, folder = theirs_of(case)
    model, params = read_model(folder)
    tokens = np.random.default_rng(1).integers(0, model.arch.vocab_size, (2, 33))
    expected = their_logits(theirs, tokens)
    difference = np.abs(our_logits(model, params, tokens) - expected).max()
    print(f"{case}: {difference:.1e} of {np.abs(expected).max():.1f}")
    assert np.abs(expected).max() > 1
    assert difference < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_float32_gradients(theirs_of, case):
    theirs, folder = theirs_of(case)
    model, params = read_model(folder)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, model.arch.vocab_size, (2, 17))
    weight = rng.normal(size=(2, 17, model.arch.vocab_size)).astype(np.float32)
    expected = their_gradients(theirs, [(tokens, weight)])
    worst = worst_gradient(our_gradients(model, params, tokens, weight), expected)
    print(f"{case}: {worst:.1e} of a tensor's largest gradient")
    assert worst < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_logits_are_as_close_as_theirs(theirs_of, case):
    """Where experts nearly tie, rounding picks another one, on either side: about one token in 150.

    Those decide the root mean square, so a mixture gets enough tokens to have some of them; the
    median token is none of them.
    """
    import torch

    theirs, folder = theirs_of(case)
    exact_model, params = read_model(folder)
    model, _ = read_model(folder, compute_dtype="bfloat16")
    batches = 8 if CASES[case][0] == "qwen3_moe" else 1
    shape = (batches, 4, 33)
    tokens_ibt = np.random.default_rng(1).integers(0, exact_model.arch.vocab_size, shape)
    exact = [their_logits(theirs, tokens) for tokens in tokens_ibt]
    theirs = copy.deepcopy(theirs).to(torch.bfloat16)
    error, usual = [], []
    for tokens, want in zip(tokens_ibt, exact, strict=True):
        error.append(np.mean((our_logits(model, params, tokens) - want) ** 2, axis=-1))
        usual.append(np.mean((their_logits(theirs, tokens) - want) ** 2, axis=-1))
    for name, of in (("root mean square", np.mean), ("median", np.median)):
        ours, low = (float(np.sqrt(of(np.stack(squares)))) for squares in (error, usual))
        print(f"{case}: {name} {ours:.4f}, theirs {low:.4f}")
        assert 0 < ours <= 2 * low


def test_balance_loss_is_theirs(theirs_of):
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    theirs, folder = theirs_of("moe-dense-between")
    model, params = read_model(folder)
    tokens = np.random.default_rng(1).integers(0, model.arch.vocab_size, (2, 17))
    kept = np.arange(17)[None] < np.array([[17], [9]])
    with torch.no_grad():
        gates = theirs(torch.tensor(tokens), output_router_logits=True).router_logits
    want = load_balancing_loss_func(gates, 8, 2, torch.tensor(kept))
    positions = np.tile(np.arange(17), (2, 1))
    out = model.forward(params, jnp.asarray(tokens), positions, counted_bt=jnp.asarray(kept))
    assert float(balance_loss(out.router)) == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_export_loads_in_transformers(theirs_of, tmp_path, case):
    from transformers import AutoModelForCausalLM

    theirs, folder = theirs_of(case)
    model, params = read_model(folder)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    export_folder(tmp_path / "out", model, params, tokenizer, {}, {})
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="float32"
    )
    assert not any(info.values()), info
    tokens = np.random.default_rng(1).integers(0, model.arch.vocab_size, (2, 17))
    np.testing.assert_array_equal(their_logits(again, tokens), their_logits(theirs, tokens))


def test_exported_tokenizer_loads_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "m.gguf")
    model, params = read_model(tmp_path / "m.gguf")
    ours = load_tokenizer(tmp_path / "m.gguf")
    export_folder(tmp_path / "out", model, params, ours, {}, {})
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|start|>user\nhello  12\n\n12 é<think>日本<|end|>"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    chat = [{"role": "user", "content": "hello"}]
    rendered = theirs.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False, enable_thinking=False
    )
    assert rendered == ours.encode_chat(chat, enable_thinking=False)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_weights_as_transformers_reads_them(tmp_path, family, kind):
    write_gguf(tmp_path / "m.gguf", kind, model_type=family)
    # This reader takes neither the head size nor the rows of the embedding from the file.
    theirs = hf_model_of_gguf(tmp_path / "m.gguf", head_dim=16, vocab_size=280)
    model, params = read_model(tmp_path / "m.gguf")
    tokens = np.random.default_rng(1).integers(0, model.arch.vocab_size, (2, 17))
    difference = np.abs(our_logits(model, params, tokens) - their_logits(theirs, tokens)).max()
    print(f"{family} {kind}: {difference:.1e}")
    assert difference < 1e-4
