"""Padded lengths of prompts, and how much of what is prefilled is padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.sampling import buckets
from opd_jax.sampling.buckets import bucket_of, coarse_bucket_of, plan_prefills


def cost(prompts, lengths, rows):
    """Tokens of all prefills, with the share of each prefill that does not depend on its tokens."""
    total, below = 0, 0
    for length in lengths:
        count = sum(below < prompt <= length for prompt in prompts)
        total += -(-count // rows(length)) * (rows(length) * length + buckets.FIXED_TOKENS)
        below = length
    return total


def test_fixed_buckets_hold_the_prompt_and_pad_by_less_than_a_half():
    for length in range(1, 5000):
        assert length <= bucket_of(length) <= max(16, length * 3 / 2)
        assert length <= coarse_bucket_of(length) <= max(64, 2 * length)
    assert len({bucket_of(length) for length in range(1, 4097)}) == 17


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.integers(1, 3))
def test_no_other_buckets_pad_less(prompts, shift):
    """Against every choice of at most three of the padded lengths that occur."""

    def rows(length):
        return max(4 - length // 30, shift)

    most = buckets.MOST_BUCKETS
    buckets.MOST_BUCKETS = 3
    try:
        found = plan_prefills(prompts, rows, None)
    finally:
        buckets.MOST_BUCKETS = most
    edges = sorted({-(-prompt // buckets.EDGE) * buckets.EDGE for prompt in prompts})
    choices = (
        (*some, edges[-1]) for n in range(3) for some in itertools.combinations(edges[:-1], n)
    )
    best = min(cost(prompts, choice, rows) for choice in choices)
    assert best <= cost(prompts, found.lengths, rows) <= buckets.SLACK * best
    assert len(found.lengths) <= 3
    assert found.rows == tuple(rows(length) for length in found.lengths)


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=400))
def test_every_prompt_has_a_bucket(prompts):
    found = plan_prefills(prompts, lambda length: 1, None)
    assert len(found.lengths) <= buckets.MOST_BUCKETS
    assert found.lengths == tuple(sorted(set(found.lengths)))
    for prompt in prompts:
        number = found.bucket(prompt)
        assert prompt <= found.lengths[number]
        assert number == 0 or found.lengths[number - 1] < prompt


@pytest.mark.parametrize("bucket", [bucket_of, coarse_bucket_of])
def test_given_buckets_are_taken(bucket):
    prompts = [3, 70, 65, 300]
    found = plan_prefills(prompts, lambda length: 1024 // length, bucket)
    assert found.lengths == tuple(sorted({bucket(prompt) for prompt in prompts}))
    assert found.rows == tuple(1024 // length for length in found.lengths)


def test_a_mesh_cuts_every_length():
    for bucket in (None, bucket_of):
        whole, cut = (
            plan_prefills([3, 17, 20, 300], lambda length: 1024 // length, bucket, parts)
            for parts in (1, 12)
        )
        assert cut.lengths == tuple(sorted({-(-length // 12) * 12 for length in whole.lengths}))
        assert cut.lengths != whole.lengths
        assert cut.rows == tuple(1024 // length for length in cut.lengths)


def test_padding_of_long_tailed_lengths_is_small():
    rng = np.random.default_rng(0)
    prompts = np.minimum(rng.lognormal(5, 0.7, 2000).astype(int) + 1, 4096).tolist()
    found = plan_prefills(prompts, lambda length: 4, None)
    padded = sum(found.lengths[found.bucket(prompt)] for prompt in prompts)
    assert padded < 1.2 * sum(prompts)
    assert padded < 0.97 * sum(map(bucket_of, prompts))  # with 11 buckets, not 15
