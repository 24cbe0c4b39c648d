import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax.algo.drift import drift


def rows(seed, n=5, spread=0.3):
    """Log-probs of n responses under student, teacher and sampler."""
    rng = np.random.default_rng(seed)
    sampler = [-rng.exponential(1.0, rng.integers(1, 7)) for _ in range(n)]
    student = [x + rng.normal(0, spread, x.shape) for x in sampler]
    teacher = [x + rng.normal(0, spread, x.shape) for x in sampler]
    return student, teacher, sampler


def loops(student, teacher, sampler, tau):
    """The figures one response and one token at a time."""
    weights, kls, lengths, logs, tokens = [], [], [], [], []
    for s, t, r in zip(student, teacher, sampler, strict=True):
        weights.append(float(np.exp(sum(a - b for a, b in zip(s, r, strict=True)))))
        logs.append(sum(a - b for a, b in zip(s, r, strict=True)))
        kls.append(sum(a - b for a, b in zip(s, t, strict=True)))
        lengths.append(len(s))
        tokens += [(t[i] - s[i], np.exp(s[i] - r[i])) for i in range(len(s))]
    gaps, ws = zip(*tokens, strict=True)
    mean = sum(weights) / len(weights)
    pairs = list(zip(weights, kls, lengths, strict=True))
    kl = sum(w * k for w, k, _ in pairs) / sum(w * n for w, _, n in pairs)
    squares = sum((w * (k - kl * n)) ** 2 for w, k, n in pairs)
    error = (len(pairs) / (len(pairs) - 1) * squares) ** 0.5 / sum(w * n for w, _, n in pairs)
    return {
        "half_squared_advantage": sum(min(abs(g), tau) ** 2 for g in gaps) / 2 / len(gaps),
        "abs_advantage": sum(min(abs(g), tau) for g in gaps) / len(gaps),
        "large_advantage": sum(min(abs(g), tau) > 1 for g in gaps) / len(gaps),
        "clipped": sum(abs(g) > tau for g in gaps) / len(gaps),
        "reverse_kl_estimate": -sum(gaps) / len(gaps),
        "w": sum(ws) / len(ws),
        "w_std": (sum(w * w for w in ws) / len(ws) - (sum(ws) / len(ws)) ** 2) ** 0.5,
        "log_w": sum(logs) / len(logs),
        "token_log_w": sum(x / n for x, n in zip(logs, lengths, strict=True)) / len(logs),
        "effective_share": sum(weights) ** 2 / len(weights) / sum(w * w for w in weights),
        "chi2": sum(w * w for w in weights) / len(weights) / mean**2 - 1,
        "iw_reverse_kl": kl,
        "iw_reverse_kl_stderr": error,
    }


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([0.2, 10.0]))
def test_every_figure_equals_the_loop(seed, tau):
    found, want = drift(*rows(seed), tau), loops(*rows(seed), tau)
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_a_student_that_has_not_moved():
    _, teacher, sampler = rows(1)
    found = drift(sampler, teacher, sampler, 10.0)
    assert (found["w"], found["w_std"], found["log_w"]) == (1.0, 0.0, 0.0)
    assert found["effective_share"] == pytest.approx(1.0)
    assert found["chi2"] == pytest.approx(0.0)
    assert found["iw_reverse_kl"] == pytest.approx(found["reverse_kl_estimate"])


def test_long_responses_neither_overflow_nor_vanish():
    sampler = [np.full(4000, -1.0)] * 3
    student = [np.full(4000, -1.0 + shift) for shift in (-1.0, 0.0, 0.9)]
    found = drift(student, sampler, sampler, 10.0)
    assert all(np.isfinite(list(found.values())))
    assert found["effective_share"] == pytest.approx(1 / 3)  # one of three is left
    assert found["iw_reverse_kl"] == pytest.approx(0.9)


def test_weights_find_the_reverse_kl_of_a_student_that_has_moved():
    """Tokens of a vocabulary of 4, drawn from pi_ref: the weighted mean is pi_theta's own."""
    rng = np.random.default_rng(3)
    ref, theta, teacher = (np.log(rng.dirichlet(np.full(4, 3.0))) for _ in range(3))
    ids = rng.choice(4, size=(40_000, 2), p=np.exp(ref))
    found = drift(list(theta[ids]), list(teacher[ids]), list(ref[ids]), 10.0)
    exact = float(np.sum(np.exp(theta) * (theta - teacher)))
    assert found["iw_reverse_kl"] == pytest.approx(exact, abs=0.02)
    assert abs(found["reverse_kl_estimate"] - exact) > 0.05  # without weights it is not
