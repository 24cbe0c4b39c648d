"""How often the whole sampler draws each token: prefill, starts, rounds of decoding, refills."""

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.config import SamplingConfig
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import SamplingJob, generate
from tests.sampling.reference import bent_probs, forced_logits, random_params, tiny_model

BENDS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 5, "top_p": 0.8, "min_p": 0.1},
    "least length": {},  # and no end token: none is drawn before all tokens are there
}
VOCABULARY, TOKENS, SAMPLES = 7, 500, 200
CHI_SQUARE_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46}


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
    for name, bends in BENDS.items():
        least = TOKENS if name == "least length" else 0
        settings = SamplingConfig(
            max_new_tokens=TOKENS, min_new_tokens=least, slots=SAMPLES // 2, **bends
        )
        job = SamplingJob(model, params, settings, ends if least else (), 3)
        requests = [Request(name, i, prompt) for i in range(SAMPLES)]
        tokens = np.concatenate([s.token_ids for s in generate(job, requests)])
        assert len(tokens) == SAMPLES * TOKENS == 100_000
        cut = np.isin(np.arange(VOCABULARY), ends) & (least > 0)
        expected_v = len(tokens) * bent_probs(np.where(cut, -1e30, logits_v), **bends)
        seen_v = np.bincount(tokens, minlength=VOCABULARY)
        possible = expected_v > 0
        assert not seen_v[~possible].any(), name
        difference = seen_v[possible] - expected_v[possible]
        chi_square = np.sum(difference**2 / expected_v[possible])
        print(f"{name}: chi-square {chi_square:.1f} of {possible.sum()} tokens")
        assert chi_square < CHI_SQUARE_999[possible.sum() - 1], name
