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
TAIL_FLOOR = 1e-6  # one minus a sum of float32 probabilities: less is rounding, not knowledge


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


class Terms(NamedTuple):
    """Constants of the sampled-token objective and of what can be added to it. Hashable.

    Attributes:
        tau: the advantage is clipped to [-tau, tau].
        reward_scale: 1 is plain distillation; above 1 goes beyond the teacher, away from pi_ref.
        kl_anchor: coefficient of the pull back to pi_ref.
        weight_cap: tokens weigh min(pi_theta / pi_ref, cap); `None`: they all weigh 1.
        position_gamma: how much more tokens weigh before the large advantages of their response.
        ratio_clip: several steps on one batch: PPO's clipped ratio to the policy that drew it.
    """

    tau: float = 10.0
    reward_scale: float = 1.0
    kl_anchor: float = 0.0
    weight_cap: float | None = None
    position_gamma: float = 0.0
    ratio_clip: float | None = None


class TokenLogprobs(NamedTuple):
    """Log-probs of the sampled tokens: of the student in training, the teacher, the sampler.

    Only what `mask_bt` marks is read. `segments_bt` tells the responses of a packed row apart; a
    row without it is one response.
    """

    student_bt: jax.Array
    teacher_bt: jax.Array
    sampler_bt: jax.Array
    mask_bt: jax.Array
    segments_bt: jax.Array | None = None

    def clean(self) -> TokenLogprobs:
        """The same with 0 wherever there is no response token."""

        def kept(x: jax.Array) -> jax.Array:
            return jnp.where(self.mask_bt, x, 0.0)

        return self._replace(
            student_bt=kept(self.student_bt),
            teacher_bt=kept(self.teacher_bt),
            sampler_bt=kept(self.sampler_bt),
        )


def advantage(tokens: TokenLogprobs, terms: Terms) -> jax.Array:
    """clip(log pi_T - log pi_theta, -tau, tau), no gradient, 0 where masked.

    With a reward scale s the teacher's log-prob becomes log pi_ref + s (log pi_T - log pi_ref); an
    anchor c adds c clip(log pi_ref - log pi_theta, -tau, tau).

    Source: arXiv 2604.13010, the offline advantage with current-weight log-probs; the reward scale
    is that of arXiv 2602.12125 with pi_ref, the student that drew the responses, as reference.
    """
    student_bt, _, sampler_bt = tokens.clean()[:3]
    adv_bt = jnp.clip(_target(tokens, terms) - student_bt, -terms.tau, terms.tau)
    if terms.kl_anchor:
        pull_bt = jnp.clip(sampler_bt - student_bt, -terms.tau, terms.tau)
        adv_bt = adv_bt + terms.kl_anchor * pull_bt
    return jax.lax.stop_gradient(adv_bt)


def _target(tokens: TokenLogprobs, terms: Terms) -> jax.Array:
    """The log-probs to reach: the teacher's, or beyond or short of it by the reward scale."""
    _, teacher_bt, sampler_bt = tokens.clean()[:3]
    if terms.reward_scale == 1.0:
        return teacher_bt
    return sampler_bt + terms.reward_scale * (teacher_bt - sampler_bt)


def anchor_loss(tokens: TokenLogprobs, weight_bt: jax.Array, terms: Terms) -> jax.Array:
    """The anchor's part of the sampled-token objective, for objectives that are none.

    Its gradient is that of kl_anchor * weight * (log pi_theta - log pi_ref)^2 / 2.
    """
    student_bt, _, sampler_bt = tokens.clean()[:3]
    pull_bt = jax.lax.stop_gradient(jnp.clip(sampler_bt - student_bt, -terms.tau, terms.tau))
    return -terms.kl_anchor * jnp.sum(weight_bt * pull_bt * student_bt)


def token_weights(
    tokens: TokenLogprobs, weight_bt: jax.Array, adv_bt: jax.Array, terms: Terms
) -> jax.Array:
    """`weight_bt` times the truncated token weight and the position's weight; no gradient.

    A position weighs 1 + gamma (1 - sum of abs(A) before it / sum of abs(A) of its response).
    Source: arXiv 2606.22600 (position weighting).
    """
    if terms.weight_cap is not None:
        student_bt, _, sampler_bt = tokens.clean()[:3]
        weight_bt = weight_bt * jnp.minimum(jnp.exp(student_bt - sampler_bt), terms.weight_cap)
    if terms.position_gamma:
        before_bt, total_bt = _running_sums(jnp.abs(adv_bt), tokens.segments_bt)
        # Differences of one running sum: by rounding they can leave 0 to 1, even far.
        share_bt = jnp.clip(before_bt / jnp.maximum(total_bt, 1e-30), 0.0, 1.0)
        weight_bt = weight_bt * (1.0 + terms.position_gamma * (1.0 - share_bt))
    return jax.lax.stop_gradient(weight_bt)


def _running_sums(x_bt: jax.Array, segments_bt: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Sum of `x_bt` before each token, and over all tokens, of the segment it belongs to."""
    through_bt = jnp.cumsum(x_bt, axis=1)
    before_bt = through_bt - x_bt
    if segments_bt is None:
        return before_bt, jnp.broadcast_to(through_bt[:, -1:], x_bt.shape)
    column_bt = jnp.broadcast_to(jnp.arange(x_bt.shape[1]), x_bt.shape)
    change_bt = segments_bt[:, 1:] != segments_bt[:, :-1]
    edge_b1 = jnp.ones((len(x_bt), 1), bool)
    first_bt = jnp.concatenate([edge_b1, change_bt], axis=1)
    last_bt = jnp.concatenate([change_bt, edge_b1], axis=1)
    start_bt = jax.lax.cummax(jnp.where(first_bt, column_bt, 0), axis=1)
    end = jnp.where(last_bt, column_bt, x_bt.shape[1] - 1)
    end_bt = jax.lax.cummin(end, axis=1, reverse=True)
    base_bt = jnp.take_along_axis(before_bt, start_bt, axis=1)
    return before_bt - base_bt, jnp.take_along_axis(through_bt, end_bt, axis=1) - base_bt


def sampled_opd(tokens: TokenLogprobs, weight_bt: jax.Array, terms: Terms) -> jax.Array:
    """Sum over tokens of -weight * A * log pi_theta: the sampled-token objective.

    Its gradient is that of weight * (log pi_theta - log pi_T)^2 / 2, Huber's form once clipped.
    With a ratio clip, log pi_theta gives way to r = pi_theta / pi_sampler, and a token that has
    moved by more than the clip in the direction of its advantage has no gradient.

    Args:
        weight_bt: final weights, 0 where masked (`token_weights`).
    """
    adv_bt = advantage(tokens, terms)
    student_bt, _, sampler_bt = tokens.clean()[:3]
    if terms.ratio_clip is None:
        return -jnp.sum(weight_bt * adv_bt * student_bt)
    r_bt = jnp.exp(student_bt - sampler_bt)
    bounded_bt = jnp.clip(r_bt, 1.0 - terms.ratio_clip, 1.0 + terms.ratio_clip)
    return -jnp.sum(weight_bt * jnp.minimum(r_bt * adv_bt, bounded_bt * adv_bt))


def topk_reverse_kl(
    student_bts: jax.Array, teacher_bts: jax.Array, rest_bt: jax.Array | None, mask_bt: jax.Array
) -> jax.Array:
    """KL(student || teacher) on the teacher's support, nats at each position, 0 where masked.

    Args:
        student_bts: the student's log-probs of the support, normalised over the whole vocabulary.
        teacher_bts: the teacher's.
        rest_bt: the teacher's probability of all other tokens, which are one more bucket (the
            tail); `None`: both sides are divided by their mass on the support instead. At
            support = vocabulary both are the exact reverse KL.
    """
    keep_bt1 = mask_bt[..., None]
    student_bts = jnp.where(keep_bt1, student_bts, 0.0)
    teacher_bts = jnp.where(keep_bt1, teacher_bts, 0.0)
    if rest_bt is not None:
        inside_bt = jnp.sum(jnp.exp(student_bts) * (student_bts - teacher_bts), axis=-1)
        return jnp.where(mask_bt, inside_bt + _tail_term(student_bts, rest_bt), 0.0)
    student_bts = jax.nn.log_softmax(student_bts, axis=-1)
    teacher_bts = jax.nn.log_softmax(teacher_bts, axis=-1)
    kl_bt = jnp.sum(jnp.exp(student_bts) * (student_bts - teacher_bts), axis=-1)
    return jnp.where(mask_bt, kl_bt, 0.0)


def _tail_term(student_bts: jax.Array, rest_bt: jax.Array) -> jax.Array:
    """q log(q / p) for the masses q, p outside the support; 0 where the student has none."""
    q_bt = 1.0 - jnp.sum(jnp.exp(student_bts), axis=-1)
    some_bt = q_bt > 0
    safe_bt = jnp.where(some_bt, q_bt, 1.0)
    ratio_bt = safe_bt / jnp.maximum(rest_bt, TAIL_FLOOR)
    return jnp.where(some_bt, safe_bt * jnp.log(ratio_bt), 0.0)


def diagnostics(tokens: TokenLogprobs, terms: Terms) -> Sums:
    """Sums over response tokens from which `averages` makes the logged figures."""
    student_bt, teacher_bt, sampler_bt = tokens.clean()[:3]
    gap_bt = _target(tokens, terms) - student_bt
    adv_bt = jnp.clip(gap_bt, -terms.tau, terms.tau)
    w_bt = jnp.where(tokens.mask_bt, jnp.exp(student_bt - sampler_bt), 0.0)
    parts = {
        "tokens": tokens.mask_bt,
        "half_squared_advantage": 0.5 * adv_bt**2,
        "reverse_kl_estimate": student_bt - teacher_bt,
        "abs_advantage": jnp.abs(adv_bt),
        "large_advantage": jnp.abs(adv_bt) > 1,
        "clipped": jnp.abs(gap_bt) > terms.tau,
        "w": w_bt,
        "w_spread": jnp.where(tokens.mask_bt, (w_bt - 1.0) ** 2, 0.0),  # about 1: near it, exact
    }
    if terms.ratio_clip is not None:
        moved_bt = jnp.abs(w_bt - 1.0) > terms.ratio_clip
        parts["ratio_clipped"] = tokens.mask_bt & moved_bt
    sums = {name: jnp.sum(x, dtype=jnp.float32) for name, x in parts.items()}
    return jax.tree.map(jax.lax.stop_gradient, sums)


def averages(sums: dict[str, float]) -> dict[str, float]:
    """Per-token means of added-up `sums`, with the standard deviation of w for its spread."""
    tokens = max(sums["tokens"], 1.0)
    means = {name: value / tokens for name, value in sums.items() if name != "tokens"}
    if "w_spread" in means:
        means["w_std"] = max(means.pop("w_spread") - (means["w"] - 1.0) ** 2, 0.0) ** 0.5
    return {**means, "tokens": sums["tokens"]}
