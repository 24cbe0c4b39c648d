"""Log-probs that the sampler returns are those of one forward over prompt and response.

Over every kind of decoder, prompts of mixed lengths, several samples of each, and so many more
requests than slots that every slot is refilled. Samples share their prompts; in the odd cases they
copy.
"""

import numpy as np
import pytest

from opd_jax.config import SamplingConfig
from opd_jax.model.architecture import RopeScaling
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import SamplingJob, generate, plan_for
from tests.sampling.reference import (
    bent_probs,
    forced_logits,
    log_softmax,
    random_params,
    tiny_model,
)

LENGTHS = (1, 4, 16, 17, 9, 30, 2, 12)
SAMPLES, NEW, SLOTS = 6, 12, 5
END = (3, 5)
BENDS = (
    {},
    {"temperature": 0.7},
    {"top_p": 0.8},
    {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0},
    {"min_new_tokens": 6},
)
LLAMA3 = RopeScaling("llama3", 8.0, original_max_position=16)
YARN = RopeScaling("yarn", 4.0, original_max_position=16, attention_factor=1.1)
CASES = {
    "llama": ("llama", {}),
    "llama-odd": (
        "llama",
        {"num_kv_heads": 1, "head_dim": 6, "vocab_size": 37, "rope_scaling": LLAMA3},
    ),
    "llama-untied-wide-heads": ("llama", {"tie_embeddings": False, "head_dim": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2-odd": (
        "qwen2",
        {"tie_embeddings": True, "num_layers": 1, "rope_scaling": RopeScaling("linear", 3.0)},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-odd": (
        "qwen3",
        {"tie_embeddings": False, "num_kv_heads": 4, "num_layers": 3, "rope_scaling": YARN},
    ),
    "moe": ("qwen3_moe", {}),
    "moe-odd": (
        "qwen3_moe",
        {
            "num_layers": 4,
            "sparse_layers": (0, 2, 3),
            "num_experts": 5,
            "norm_topk_prob": False,
            "rope_scaling": YARN,
        },
    ),
}


def requests_of(vocab, bends):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab, n).astype(np.int32) for n in LENGTHS]
    settings = [SamplingConfig(max_new_tokens=NEW, slots=SLOTS, **bend) for bend in bends]
    return [
        Request(f"p{i}", j, ids, settings[(i + j) % len(settings)])
        for i, ids in enumerate(prompts)
        for j in range(SAMPLES)
    ]


def errors_of(model, params, sample):
    """The largest difference of a sample's log-probs, plain and as drawn, from the forward's."""
    sampling, ids = sample.request.sampling, sample.token_ids
    plain, drawn = [], []
    for i, logits_v in enumerate(forced_logits(model, params, sample.request.prompt_ids, ids)):
        plain.append(log_softmax(logits_v)[ids[i]])
        drawn.append(
            0.0 if sampling.temperature == 0 else drawn_logprob(logits_v, i, ids, sampling)
        )
    return np.abs(sample.logprobs - plain).max(), np.abs(sample.drawn_logprobs - drawn).max()


def drawn_logprob(logits_v, i, ids, sampling):
    """Of token `i`, under the distribution that it was drawn from."""
    if i < sampling.min_new_tokens:
        logits_v = logits_v.copy()
        logits_v[list(END)] = -np.inf
    kind = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return np.log(bent_probs(logits_v, *kind)[ids[i]])


# Plain draws compiled as users run them, all kinds of draws with less polish.
RUNS = [
    *((case, BENDS) for case in CASES),
    *(pytest.param(x, BENDS[:1], marks=pytest.mark.exact) for x in CASES if "odd" in x),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "bends"), RUNS, ids=lambda x: x if isinstance(x, str) else len(x))
def test_logprobs_are_the_forward_s(case, bends):
    family, changes = CASES[case]
    model = tiny_model(family, **changes)
    params = random_params(model)
    job = SamplingJob(model, params, SamplingConfig(slots=SLOTS), END, 7)
    requests = requests_of(model.arch.vocab_size, bends)
    plan = plan_for(job, requests)
    assert len(requests) == 48 > 8 * plan.program.slots
    assert len(plan.prefills.lengths) > 1
    assert max(plan.prefills.rows) == 1
    assert plan.program.pages.prompts is not None
    if "odd" in case:
        plan = plan_for(job, requests, together=False)
        assert plan.program.pages.prompts is None
    samples = list(generate(job, requests, plan))
    assert {(s.request.prompt_id, s.request.sample_index) for s in samples} == {
        (r.prompt_id, r.sample_index) for r in requests
    }
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    errors = np.array([errors_of(model, params, sample) for sample in samples])
    plain, drawn = errors.max(axis=0)
    print(f"{case}: {sum(len(s.token_ids) for s in samples)} tokens, {plain:.1e}, {drawn:.1e}")
    assert plain < 1e-4
    assert drawn < 1e-4
