"""From logits to a token: temperature, top-k, top-p, min-p, greedy.

Every cut-off is a threshold on the scaled logits, so they combine by the largest threshold, and a
transform that is switched off leaves nothing in the program (no sort over the vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from opd_jax.config import SamplingConfig


@dataclass(frozen=True)
class Transform:
    """How the model's distribution is bent before a token is drawn; static in compiled programs.

    `temperature=0` is greedy; `top_k=0`, `top_p=1`, `min_p=0` are off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def transform_of(sampling: SamplingConfig) -> Transform:
    """The part of a sampling config that shapes the distribution."""
    return Transform(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


def draw(keys_b: jax.Array, logits_bv: jax.Array, transform: Transform) -> jax.Array:
    """One token per row, int32: the largest of logits plus Gumbel noise, in float32.

    Args:
        keys_b: one typed key per row; a row's token depends on its own key and logits alone.
    """
    if transform.temperature == 0:
        return _argmax(logits_bv)
    bent_bv = bend(logits_bv, transform)
    shape = logits_bv.shape[1:]
    noise_bv = jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32))(keys_b)
    # The barrier keeps XLA from computing the noise again in each reduction that reads the sum.
    return _argmax(jax.lax.optimization_barrier(bent_bv + noise_bv))


def _argmax(x_bv: jax.Array) -> jax.Array:
    """First index of the maximum; the last index where there is none (NaN).

    `jnp.argmax` takes seven times as long on CPUs, where XLA does not vectorise it.
    """
    last = x_bv.shape[-1] - 1
    index_bv = jax.lax.broadcasted_iota(jnp.int32, x_bv.shape, 1)
    top_b1 = jnp.max(x_bv, axis=-1, keepdims=True)
    return jnp.min(jnp.where(x_bv == top_b1, index_bv, last), axis=-1)


def bend(logits_bv: jax.Array, transform: Transform) -> jax.Array:
    """Unnormalised log-probs of the distribution that tokens are drawn from; -inf where cut off.

    Top-p acts on what top-k left, renormalised. Tokens that tie at a threshold all stay.
    """
    scaled_bv = scale(logits_bv, transform.temperature)
    thresholds = []
    candidates = scaled_bv
    if 0 < transform.top_k < logits_bv.shape[-1]:
        candidates = jax.lax.top_k(scaled_bv, transform.top_k)[0]
        thresholds.append(candidates[:, -1:])
    if transform.top_p < 1:
        thresholds.append(top_p_threshold(candidates, transform.top_p))
    if transform.min_p > 0:
        thresholds.append(jnp.max(scaled_bv, axis=-1, keepdims=True) + jnp.log(transform.min_p))
    for threshold_b1 in thresholds:
        scaled_bv = jnp.where(scaled_bv >= threshold_b1, scaled_bv, -jnp.inf)
    return scaled_bv


def scale(logits_bv: jax.Array, temperature: float) -> jax.Array:
    """Logits over temperature; shifted first, so that a small temperature cannot overflow."""
    if temperature == 1:
        return logits_bv
    return (logits_bv - jnp.max(logits_bv, axis=-1, keepdims=True)) / temperature


def top_p_threshold(logits_bs: jax.Array, top_p: float) -> jax.Array:
    """[b, 1]: the least logit of the smallest set of likeliest tokens that holds mass `top_p`."""
    sorted_bs = -jnp.sort(-logits_bs, axis=-1)
    prob_bs = jax.nn.softmax(sorted_bs, axis=-1)
    before_bs = jnp.cumsum(prob_bs, axis=-1) - prob_bs
    return jnp.min(jnp.where(before_bs < top_p, sorted_bs, jnp.inf), axis=-1, keepdims=True)
