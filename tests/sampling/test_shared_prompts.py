"""Samples of one prompt that read its keys and values from one place."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.config import MeshConfig, SamplingConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.model.cache import Pages, PromptPages
from opd_jax.sampling.pager import PromptPager
from opd_jax.sampling.plan import MOST_PLACES, plan_cache
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import SamplingJob, generate, plan_for
from tests.sampling.reference import random_params, teacher_forced, tiny_model

END = (3, 5)
SAMPLING = SamplingConfig(max_new_tokens=20, min_new_tokens=9, slots=8)
SHARED = Pages((8, 4), 16, prompts=PromptPages(5, 3, 48))


@pytest.fixture(scope="module")
def model_and_params():
    model = tiny_model("qwen3", head_dim=64)
    return model, random_params(model)


def requests_of(count=5, each=6):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 28, 8 + 9 * i).astype(np.int32) for i in range(count)]
    return [Request(f"p{i}", j, ids) for i, ids in enumerate(prompts) for j in range(each)]


def run(model, params, requests, pages=SHARED, sampling=SAMPLING, text=None, everything=None):
    """Samples by (prompt id, sample index), with this cache in place of the one planned."""
    job = SamplingJob(model, params, sampling, END, 7, text)
    plan = plan_for(job, everything or requests)
    plan = dataclasses.replace(plan, program=dataclasses.replace(plan.program, pages=pages))
    samples = list(generate(job, requests, plan))
    assert len(samples) == len(requests)
    return {(s.request.prompt_id, s.request.sample_index): s for s in samples}


def with_prompts(**changes):
    assert SHARED.prompts is not None
    return dataclasses.replace(SHARED, prompts=dataclasses.replace(SHARED.prompts, **changes))


def assert_same_bits(wanted, found):
    assert found
    for key, sample in found.items():
        assert sample.token_ids.tolist() == wanted[key].token_ids.tolist()
        np.testing.assert_array_equal(sample.logprobs, wanted[key].logprobs)


def assert_same(wanted, found):
    assert found.keys() == wanted.keys()
    for key, sample in found.items():
        assert sample.token_ids.tolist() == wanted[key].token_ids.tolist()
        np.testing.assert_allclose(sample.logprobs, wanted[key].logprobs, atol=1e-5)


@pytest.mark.first_by_default
@pytest.mark.parametrize("shards", [1, 2])
def test_samples_that_share_a_prompt_are_those_that_copy_it(model_and_params, shards):
    model, params = model_and_params
    rows = 8 // shards
    shared = Pages((rows, rows // 2), 16, shards, PromptPages(6 // shards, 3, 48))
    found = run(model, params, requests_of(), shared)
    assert_same(run(model, params, requests_of(), Pages((rows,), 64, shards)), found)
    for sample in found.values():
        forced = teacher_forced(model, params, sample.request.prompt_ids, sample.token_ids)
        np.testing.assert_allclose(sample.logprobs, forced, atol=1e-4)


@pytest.mark.first_by_default
@pytest.mark.exact
@pytest.mark.parametrize("readers", [3, 5])
def test_neither_order_nor_restart_change_a_bit(model_and_params, readers):
    """There are fewer pages than the samples in slots could use: some wait, which ones differs."""
    model, params = model_and_params
    requests, pages = requests_of(), with_prompts(rows=readers)
    wanted = run(model, params, requests, pages)
    assert_same_bits(wanted, run(model, params, requests[::-1], pages))
    assert_same_bits(wanted, run(model, params, requests[2::3], pages, everything=requests))
    assert_same(wanted, run(model, params, requests, with_prompts(rows=readers, count=2)))


@pytest.mark.slow
@pytest.mark.exact
def test_in_a_page_with_many_places_it_does_not_matter_which_a_sample_has():
    model = tiny_model("qwen3", head_dim=64, max_position=512)
    params, rng = random_params(model), np.random.default_rng(1)
    prompts = [rng.integers(0, 28, n).astype(np.int32) for n in (140, 131, 97)]
    requests = [Request(f"p{i}", j, ids) for i, ids in enumerate(prompts) for j in range(24)]
    sampling = SAMPLING.model_copy(update={"slots": 32})
    pages = Pages((32, 16), 16, prompts=PromptPages(4, 16, 144))
    wanted = run(model, params, requests, pages, sampling)
    assert_same_bits(wanted, run(model, params, requests[::-1], pages, sampling))


def test_a_start_of_several_samples_takes_first_readers_and_others(model_and_params):
    model, params = model_and_params
    many = SAMPLING.model_copy(update={"slots": 32})
    pages = Pages((32, 16), 16, prompts=PromptPages(6, 7, 48))
    requests = requests_of()[1:]
    found = run(model, params, requests, pages, many)
    assert_same(
        {key: x for key, x in run(model, params, requests_of()).items() if key in found}, found
    )


def test_a_sample_that_the_host_ends_early_leaves_the_others_their_prompt(model_and_params):
    model, params = model_and_params
    wanted = run(model, params, requests_of())
    texts = ["".join(chr(97 + t) for t in s.token_ids) for s in wanted.values()]
    stop = SAMPLING.model_copy(update={"stop": (texts[0][9:11],)})
    found = run(model, params, requests_of(), sampling=stop, text=letters)
    assert found.keys() == wanted.keys()
    shorter = [len(x.token_ids) < len(wanted[key].token_ids) for key, x in found.items()]
    assert any(shorter)
    for key, sample in found.items():
        n = len(sample.token_ids)
        assert sample.token_ids.tolist() == wanted[key].token_ids[:n].tolist()
    one = SAMPLING.model_copy(update={"max_new_tokens": 1, "min_new_tokens": 0})
    for key, sample in run(model, params, requests_of(), sampling=one).items():
        if wanted[key].token_ids[0] not in END:
            assert sample.token_ids.tolist() in ([wanted[key].token_ids[0]], [END[0]], [END[1]])


def letters(ids):
    return "".join(chr(97 + token) for token in ids)


@pytest.mark.slow
def test_on_a_mesh_the_samples_are_those_of_one_device(model_and_params):
    one, params = model_and_params
    model = dataclasses.replace(one, mesh=make_mesh(MeshConfig(tensor=2, fsdp=2)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, model.abstract())
    pages = Pages((4, 2), 16, 2, PromptPages(3, 3, 48))
    found = run(model, jax.device_put(params, shardings), requests_of(), pages)
    assert_same(run(one, params, requests_of()), found)


def test_runs_that_draw_samples_one_by_one_copy_their_prompts():
    model = tiny_model(max_position=4096)
    job = SamplingJob(model, random_params(model), SAMPLING, END, 7)
    requests = [Request("long", i, np.zeros(2000, np.int32)) for i in range(64)]
    assert plan_for(job, requests).program.pages.prompts is not None
    assert plan_for(job, requests, together=False).program.pages.prompts is None


def test_prompts_are_shared_where_that_saves_memory():
    model = tiny_model(max_position=8192)
    leasts, limits = [0] * 256, [500] * 256
    own = plan_cache(model, 64, [2000] * 256, leasts, limits, [1] * 256)
    assert own.pages.prompts is None
    shared = plan_cache(model, 64, [2000] * 256, leasts, limits, [16] * 16)
    assert shared.total_bytes < own.total_bytes / 2
    prompts = shared.pages.prompts
    assert prompts is not None
    assert (prompts.rows, prompts.length) == (MOST_PLACES * 64 // prompts.count + 1, 2000)
    assert f"and {prompts.count} of 2,000 tokens for prompts that samples share" in str(shared)
    long = plan_cache(model, 64, [100] * 256, leasts, [4096] * 256, [16] * 16)
    assert long.pages.prompts is None
    wide = tiny_model(max_position=8192, mesh=make_mesh(MeshConfig(fsdp=4)))
    assert plan_cache(wide, 64, [2000] * 256, leasts, limits, [4] * 64).pages.prompts is None


def test_a_prompt_with_more_samples_than_a_page_has_readers_gets_another_page():
    pager = PromptPager(Pages((4,), 8), PromptPages(2, 2, 8))
    for slot, page in ((0, 0), (1, 0), (2, 1), (3, 1)):
        found = pager.page(slot, "a")
        pager.take(slot, pager.free(slot) if found is None else found, "a", 5)
        assert pager.table().place[0, slot] // 2 == page
    assert pager.places([0, 1, 2, 3, 4]).tolist() == [0, 2, 1, 2, 2]
    assert pager.places([0, 2]).tolist() == [2, 2]  # it lies there now
    assert pager.table().tokens.tolist() == [[5, 5]]
    assert pager.page(0, "a") is None
    assert pager.free(0) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc")), max_size=60))
def test_a_page_holds_one_prompt_from_its_first_reader_to_its_last(steps):
    """Slots start a sample of a prompt, or end the one that they have."""
    rows = 3
    pager = PromptPager(Pages((rows,), 8, 2), PromptPages(2, 2, 8))
    reads = {}  # of each busy slot: its prompt
    for slot, prompt in steps:
        if slot in reads:
            pager.release(slot)
            del reads[slot]
        else:
            held, free = pager.page(slot, prompt), pager.free(slot)
            page = free if held is None else held
            if page is None:
                continue
            pager.take(slot, page, prompt, ord(prompt))
            reads[slot] = prompt
            assert (pager.places([slot])[0] == 4) == (held is not None)
        table = pager.table()
        for other in range(2 * rows):
            shard, row = divmod(other, rows)
            place = table.place[shard, row]
            assert (place == 4) == (other not in reads)
            if other in reads:
                assert table.row[shard, place] == row
                assert table.tokens[shard, place // 2] == ord(reads[other])
        assert (table.row < rows).sum() == len(reads)
