"""Sampling in bfloat16, which accelerators compute in unless told otherwise."""

import jax
import numpy as np
import pytest

from opd_jax.config import SamplingConfig
from opd_jax.model import load
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import SamplingJob, generate, plan_for
from tests.sampling.reference import random_params, teacher_forced, tiny_model


@pytest.mark.parametrize(
    ("backend", "wanted"), [("cpu", "float32"), ("tpu", "bfloat16"), ("gpu", "bfloat16")]
)
def test_accelerators_compute_in_bfloat16(monkeypatch, backend, wanted):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert load.resolve_dtype("auto") == wanted
    assert load.resolve_dtype("float32") == "float32"


@pytest.mark.slow
def test_log_probs_are_near_the_forward_s_and_what_is_left_has_the_bits_of_the_whole():
    model = tiny_model("qwen3", compute_dtype="bfloat16")
    params = random_params(model)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 28, 4 + 7 * i).astype(np.int32) for i in range(5)]
    requests = [Request(f"p{i}", j, ids) for i, ids in enumerate(prompts) for j in range(4)]
    job = SamplingJob(model, params, SamplingConfig(max_new_tokens=24, slots=6), (3, 5), 7)
    plan = plan_for(job, requests)

    def run(some):
        return {(s.request.prompt_id, s.request.sample_index): s for s in generate(job, some, plan)}

    whole = run(requests)
    for key, sample in run(requests[1::3]).items():
        assert sample.token_ids.tolist() == whole[key].token_ids.tolist()
        np.testing.assert_array_equal(sample.logprobs, whole[key].logprobs)
    gaps = np.concatenate(
        [
            sample.logprobs
            - teacher_forced(model, params, sample.request.prompt_ids, sample.token_ids)
            for sample in whole.values()
        ]
    )
    print(f"{len(gaps)} tokens: mean {gaps.mean():.1e}, mean size {np.abs(gaps).mean():.1e}, "
          f"largest {np.abs(gaps).max():.1e}")  # fmt: skip
    assert np.abs(gaps).mean() < 0.01
    assert np.abs(gaps).max() < 0.1
