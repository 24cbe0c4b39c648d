"""What of a run that breaks stays in the store."""

import dataclasses

import numpy as np
import pytest

from opd_jax.config import SamplingConfig
from opd_jax.data.store import create_store
from opd_jax.errors import ModelError, Preempted
from opd_jax.sampling.collect import Work, collect, requests_for, share_of
from opd_jax.sampling.sampler import SamplingJob, plan_for
from tests.sampling.reference import random_params, tiny_model

SICK = 7


def poisoned(model):
    """Parameters whose logits are NaN once the token `SICK` has been read."""
    params = random_params(model)
    return {**params, "embed": params["embed"].at[SICK].set(np.nan)}


def test_a_broken_checkpoint_stops_the_run_and_keeps_what_was_finished(tmp_path):
    """Four samples finish before the sick one starts, three in the round in which it breaks."""
    model = tiny_model("qwen2")  # untied: the poisoned embedding does not reach the head
    long, short = (SamplingConfig(max_new_tokens=n, min_new_tokens=n, top_k=2) for n in (6, 1))
    fine = requests_for([("fine", [1] * 17)], samples=7)  # the longest bucket comes first
    requests = [
        *(dataclasses.replace(r, sampling=long if r.sample_index < 4 else short) for r in fine),
        *requests_for([("sick", [1, SICK, 2])], samples=5),
    ]
    sampling, told = SamplingConfig(max_new_tokens=6, slots=4), []
    job = SamplingJob(model, poisoned(model), sampling, (3, 5), 7)
    store = create_store(tmp_path, {})
    with pytest.raises(ModelError, match=r"prompt 'sick', sample 0: .* position 0 ") as caught:
        collect(job, store, Work(requests, plan_for(job, requests)), told.append, flush_seconds=1e9)
    assert "\n" not in str(caught.value)
    finished = {("fine", i) for i in range(7)}
    assert {(s.request.prompt_id, s.request.sample_index) for s in told} == finished
    assert store.committed_keys() == finished
    records = store.freeze().read_many(range(7))
    assert sorted(len(r.response_ids) for r in records) == [1, 1, 1, 6, 6, 6, 6]


def test_a_long_response_keeps_neither_the_clock_nor_sigterm_waiting(tmp_path, monkeypatch):
    """Both are looked at after every round, not when a response ends."""
    model = tiny_model()
    long, short = (SamplingConfig(max_new_tokens=n, min_new_tokens=n) for n in (40, 1))
    (first, last) = requests_for([("p", [1] * 5)], samples=2)
    requests = [dataclasses.replace(x, sampling=s) for x, s in ((first, short), (last, long))]
    sampling = SamplingConfig(max_new_tokens=40, slots=2)
    job = SamplingJob(model, random_params(model), sampling, (), 7, round_steps=4)
    store, kept = create_store(tmp_path, {}), []

    def told():
        kept.append(len(store.committed_keys()))
        return len(kept) == 5

    monkeypatch.setattr("opd_jax.sampling.collect.told", told)
    with pytest.raises(Preempted):
        collect(job, store, Work(requests, plan_for(job, requests)), lambda _: None, 0.0)
    assert kept == [1] * 5


def test_shares_are_all_requests_once_and_a_prompt_s_samples_together():
    names = [f"p{number}" for number in range(11)]
    requests = requests_for([(name, [1, 2]) for name in names], samples=3)
    shares = [share_of(requests, (index, 4)) for index in range(4)]
    keys = [[(r.prompt_id, r.sample_index) for r in share] for share in shares]
    assert sorted(key for share in keys for key in share) == sorted(
        (r.prompt_id, r.sample_index) for r in requests
    )
    prompts = [{name for name, _ in share} for share in keys]
    assert [len(names) for names in prompts] == [3, 3, 3, 2]
    assert [len(share) for share in shares] == [9, 9, 9, 6]
    # Whatever the order of the prompt file, which is no input of a stage.
    assert {r.prompt_id for r in share_of(requests[::-1], (1, 4))} == prompts[1]


def test_there_may_be_more_shares_than_prompts():
    requests = requests_for([("only", [1, 2])], samples=5)
    assert [len(share_of(requests, (index, 3))) for index in range(3)] == [5, 0, 0]
