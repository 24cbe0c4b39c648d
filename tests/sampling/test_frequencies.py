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

    def check(bends, end_ids, prob_of, **more):
        """All kinds of draws side by side in the slots."""
        common = SamplingConfig(max_new_tokens=TOKENS, slots=SAMPLES, **more)
        job = SamplingJob(model, params, common, end_ids, 3)
        requests = [
            Request(name, i, prompt, common.model_copy(update=bend))
            for name, bend in bends.items()
            for i in range(SAMPLES)
        ]
        drawn = {name: [] for name in bends}
        for sample in generate(job, requests):
            drawn[sample.request.prompt_id].append(sample.token_ids)
        for name, bend in bends.items():
            tokens = np.concatenate(drawn[name])
            assert len(tokens) == SAMPLES * TOKENS == 100_000
            print(f"{name}: chi-square {assert_frequencies(tokens, prob_of(bend)):.1f}")

    check(BENDS, (), lambda bend: bent_probs(logits_v, **bend))
    end = int(np.argsort(logits_v)[-2])
    without_v = np.where(np.arange(VOCABULARY) == end, -1e30, logits_v)
    least = {"least length": {}}  # and so no end token
    check(least, (end,), lambda _: bent_probs(without_v), min_new_tokens=TOKENS)
