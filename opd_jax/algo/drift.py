"""How far a student has moved from the rollouts it is trained on, from log-probs alone.

A response's weight is W = pi_theta(response) / pi_ref(response), the product of its tokens' w. What
depends on W is exact in expectation, but only responses that pi_ref sampled are seen: once the
student prefers others, chi-square looks small again and the weighted reverse KL is that of the few
that are left. The effective sample size says how many those are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Rows = Sequence[np.ndarray]


def drift(student: Rows, teacher: Rows, sampler: Rows, tau: float) -> dict[str, float]:
    """Figures over held-out responses; each argument has one vector of log-probs per response.

    Returns:
        per token: `half_squared_advantage`, `abs_advantage`, the shares `large_advantage` (above 1)
        and `clipped` (above tau) of its absolute value, `reverse_kl_estimate` (mean of
        log pi_theta - log pi_T, unweighted), mean `w` and `w_std`. Per response: mean `log_w`
        (natural log of W), mean `token_log_w` (the same divided by the response's tokens),
        `effective_share` ((sum W)^2 / (n sum W^2)), `chi2` (mean of W^2 / (mean W)^2 - 1), and
        `iw_reverse_kl`, the self-normalised weighted mean, nats per token:
        sum W (log pi_theta - log pi_T) / sum W tokens, with its linearised standard error
        `iw_reverse_kl_stderr` (NaN for one response).

    Source: arXiv 2604.13010 for chi-square and w; Owen, Monte Carlo theory (2013), chapter 9.
    """
    rows = [np.asarray(x, np.float64) for x in student]
    gaps = [np.asarray(t, np.float64) - s for s, t in zip(rows, teacher, strict=True)]
    logs = [s - np.asarray(r, np.float64) for s, r in zip(rows, sampler, strict=True)]
    gap, w = np.concatenate(gaps), np.exp(np.concatenate(logs))
    log_w_r = np.array([x.sum() for x in logs])
    weight_r = np.exp(log_w_r - log_w_r.max())  # the scale cancels everywhere below
    kl_r = np.array([-x.sum() for x in gaps])
    tokens_r = np.array([len(x) for x in gaps])
    share = weight_r.sum() ** 2 / (len(rows) * np.square(weight_r).sum())
    tokens = (weight_r * tokens_r).sum()
    kl = (weight_r * kl_r).sum() / tokens
    residual_r = weight_r * (kl_r - kl * tokens_r)
    n = len(rows)
    error = math.sqrt(n / (n - 1) * np.square(residual_r).sum()) / tokens if n > 1 else math.nan
    size = np.minimum(np.abs(gap), tau)
    return {
        "half_squared_advantage": float(0.5 * np.mean(size**2)),
        "abs_advantage": float(np.mean(size)),
        "large_advantage": float(np.mean(size > 1)),
        "clipped": float(np.mean(np.abs(gap) > tau)),
        "reverse_kl_estimate": float(-np.mean(gap)),
        "w": float(np.mean(w)),
        "w_std": float(np.std(w)),
        "log_w": float(np.mean(log_w_r)),
        "token_log_w": float(np.mean(log_w_r / tokens_r)),
        "effective_share": float(share),
        "chi2": float(1.0 / share - 1.0),
        "iw_reverse_kl": float(kl),
        "iw_reverse_kl_stderr": float(error),
    }
