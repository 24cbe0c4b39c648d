"""How many programs a run compiles, counted by JAX itself."""

import contextlib

import jax
import numpy as np

from opd_jax.config import SamplingConfig
from opd_jax.model.cache import Pages
from opd_jax.sampling.keys import root_key
from opd_jax.sampling.queue import Request
from opd_jax.sampling.sampler import SamplingJob, generate, plan_for
from tests.sampling.reference import random_params, tiny_model
from tests.sampling.test_requests import with_pages

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def counted():
    """Yields a list that grows by the name of every program that is compiled."""
    found = []

    def listen(event, _, **about):
        if event == COMPILED:
            found.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def ragged(count, prompts, limits):
    rng = np.random.default_rng(2)
    return [
        Request(
            f"p{i}",
            0,
            rng.integers(0, 28, rng.integers(1, prompts)).astype(np.int32),
            SamplingConfig(max_new_tokens=int(rng.integers(*limits)), min_new_tokens=1),
        )
        for i in range(count)
    ]


def test_a_ragged_run_compiles_no_more_programs_than_its_plan_says():
    model = tiny_model(max_position=256, ffn_dim=20)
    params = random_params(model)
    requests = ragged(60, prompts=32, limits=(1, 70))
    job = SamplingJob(model, params, SamplingConfig(slots=32), (), 7)
    plan = with_pages(plan_for(job, requests), Pages((32, 8), 64))
    root_key(7)  # what every process compiles once
    with counted() as programs:
        assert len(list(generate(job, requests, plan))) == len(requests)
        assert len(list(generate(job, requests[::3], plan))) == 20
    buckets = len(plan.prefills.lengths)
    assert buckets > 1
    assert plan.rows == 2
    assert len(programs) <= plan.programs, programs
    assert programs.count("jit(prefill)") == programs.count("jit(start)") == buckets
    assert programs.count("jit(decode_round)") == 1
