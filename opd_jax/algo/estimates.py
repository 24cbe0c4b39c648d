"""Means with their standard errors, in float64.

Accuracy and the reverse KL per token are both ratios of sums over records. Records that share a
prompt, and tokens that share a record, are not independent: the standard error is over clusters.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (NaN for a single cluster) and the number of records behind it."""

    mean: float
    stderr: float
    n: int


def ratio_estimate(
    sum_r: np.ndarray, count_r: np.ndarray, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """sum(sum_r) / sum(count_r), with the linearised standard error over clusters.

    With R the ratio and e_g the sum of sum_r - R * count_r over cluster g of G:
    stderr = sqrt(G / (G - 1) * sum_g e_g**2) / sum(count_r).

    Args:
        sum_r: what was summed in each record, e.g. log pi_student - log pi_teacher over its tokens.
        count_r: how many terms each record has, >= 0, e.g. its tokens.
        clusters: what is drawn independently, e.g. prompt ids; None: every record by itself.

    Source: Cochran, Sampling Techniques (1977), chapter 6, without the finite-population term.
    """
    sums = np.asarray(sum_r, np.float64)
    counts = np.asarray(count_r, np.float64)
    if sums.ndim != 1 or sums.shape != counts.shape:
        raise ValueError(f"sum_r {sums.shape} and count_r {counts.shape} must be equal vectors")
    total = counts.sum()
    if total <= 0:
        return Estimate(float("nan"), float("nan"), len(sums))
    ratio = sums.sum() / total
    residual_g = _sum_by_cluster(sums - ratio * counts, clusters)
    groups = len(residual_g)
    if groups < 2:
        return Estimate(float(ratio), float("nan"), len(sums))
    stderr = np.sqrt(groups / (groups - 1) * np.square(residual_g).sum()) / total
    return Estimate(float(ratio), float(stderr), len(sums))


def accuracy_estimate(
    correct_r: Sequence[bool] | np.ndarray, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """The share of correct records; where a prompt has several samples, its id is their cluster."""
    correct = np.asarray(correct_r, np.float64)
    return ratio_estimate(correct, np.ones_like(correct), clusters)


def reverse_kl_estimate(
    student_logprobs: Sequence[np.ndarray],
    teacher_logprobs: Sequence[np.ndarray],
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """Nats per token of KL(student || teacher), from tokens just sampled at temperature 1.

    The mean of log pi_student(a_t) - log pi_teacher(a_t) over all tokens; on few tokens it may be
    negative. Each argument has one float array per record, of log-probs under the full softmax.
    """
    gaps = [
        np.asarray(student, np.float64) - np.asarray(teacher, np.float64)
        for student, teacher in zip(student_logprobs, teacher_logprobs, strict=True)
    ]
    sums = np.array([gap.sum() for gap in gaps], np.float64)
    counts = np.array([gap.size for gap in gaps], np.float64)
    return ratio_estimate(sums, counts, clusters)


def _sum_by_cluster(value_r: np.ndarray, clusters: Sequence[Hashable] | None) -> np.ndarray:
    if clusters is None:
        return value_r
    if len(clusters) != len(value_r):
        raise ValueError(f"{len(clusters)} clusters for {len(value_r)} records")
    index_of: dict[Hashable, int] = {}
    index_r = [index_of.setdefault(cluster, len(index_of)) for cluster in clusters]
    return np.bincount(index_r, weights=value_r, minlength=len(index_of))
