"""Estimates agree with slow textbook formulas and with what they claim about repeated sampling."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from opd_jax.algo.estimates import accuracy_estimate, ratio_estimate, reverse_kl_estimate

VECTORS = arrays(np.float64, 7, elements=st.floats(-5, 5, allow_subnormal=False))
COUNTS = arrays(np.float64, 7, elements=st.integers(1, 9).map(float))


def slow_ratio(sums, counts, clusters):
    """Straight from the formula, with loops."""
    ratio = math.fsum(sums) / math.fsum(counts)
    groups = sorted(set(clusters))
    squares = 0.0
    for group in groups:
        error = 0.0
        for value, count, owner in zip(sums, counts, clusters, strict=True):
            if owner == group:
                error += value - ratio * count
        squares += error * error
    g = len(groups)
    return ratio, math.sqrt(g / (g - 1) * squares) / math.fsum(counts)


@given(VECTORS, COUNTS, st.lists(st.integers(2, 4), min_size=5, max_size=5))
def test_ratio_agrees_with_the_formula(sums, counts, owners):
    clusters = [0, 1, *owners]
    got = ratio_estimate(sums, counts, clusters)
    mean, stderr = slow_ratio(sums, counts, clusters)
    assert got.mean == pytest.approx(mean, abs=1e-12)
    assert got.stderr == pytest.approx(stderr, abs=1e-12)
    assert got.n == 7


@given(VECTORS, COUNTS, st.permutations(range(7)))
def test_the_order_of_records_does_not_matter(sums, counts, order):
    one = ratio_estimate(sums, counts)
    other = ratio_estimate(sums[order], counts[order])
    assert (one.mean, one.stderr) == pytest.approx((other.mean, other.stderr), abs=1e-12)


@given(VECTORS, COUNTS)
def test_records_without_terms_leave_the_mean_alone(sums, counts):
    more = ratio_estimate(np.append(sums, 0.0), np.append(counts, 0.0))
    assert more.mean == pytest.approx(ratio_estimate(sums, counts).mean, abs=1e-12)


def test_accuracy_is_the_sample_mean_with_its_standard_error():
    correct = np.array([1, 1, 0, 1, 0, 0, 1, 1], bool)
    got = accuracy_estimate(correct)
    assert got.mean == 0.625
    assert got.stderr == pytest.approx(correct.std(ddof=1) / math.sqrt(8), rel=1e-12)


def test_copies_of_a_prompt_do_not_shrink_the_error():
    correct = np.array([1, 0, 0, 1, 1], bool)
    once = accuracy_estimate(correct, list("abcde"))
    often = accuracy_estimate(np.repeat(correct, 10), np.repeat(list("abcde"), 10).tolist())
    assert often.stderr == pytest.approx(once.stderr, rel=1e-12)
    assert accuracy_estimate(np.repeat(correct, 10)).stderr < 0.5 * once.stderr


def test_reverse_kl_weighs_tokens_not_records():
    student = [np.array([-1.0], np.float32), np.array([-1.0, -1.0, -1.0], np.float32)]
    teacher = [np.array([-2.0], np.float32), np.array([-1.0, -1.0, -1.0], np.float32)]
    assert reverse_kl_estimate(student, teacher).mean == pytest.approx(0.25)


def test_the_standard_error_covers_the_truth_as_often_as_it_says():
    """400 repetitions with correlated tokens: 95% lie within 2 standard errors."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        lengths = rng.integers(1, 30, 120)
        level = rng.normal(0.3, 0.5, 120)
        sums = level * lengths + rng.normal(0, 1, 120) * np.sqrt(lengths)
        got = ratio_estimate(sums, lengths)
        inside += abs(got.mean - 0.3) < 2 * got.stderr
    assert 0.92 < inside / 400 < 0.98


def test_too_little_data_says_so():
    assert math.isnan(accuracy_estimate([True]).stderr)
    assert math.isnan(ratio_estimate(np.zeros(0), np.zeros(0)).mean)
    assert math.isnan(accuracy_estimate([True, False], ["a", "a"]).stderr)


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="equal vectors"):
        ratio_estimate(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="1 clusters for 2 records"):
        ratio_estimate(np.zeros(2), np.ones(2), ["a"])
