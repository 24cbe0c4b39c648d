import jax
import numpy as np
import pytest

from opd_jax.config import MeshConfig, SamplingConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.errors import ConfigError, DataError, ModelError
from opd_jax.sampling import engine
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import SamplingJob, generate
from tests.sampling.reference import (
    FAMILIES,
    random_params,
    sample_slowly,
    teacher_forced,
    tiny_model,
)

END = (3, 5)
LENGTHS = (1, 4, 16, 17, 9, 30, 2, 12, 20)


def requests_of(lengths=LENGTHS, vocab=28):
    rng = np.random.default_rng(0)
    return [
        Request(f"p{i // 2}", i % 2, rng.integers(0, vocab, n).astype(np.int32))
        for i, n in enumerate(lengths)
    ]


def run(model, params, requests, sampling, seed=7, end_ids=END):
    samples = list(generate(SamplingJob(model, params, sampling, end_ids, seed), requests))
    assert len(samples) == len(requests)
    return {(s.request.prompt_id, s.request.sample_index): s for s in samples}


@pytest.mark.first_by_default
@pytest.mark.exact
@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_the_slow_samplers_and_logprobs_are_teacher_forced(family):
    model = tiny_model(family)
    params = random_params(model)
    sampling = SamplingConfig(max_new_tokens=12, slots=4)
    requests = requests_of()
    samples = run(model, params, requests, sampling)
    reasons = set()
    for request in requests:
        sample = samples[request.prompt_id, request.sample_index]
        slow = sample_slowly(model, params, request, sampling, END, 7)
        assert sample.token_ids.tolist() == slow
        forced = teacher_forced(model, params, request.prompt_ids, slow)
        np.testing.assert_allclose(sample.logprobs, forced, atol=1e-4)
        ended = slow[-1] in END
        assert sample.finish_reason == ("stop" if ended else "length")
        assert ended or len(slow) == 12
        reasons.add(sample.finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize(
    "bend",
    [{"temperature": 0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.05}],
    ids=["greedy", "bent"],
)
def test_transforms_bend_the_draw_but_not_the_returned_logprob(bend):
    model = tiny_model()
    params = random_params(model)
    sampling = SamplingConfig(max_new_tokens=8, slots=4, **bend)
    requests = requests_of()[:3]
    samples = run(model, params, requests, sampling)
    for request in requests:
        sample = samples[request.prompt_id, request.sample_index]
        assert sample.token_ids.tolist() == sample_slowly(model, params, request, sampling, END, 7)
        forced = teacher_forced(model, params, request.prompt_ids, sample.token_ids)
        np.testing.assert_allclose(sample.logprobs, forced, atol=1e-4)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, sample in ours.items():
        assert sample.token_ids.tolist() == theirs[key].token_ids.tolist()
        np.testing.assert_allclose(sample.logprobs, theirs[key].logprobs, atol=1e-5)


@pytest.fixture(scope="module")
def straight():
    model = tiny_model()
    params = random_params(model)
    sampling = SamplingConfig(max_new_tokens=20, slots=4)
    return model, params, sampling, run(model, params, requests_of(), sampling)


@pytest.mark.slow
@pytest.mark.exact
def test_number_of_slots_and_order_do_not_matter(straight):
    model, params, sampling, samples = straight
    sampling = sampling.model_copy(update={"slots": 16})
    assert_same(run(model, params, requests_of()[::-1], sampling), samples)


def test_resuming_with_the_rest_gives_the_rest(straight):
    model, params, sampling, samples = straight
    rest = requests_of()[4:]
    keys = {(r.prompt_id, r.sample_index) for r in rest}
    wanted = {key: sample for key, sample in samples.items() if key in keys}
    assert_same(run(model, params, rest, sampling), wanted)


def test_other_seeds_prompt_ids_and_indices_give_other_samples(straight):
    model, params, sampling, _ = straight
    ids = np.array([1, 2, 4], np.int32)
    twins = [Request("a", 0, ids), Request("a", 1, ids), Request("b", 0, ids)]
    seeds = [run(model, params, twins, sampling, seed, ()) for seed in (0, 1)]
    texts = {tuple(s.token_ids.tolist()) for samples in seeds for s in samples.values()}
    assert len(texts) == 6


@pytest.mark.exact
def test_a_mesh_gives_the_samples_of_one_device(straight):
    _, params, sampling, samples = straight
    spread = tiny_model(mesh=make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, spread.abstract())
    assert_same(run(spread, jax.device_put(params, shardings), requests_of(), sampling), samples)


def test_new_parameters_compile_nothing(straight):
    model, _, sampling, samples = straight
    programs = (engine.empty_state, engine.prefill, engine.start, engine.decode_round)
    before = [program._cache_size() for program in programs]
    other = run(model, random_params(model, 5), requests_of(), sampling, seed=8)
    assert [program._cache_size() for program in programs] == before
    assert any(other[k].token_ids.tolist() != samples[k].token_ids.tolist() for k in samples)


def test_no_requests_no_samples(straight):
    model, params, sampling, _ = straight
    assert list(generate(SamplingJob(model, params, sampling, END, 0), [])) == []


@pytest.mark.parametrize(
    ("ids", "end_ids", "error", "message"),
    [
        ([], END, DataError, "prompt 'x' is empty"),
        ([1] * 60, END, DataError, r"60 prompt tokens \+ max_new_tokens=20 exceed .* 64 positions"),
        ([1, 28], END, DataError, "token 28 is outside the vocabulary of 28"),
        ([-1], END, DataError, "token -1 is outside"),
        ([1], (99,), ConfigError, "end token 99 is outside the vocabulary of 28"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(straight, ids, end_ids, error, message):
    model, params, sampling, _ = straight
    request = Request("x", 0, np.array(ids, np.int32))
    with pytest.raises(error, match=message):
        generate(SamplingJob(model, params, sampling, end_ids, 0), [request])


def poisoned(model, token):
    """Parameters whose logits are NaN once the token has been read."""
    params = random_params(model)
    return {**params, "embed": params["embed"].at[token].set(np.nan)}


def test_nonfinite_logits_stop_with_the_place_after_the_finished_samples():
    model = tiny_model("qwen2")  # untied: the poisoned embedding does not reach the head
    params = poisoned(model, 7)
    sampling = SamplingConfig(max_new_tokens=20, slots=4)
    requests = [Request("fine", i, np.full(17, 1, np.int32)) for i in range(12)]
    clean = random_params(model)
    slow = [sample_slowly(model, clean, r, sampling, END, 7) for r in requests]
    fine = [r for r, ids in zip(requests, slow, strict=True) if 7 not in ids[:-1]]
    sick, ids = next((r, ids) for r, ids in zip(requests, slow, strict=True) if 7 in ids[:-1])
    samples, seen = generate(SamplingJob(model, params, sampling, END, 7), [*fine, sick]), []
    place = f"sample {sick.sample_index}: .* position {ids.index(7) + 1} "
    with pytest.raises(ModelError, match=place):
        seen.extend(sample.request.sample_index for sample in samples)
    assert len(seen) >= len(fine) - 1


def test_nonfinite_logits_of_the_prompt_are_position_zero():
    model = tiny_model("qwen2")
    ids = np.arange(17, dtype=np.int32)
    requests = [Request("sick", 4 + i, ids) for i in range(3)]
    sampling = SamplingConfig(max_new_tokens=20, slots=4)
    with pytest.raises(ModelError, match=r"prompt 'sick', sample 4: .* position 0 "):
        list(generate(SamplingJob(model, poisoned(model, 7), sampling, END, 7), requests))
