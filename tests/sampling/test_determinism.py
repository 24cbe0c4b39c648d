"""A sample is the same in any batch; where rounding decides a tie, the tie is shown and counted."""

import jax
import numpy as np
import pytest

from opd_jax.config import MeshConfig, SamplingConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import SamplingJob, generate
from opd_jax.sampling.transforms import DIRECT
from tests.sampling.reference import (
    forced_logits,
    gumbel_of,
    random_params,
    tiny_model,
    token_key,
)

SEED, PROMPTS, SAMPLES, NEW = 3, 12, 40, 40
WIDE = {"vocab_size": 499, "embed_dim": 128, "ffn_dim": 256, "num_layers": 6, "head_dim": 32}


def requests_of(vocab, prompts=PROMPTS, samples=SAMPLES):
    rng = np.random.default_rng(1)
    ids = [rng.integers(0, vocab, rng.integers(1, 20)).astype(np.int32) for _ in range(prompts)]
    return [Request(f"p{i}", j, ids[i]) for i in range(prompts) for j in range(samples)]


def run(model, params, requests, slots, new=NEW, end_ids=(0,), round_steps=64):
    sampling = SamplingConfig(max_new_tokens=new, slots=slots)
    job = SamplingJob(model, params, sampling, end_ids, SEED, round_steps=round_steps)
    samples = list(generate(job, requests))
    found = {(s.request.prompt_id, s.request.sample_index): s for s in samples}
    assert len(samples) == len(found) == len(requests)
    return found


def parting(one, other):
    """The position of the first token in which two samples differ; `None`: they are equal."""
    pairs = zip(one.token_ids.tolist(), other.token_ids.tolist(), strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    assert at is not None or len(one.token_ids) == len(other.token_ids)
    return at


def gap_at(model, params, one, other, at):
    """How far apart the two tokens' logits plus noise are, both of which are the best two."""
    logits_v = forced_logits(model, params, one.request.prompt_ids, one.token_ids[: at + 1])[at]
    perturbed_v = logits_v + gumbel_of(token_key(SEED, one.request, at), len(logits_v))
    best = np.argsort(-perturbed_v)[:2]
    assert {one.token_ids[at], other.token_ids[at]} == set(best.tolist())
    return perturbed_v[best[0]] - perturbed_v[best[1]]


# Queries that are a hundred times too long make attention so steep that it blows rounding up.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("steep", "most_rounding", "least", "most"),
    [(1, 1e-4, 0, 1), (100, 1.0, 1, 24)],
    ids=["usual", "steep"],
)
def test_samples_part_at_ties_alone_whatever_the_batch_size(steep, most_rounding, least, most):
    model = tiny_model("qwen3", **WIDE)
    params = random_params(model)
    params["layers"]["q_norm"] *= steep
    requests = requests_of(WIDE["vocab_size"])
    alone, *batched = (run(model, params, requests, slots) for slots in (1, 4, 16))
    parted, gaps, rounding = set(), [0.0], 0.0
    for samples in batched:
        for key, one in alone.items():
            at = parting(one, samples[key])
            until = slice(len(one.token_ids) if at is None else at)
            moved = np.abs(one.logprobs[until] - samples[key].logprobs[until])
            rounding = max(rounding, moved.max(initial=0.0))
            if at is not None:
                parted.add(key)
                gaps.append(gap_at(model, params, one, samples[key], at))
    tokens = sum(len(s.token_ids) for s in alone.values())
    print(
        f"{len(parted)} of {len(alone)} sequences, {tokens} tokens, parted at gaps up to ", end=""
    )
    print(f"{max(gaps):.1e}; rounding moved log-probs by up to {rounding:.1e}")
    assert 0 < rounding < most_rounding
    assert max(gaps) < 2 * rounding
    assert least <= len(parted) <= most


@pytest.mark.slow
def test_slots_order_and_rounds_do_not_matter():
    model = tiny_model("qwen3_moe")
    params = random_params(model)
    requests = requests_of(28, prompts=7, samples=3)
    wanted = run(model, params, requests, slots=4, new=20)
    shuffled = [requests[i] for i in np.random.default_rng(5).permutation(len(requests))]
    others = [
        run(model, params, shuffled, slots=1, new=20, round_steps=3),
        run(model, params, requests[::-1], slots=3, new=20),
        run(model, params, requests, slots=16, new=20, round_steps=7),
    ]
    for samples in others:
        assert_same(samples, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen2", {"fsdp": 4}),
        ("qwen3_moe", {"fsdp": 2, "tensor": 2}),
        ("qwen3_moe", {"data": 2, "fsdp": 1, "expert": 2}),
        ("qwen3_moe", {"fsdp": 2, "expert": 2}),
        ("qwen3_moe", {"fsdp": 2, "context": 2}),
    ],
)
def test_a_mesh_gives_the_samples_of_one_device(family, sizes):
    model, spread = (tiny_model(family, mesh) for mesh in (None, make_mesh(MeshConfig(**sizes))))
    params, requests = random_params(model), requests_of(28, prompts=7, samples=3)
    wanted = run(model, params, requests, slots=4, new=20)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, spread.abstract())
    assert_same(run(spread, jax.device_put(params, shardings), requests, 8, new=20), wanted)


@pytest.mark.slow
def test_draws_by_blocks_are_the_same_in_any_slots_and_on_a_mesh():
    """The vocabulary is larger than what one draw decides, and blocks do not divide it."""
    sizes = {"vocab_size": DIRECT + 76}
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    model, spread = tiny_model("qwen3", **sizes), tiny_model("qwen3", mesh, **sizes)
    params, requests = random_params(model), requests_of(DIRECT + 76, prompts=7, samples=3)
    wanted = run(model, params, requests, slots=4, new=20)
    assert len({token for s in wanted.values() for token in s.token_ids.tolist()}) > 100
    assert_same(run(model, params, requests[::-1], slots=16, new=20, round_steps=7), wanted)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, spread.abstract())
    assert_same(run(spread, jax.device_put(params, shardings), requests, 8, new=20), wanted)


def assert_same(samples, wanted):
    assert samples.keys() == wanted.keys()
    for key, sample in wanted.items():
        assert parting(sample, samples[key]) is None
        np.testing.assert_allclose(samples[key].logprobs, sample.logprobs, atol=1e-5)
