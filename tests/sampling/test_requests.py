"""What a request can ask for: settings of its own, stop strings, least lengths, several samples."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from opd_jax.config import SamplingConfig
from opd_jax.errors import ConfigError
from opd_jax.model.cache import Pages
from opd_jax.sampling import plan
from opd_jax.sampling.buckets import Prefills
from opd_jax.sampling.queue import Request, RequestQueue
from opd_jax.sampling.sampler import SamplingJob, generate, plan_for
from opd_jax.sampling.stops import settled_text, shown_text, stop_length
from tests.sampling.reference import (
    bent_probs,
    forced_logits,
    random_params,
    sample_slowly,
    tiny_model,
)

END = (3, 5)


def letters(ids):
    return "".join(chr(97 + token) if token not in END else "" for token in ids)


@pytest.fixture(scope="module")
def model_and_params():
    model = tiny_model(max_position=512)
    return model, random_params(model)


def run(model, params, sampling, requests, plan=None, seed=7):
    job = SamplingJob(model, params, sampling, END, seed, letters)
    samples = list(generate(job, requests, plan))
    assert len(samples) == len(requests)
    return {(s.request.prompt_id, s.request.sample_index): s for s in samples}


def requests_of(count, each, sampling=None):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 28, 2 + 5 * i).astype(np.int32) for i in range(count)]
    return [
        Request(f"p{i}", j, ids, sampling) for i, ids in enumerate(prompts) for j in range(each)
    ]


def test_every_request_has_its_own_settings(model_and_params):
    model, params = model_and_params
    kinds = [
        SamplingConfig(max_new_tokens=9),
        SamplingConfig(max_new_tokens=3, temperature=0.0),
        SamplingConfig(max_new_tokens=12, temperature=0.7, top_k=5, min_p=0.02),
        SamplingConfig(max_new_tokens=6, top_p=0.6),
    ]
    requests = [dataclasses.replace(r, sampling=kinds[i]) for i, r in enumerate(requests_of(4, 1))]
    samples = run(model, params, SamplingConfig(max_new_tokens=2, slots=2), requests)
    for request in requests:
        sample = samples[request.prompt_id, 0]
        slow = sample_slowly(model, params, request, request.sampling, END, 7)
        assert sample.token_ids.tolist() == slow
        assert sample.text == letters(slow)


@pytest.mark.exact
def test_drawn_logprobs_are_of_the_bent_distribution(model_and_params):
    model, params = model_and_params
    bends = {"temperature": 0.6, "top_k": 6, "top_p": 0.9, "min_p": 0.02}
    sampling = SamplingConfig(max_new_tokens=6, slots=2, **bends)
    request = requests_of(2, 1)[1]
    sample = run(model, params, sampling, [request])["p1", 0]
    logits_nv = forced_logits(model, params, request.prompt_ids, sample.token_ids)
    for i, token in enumerate(sample.token_ids):
        prob = bent_probs(logits_nv[i], **bends)[token]
        assert sample.drawn_logprobs[i] == pytest.approx(np.log(prob), abs=1e-4)
    assert (sample.drawn_logprobs > sample.logprobs).any()


def test_plain_samples_have_one_logprob_and_greedy_ones_are_certain(model_and_params):
    model, params = model_and_params
    plain = run(model, params, SamplingConfig(max_new_tokens=5, slots=2), requests_of(1, 1))
    np.testing.assert_array_equal(plain["p0", 0].drawn_logprobs, plain["p0", 0].logprobs)
    greedy = SamplingConfig(max_new_tokens=5, slots=2, temperature=0.0)
    assert not run(model, params, greedy, requests_of(1, 1))["p0", 0].drawn_logprobs.any()


def test_no_end_token_before_the_least_length(model_and_params):
    model, params = model_and_params
    requests = requests_of(3, 4)
    short = run(model, params, SamplingConfig(max_new_tokens=8, slots=4), requests)
    assert min(len(s.token_ids) for s in short.values()) < 6
    sampling = SamplingConfig(max_new_tokens=8, min_new_tokens=6, slots=4)
    for sample in run(model, params, sampling, requests).values():
        assert not set(sample.token_ids[:6].tolist()) & set(END)
        assert len(sample.token_ids) > 6 or sample.finish_reason == "length"


def test_a_stop_string_ends_with_the_token_that_completes_it(model_and_params):
    model, params = model_and_params
    requests = requests_of(3, 4)
    free = SamplingConfig(max_new_tokens=70, slots=4)
    whole = run(model, params, free, requests)
    longest = max(whole.values(), key=lambda s: len(s.token_ids))
    stop = letters(longest.token_ids)[3:5]
    stopping = free.model_copy(update={"stop": (stop,)})
    cut = 0
    for key, sample in run(model, params, stopping, requests).items():
        text = letters(whole[key].token_ids)
        if stop in text:
            n = text.index(stop) + len(stop)
            assert sample.token_ids.tolist() == whole[key].token_ids[:n].tolist()
            assert (sample.finish_reason, sample.text) == ("stop", text[:n])
            cut += 1
        else:
            assert sample.token_ids.tolist() == whole[key].token_ids.tolist()
    assert cut


def test_stop_length_does_not_depend_on_when_it_looks():
    tokens = [0, 1, 2, 0, 1, 4]
    for seen in range(2):
        assert stop_length(tokens, seen, ("bc", "e"), 0, letters) == 3
    assert stop_length(tokens[:2], 0, ("bc",), 0, letters) is None


def test_a_stop_string_that_is_complete_too_early_is_text_like_any_other():
    """Wherever it lies: only what the last token completes ends a response, and is not shown."""
    tokens, stops = [0, 1, 2, 0, 1, 4], ("ab",)
    assert stop_length(tokens, 0, stops, 2, letters) == 2
    for least in (3, 4, 5):
        assert stop_length(tokens, 0, stops, least, letters) == 5
    assert stop_length(tokens, 0, stops, 6, letters) is None
    assert shown_text(tokens[:2], stops, letters) == ""
    assert shown_text(tokens[:5], stops, letters) == "abc"
    assert shown_text(tokens, stops, letters) == "abcabe"
    assert settled_text(tokens[:3], stops, letters) == "abc"
    assert settled_text(tokens[:4], stops, letters) == "abc"  # an "a" may begin one
    assert settled_text(tokens[:5], stops, letters) == "abc"


def test_stop_strings_need_a_tokenizer(model_and_params):
    model, params = model_and_params
    job = SamplingJob(model, params, SamplingConfig(max_new_tokens=4, stop=("x",)), END, 0)
    with pytest.raises(ConfigError, match=r"stop=\['x'\] needs a tokenizer"):
        generate(job, requests_of(1, 1))


def test_equal_prompts_are_read_once():
    queue = RequestQueue(requests_of(3, 5), Prefills((64,), (2,)))
    batches = []
    while queue.left:
        batches.append(queue.take())
    assert [len(batch.samples) for batch in batches] == [10, 5]
    row, request = batches[0].samples[-1]
    np.testing.assert_array_equal(
        batches[0].tokens[row, : batches[0].lengths[row]], request.prompt_ids
    )


@pytest.mark.slow
@pytest.mark.exact
@pytest.mark.parametrize("shards", [1, 2])
def test_samples_have_the_same_bits_however_few_pages_there_are(model_and_params, shards):
    """With a page of every level for each slot, and with so few that samples wait for them."""
    model, params = model_and_params
    sampling = SamplingConfig(max_new_tokens=140, min_new_tokens=130, slots=8)
    requests = requests_of(6, 3)
    roomy = plan_for(SamplingJob(model, params, sampling, END, 7, letters), requests)
    rows = 8 // shards
    full = with_pages(roomy, Pages((rows, rows, rows), 64, shards))
    few = with_pages(roomy, Pages((rows, rows // 2, 1), 64, shards))
    wanted, found = (run(model, params, sampling, requests, p) for p in (full, few))
    for key, sample in wanted.items():
        assert sample.token_ids.tolist() == found[key].token_ids.tolist()
        np.testing.assert_array_equal(sample.logprobs, found[key].logprobs)


@pytest.mark.slow
def test_a_prompt_of_several_pages_starts_in_them(model_and_params):
    model, params = model_and_params
    sampling = SamplingConfig(max_new_tokens=40, min_new_tokens=40, slots=4)
    requests = [Request(str(n), 0, np.arange(n, dtype=np.int32) % 23) for n in (15, 16, 17, 49)]
    roomy = plan_for(SamplingJob(model, params, sampling, END, 7, letters), requests)
    one, many = Pages((4,), 128), Pages((4, 4, 3, 2, 2, 1), 16)
    wanted, found = (
        run(model, params, sampling, requests, with_pages(roomy, p)) for p in (one, many)
    )
    for key, sample in wanted.items():
        assert sample.token_ids.tolist() == found[key].token_ids.tolist()
        np.testing.assert_allclose(sample.logprobs, found[key].logprobs, atol=1e-5)


def with_pages(made, pages):
    cache = dataclasses.replace(made.cache, pages=pages)
    program = dataclasses.replace(made.program, pages=pages)
    return dataclasses.replace(made, cache=cache, program=program)


def test_mixed_lengths_do_not_pay_for_the_longest():
    model = tiny_model(max_position=8192)
    made = plan.plan_cache(model, 64, [200] * 100, [0] * 100, [4096] * 100)
    pages = made.pages
    assert pages.rows == 64
    assert pages.length * len(pages.counts) >= 200 + 4096
    assert made.total_bytes < 0.8 * 64 * 4296 * made.token_bytes
    assert made.token_bytes == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, float32
    certain = plan.plan_cache(model, 64, [200] * 100, [4096] * 100, [4096] * 100)
    assert certain.pages.counts == (64,) * len(pages.counts)  # all get as long


def test_calls_with_other_mixtures_of_lengths_find_their_programs():
    model, found = tiny_model(max_position=8192), {}
    for coarse in (True, False):
        rng = np.random.default_rng(0)
        mixtures = [[4096, *rng.integers(2000, 4097, 63).tolist()] for _ in range(20)]
        plans = [
            plan.plan_cache(model, 64, [200] * 64, [0] * 64, limits, coarse=coarse)
            for limits in mixtures
        ]
        found[coarse] = {made.pages.counts for made in plans}
    assert len(found[True]) <= 3
    assert len(found[False]) > 10


def test_slots_that_do_not_fit_are_refused_with_the_arithmetic(model_and_params, monkeypatch):
    model, params = model_and_params
    monkeypatch.setattr(plan, "free_bytes", lambda mesh: 1000.0)
    job = SamplingJob(model, params, SamplingConfig(max_new_tokens=4, slots=2), END, 0)
    wanted = (
        r"2 slots, 2 pages of 16 tokens x 256 bytes a token = 8.0 KiB of keys and values, "
        r"4.0 KiB a slot, 224 bytes of logits, \d.* KiB for weights in the order of decoding, "
        r"2.0 KiB for prompts that wait, but 1,000 bytes are free; lower slots or max_new_tokens"
    )
    with pytest.raises(ConfigError, match=wanted):
        generate(job, requests_of(2, 1))


def test_the_copy_of_the_weights_needs_memory_once(model_and_params, monkeypatch):
    model, params = model_and_params
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    sampling = SamplingConfig(max_new_tokens=4, slots=2)
    job = SamplingJob(model, params, sampling, END, 0)
    monkeypatch.setattr(plan, "free_bytes", lambda mesh: 8192 + 2048 + 224 + weights)
    plan_for(job, requests_of(2, 1))
    monkeypatch.setattr(plan, "free_bytes", lambda mesh: 8192 + 2048 + 224 + weights - 1)
    with pytest.raises(ConfigError, match="weights in the order of decoding"):
        plan_for(job, requests_of(2, 1))
    plan_for(dataclasses.replace(job, split=params), requests_of(2, 1))


def test_a_containers_limit_is_the_memory_there_is(tmp_path):
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    for limit, left in (("max", math.inf), ("1000", 450.0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert plan.container_bytes(tmp_path) == left
    assert plan.container_bytes(tmp_path / "none") == math.inf


@pytest.mark.exact
def test_what_is_left_of_a_run_has_the_bits_of_the_whole(model_and_params):
    model, params = model_and_params
    sampling = SamplingConfig(max_new_tokens=20, slots=8)
    requests = requests_of(6, 3)
    job = SamplingJob(model, params, sampling, END, 7, letters)
    whole = run(model, params, sampling, requests)
    rest = requests[1::4]
    for key, sample in run(model, params, sampling, rest, plan_for(job, requests)).items():
        np.testing.assert_array_equal(sample.logprobs, whole[key].logprobs)
        assert sample.token_ids.tolist() == whole[key].token_ids.tolist()


def test_tokens_are_told_while_they_come(model_and_params):
    model, params = model_and_params
    job = SamplingJob(
        model, params, SamplingConfig(max_new_tokens=20, min_new_tokens=20), END, 7, round_steps=4
    )
    told = []
    (sample,) = generate(job, requests_of(1, 1), on_tokens=lambda _, ids: told.append(ids.copy()))
    assert len(told) > 3
    for ids in told:
        assert ids.tolist() == sample.token_ids[: len(ids)].tolist()


def test_a_stop_string_that_the_first_token_completes_ends_the_response_there(model_and_params):
    model, params = model_and_params
    requests = requests_of(3, 4)
    free = SamplingConfig(max_new_tokens=20, min_new_tokens=5, slots=4)
    whole = run(model, params, free, requests)
    stop = next(letters(s.token_ids[:1]) for s in whole.values())
    stopping = free.model_copy(update={"stop": (stop,), "min_new_tokens": 0})
    (first, *_) = whole.values()
    sample = run(model, params, stopping, requests)[
        first.request.prompt_id, first.request.sample_index
    ]
    assert (sample.text, sample.finish_reason, len(sample.logprobs)) == (stop, "stop", 1)
