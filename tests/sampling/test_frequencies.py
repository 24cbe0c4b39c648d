"""How often the whole sampler draws each token: prefill, starts, rounds of decoding, refills."""

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.config import SamplingConfig
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import SamplingJob, generate
from tests.sampling.reference import (
    BENDS,
    assert_frequencies,
    bent_probs,
    forced_logits,
    random_params,
    tiny_model,
)

CASES = {**BENDS, "least length": {}}  # and no end token: none is drawn before all tokens are there
VOCABULARY, TOKENS, SAMPLES = 7, 250, 400


@pytest.mark.slow
def test_frequencies_are_the_exact_ones():
    """A model whose tokens all have one embedding says the same at every position."""
    sizes = {"vocab_size": VOCABULARY, "tie_embeddings": False, "max_position": TOKENS + 8}
    model = tiny_model("qwen3", **sizes)
    params = random_params(model)
    params["embed"] = jnp.broadcast_to(params["embed"][:1], params["embed"].shape)
    params["head"] = 2 * params["head"]
    prompt = np.zeros(3, np.int32)
    logits_v = forced_logits(model, params, prompt, [0])[0]
    ends = (int(np.argsort(logits_v)[-2]),)
    for name, bends in CASES.items():
        least = TOKENS if name == "least length" else 0
        settings = SamplingConfig(
            max_new_tokens=TOKENS, min_new_tokens=least, slots=SAMPLES // 2, **bends
        )
        job = SamplingJob(model, params, settings, ends if least else (), 3)
        requests = [Request(name, i, prompt) for i in range(SAMPLES)]
        tokens = np.concatenate([s.token_ids for s in generate(job, requests)])
        assert len(tokens) == SAMPLES * TOKENS == 100_000
        cut = np.isin(np.arange(VOCABULARY), ends) & (least > 0)
        prob_v = bent_probs(np.where(cut, -1e30, logits_v), **bends)
        print(f"{name}: chi-square {assert_frequencies(tokens, prob_v):.1f}")
