"""The objectives: pure functions from log-probs to a sum, a divisor and diagnostics.

The division happens once, after all micro-batches and devices are added up, so that a ragged batch
gives the same gradient however it is cut. `weight_bt` is 0 off the response; in a per-sequence mean
it is 1 / (response length).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Sums = dict[str, jax.Array]
TAIL_FLOOR = 1e-4  # stored log-probs are float16: a smaller teacher tail is rounding, not knowledge


class Loss(NamedTuple):
    """`total / divisor` is the loss; every entry of `sums` is a plain sum over response tokens."""

    total: jax.Array
    divisor: jax.Array
    sums: Sums


def sft_loss(logprob_bt: jax.Array, mask_bt: jax.Array) -> Loss:
    """Negative log-likelihood, nats, mean over the answer tokens of the whole batch."""
    nll = -jnp.sum(jnp.where(mask_bt, logprob_bt, 0.0))
    tokens = jnp.sum(mask_bt, dtype=jnp.float32)
    return Loss(nll, tokens, {"tokens": tokens, "nll": nll})


def advantage(
    student_bt: jax.Array, teacher_bt: jax.Array, mask_bt: jax.Array, tau: float
) -> jax.Array:
    """clip(log pi_T - log pi_theta, -tau, tau), no gradient, 0 where masked.

    Source: arXiv 2604.13010, the offline advantage with current-weight log-probs.
    """
    gap = jnp.where(mask_bt, teacher_bt - student_bt, 0.0)
    return jax.lax.stop_gradient(jnp.clip(gap, -tau, tau))


def sampled_opd(
    student_bt: jax.Array, teacher_bt: jax.Array, weight_bt: jax.Array, tau: float
) -> jax.Array:
    """Sum over tokens of -weight * A * log pi_theta: the sampled-token objective.

    Its gradient is that of weight * (log pi_theta - log pi_T)^2 / 2, Huber's form once clipped.
    """
    mask_bt = weight_bt > 0
    adv_bt = advantage(student_bt, teacher_bt, mask_bt, tau)
    return -jnp.sum(weight_bt * adv_bt * jnp.where(mask_bt, student_bt, 0.0))


def topk_reverse_kl(
    student_bts: jax.Array, teacher_bts: jax.Array, mask_bt: jax.Array, *, tail: bool
) -> jax.Array:
    """KL(student || teacher) on the teacher's support, nats at each position, 0 where masked.

    Args:
        student_bts: the student's log-probs of the support, normalised over the whole vocabulary.
        teacher_bts: the teacher's.
        tail: the mass outside the support is one more bucket; otherwise both sides are divided
            by their mass on the support. At support = vocabulary both are the exact reverse KL.
    """
    keep_bt1 = mask_bt[..., None]
    student_bts = jnp.where(keep_bt1, student_bts, 0.0)
    teacher_bts = jnp.where(keep_bt1, teacher_bts, 0.0)
    if tail:
        inside_bt = jnp.sum(jnp.exp(student_bts) * (student_bts - teacher_bts), axis=-1)
        return jnp.where(mask_bt, inside_bt + _tail_term(student_bts, teacher_bts), 0.0)
    student_bts = jax.nn.log_softmax(student_bts, axis=-1)
    teacher_bts = jax.nn.log_softmax(teacher_bts, axis=-1)
    kl_bt = jnp.sum(jnp.exp(student_bts) * (student_bts - teacher_bts), axis=-1)
    return jnp.where(mask_bt, kl_bt, 0.0)


def _tail_term(student_bts: jax.Array, teacher_bts: jax.Array) -> jax.Array:
    """q log(q / p) for the masses q, p outside the support; 0 where the student has none."""
    q = 1.0 - jnp.sum(jnp.exp(student_bts), axis=-1)
    p = jnp.maximum(1.0 - jnp.sum(jnp.exp(teacher_bts), axis=-1), TAIL_FLOOR)
    some = q > 0
    safe_q = jnp.where(some, q, 1.0)
    return jnp.where(some, safe_q * jnp.log(safe_q / p), 0.0)


def diagnostics(
    student_bt: jax.Array,
    teacher_bt: jax.Array,
    sampler_bt: jax.Array,
    mask_bt: jax.Array,
    tau: float,
) -> Sums:
    """Sums over response tokens from which `averages` makes the logged figures.

    Args:
        student_bt: log pi_theta of the sampled tokens.
        teacher_bt: log pi_T.
        sampler_bt: log pi_ref, of the model that drew them.
    """
    adv_bt = advantage(student_bt, teacher_bt, mask_bt, tau)
    gap_bt = jnp.where(mask_bt, teacher_bt - student_bt, 0.0)
    w_bt = jnp.where(mask_bt, jnp.exp(jnp.where(mask_bt, student_bt - sampler_bt, 0.0)), 0.0)
    parts = {
        "tokens": mask_bt,
        "half_squared_advantage": 0.5 * adv_bt**2,
        "reverse_kl_estimate": -gap_bt,
        "large_advantage": jnp.abs(adv_bt) > 1,
        "clipped": jnp.abs(gap_bt) > tau,
        "w": w_bt,
        "w_squared": w_bt**2,
    }
    sums = {name: jnp.sum(x, dtype=jnp.float32) for name, x in parts.items()}
    return jax.tree.map(jax.lax.stop_gradient, sums)


def averages(sums: dict[str, float]) -> dict[str, float]:
    """Per-token means of added-up `sums`, with the standard deviation of w in place of w^2."""
    tokens = max(sums["tokens"], 1.0)
    means = {name: value / tokens for name, value in sums.items() if name != "tokens"}
    if "w_squared" in means:
        means["w_std"] = max(means.pop("w_squared") - means["w"] ** 2, 0.0) ** 0.5
    return {**means, "tokens": sums["tokens"]}
