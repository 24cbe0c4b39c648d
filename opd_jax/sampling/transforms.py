"""From logits to a token: temperature, top-k, top-p, min-p and greedy, with values for each row.

Every cut-off is a threshold on the scaled logits, so they combine by the largest threshold. The
thresholds of top-k and top-p are found by bisection, 32 passes over the vocabulary instead of a
sort. A transform that no request asks for leaves nothing in the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.config import SamplingConfig

DIRECT = 1024  # most tokens of a vocabulary that is drawn from in one go
BLOCKS = 128  # of a larger one; a power of two, so that a mesh that cuts the vocabulary cuts none


class Transform(NamedTuple):
    """How each row's distribution is bent before a token is drawn.

    `temperature=0` is greedy; `top_k=0`, `top_p=1`, `min_p=0` are off.
    """

    temperature_b: jax.Array
    top_k_b: jax.Array
    top_p_b: jax.Array
    min_p_b: jax.Array


class Uses(NamedTuple):
    """Which transforms occur among some requests; static in compiled programs."""

    noise: bool = True  # some request is not greedy
    temperature: bool = False  # some temperature is not 1
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    floor: bool = False  # some request has a least number of tokens

    @property
    def bends(self) -> bool:
        """Whether any row is drawn from another distribution than the model's own."""
        return self.temperature or self.top_k or self.top_p or self.min_p or self.floor


def uses_of(samplings: Iterable[SamplingConfig]) -> Uses:
    """What a program has to be able to do for these requests."""
    kinds = list(samplings)
    return Uses(
        noise=any(s.temperature > 0 for s in kinds),
        temperature=any(s.temperature != 1 for s in kinds),
        top_k=any(s.top_k > 0 for s in kinds),
        top_p=any(s.top_p < 1 for s in kinds),
        min_p=any(s.min_p > 0 for s in kinds),
        floor=any(s.min_new_tokens > 0 for s in kinds),
    )


def transform_of(samplings: Iterable[SamplingConfig]) -> Transform:
    """The rows' settings, as host arrays."""
    rows = [(s.temperature, s.top_k, s.top_p, s.min_p) for s in samplings]
    columns = zip(*rows, strict=True)
    kinds = (np.float32, np.int32, np.float32, np.float32)
    arrays: list[Any] = [np.array(x, kind) for x, kind in zip(columns, kinds, strict=True)]
    return Transform(*arrays)


def draw(keys_b: jax.Array, bent_bv: jax.Array, greedy_b: jax.Array, uses: Uses) -> jax.Array:
    """One token per row, int32: the largest of bent logits plus Gumbel noise, in float32.

    Of a large vocabulary first a block of tokens is drawn, by the sums of their probabilities, then
    a token of it: the same distribution, with noise for the blocks and for one block.

    Args:
        keys_b: one typed key per row; a row's token depends on its own key and logits alone.
        bent_bv: of `bend`.
        greedy_b: rows without noise.
    """
    if not uses.noise:
        return _argmax(bent_bv)
    b, v = bent_bv.shape
    if v <= DIRECT:
        return _argmax(bent_bv + _noise(keys_b, v, greedy_b, uses))
    padding = ((0, 0), (0, -v % BLOCKS))
    bent_bnm = jnp.pad(bent_bv, padding, constant_values=-jnp.inf).reshape(b, BLOCKS, -1)
    top_bn = jnp.max(bent_bnm, axis=-1)
    top_b1 = jnp.max(top_bn, axis=-1, keepdims=True)
    block_bn = jnp.log(jnp.sum(jnp.exp(bent_bnm - top_b1[..., None]), axis=-1))
    if uses.temperature:
        block_bn = jnp.where(greedy_b[:, None], top_bn, block_bn)
    outer_b, inner_b = (jax.vmap(jax.random.fold_in, (0, None))(keys_b, i) for i in (0, 1))
    block_b = _argmax(block_bn + _noise(outer_b, block_bn.shape[1], greedy_b, uses))
    noisy_bnm = bent_bnm + _noise(inner_b, bent_bnm.shape[2], greedy_b, uses)[:, None]
    # Not a gather of the block: a mesh that cuts the vocabulary would send it.
    mine_bn1 = (jnp.arange(BLOCKS)[None, :] == block_b[:, None])[..., None]
    return _argmax(jnp.where(mine_bn1, noisy_bnm, -jnp.inf).reshape(b, -1))


def _noise(keys_b: jax.Array, count: int, greedy_b: jax.Array, uses: Uses) -> jax.Array:
    """Gumbel noise [b, count], none in greedy rows."""
    noise_bv = jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32))(keys_b)
    if uses.temperature:
        noise_bv = jnp.where(greedy_b[:, None], 0.0, noise_bv)
    # The barrier keeps XLA from computing the noise again in each reduction that reads it.
    return jax.lax.optimization_barrier(noise_bv)


def _argmax(x_bv: jax.Array) -> jax.Array:
    """First index of the maximum; the last index where there is none (NaN).

    `jnp.argmax` takes seven times as long on CPUs, where XLA does not vectorise it.
    """
    last = x_bv.shape[-1] - 1
    index_bv = jax.lax.broadcasted_iota(jnp.int32, x_bv.shape, 1)
    top_b1 = jnp.max(x_bv, axis=-1, keepdims=True)
    return jnp.min(jnp.where(x_bv == top_b1, index_bv, last), axis=-1)


def bend(logits_bv: jax.Array, transform: Transform, uses: Uses) -> jax.Array:
    """Unnormalised log-probs of the distribution that tokens are drawn from; -inf where cut off.

    Top-p acts on what top-k left, renormalised; min-p on the whole. Tokens that tie at a threshold
    all stay. Of a greedy row only the maxima stay.
    """
    scaled_bv, top_b1 = logits_bv, jnp.max(logits_bv, axis=-1, keepdims=True)
    if uses.temperature:
        scaled_bv, top_b1 = scale(logits_bv, transform.temperature_b[:, None])
    floor_b1 = jnp.full_like(top_b1, -jnp.inf)
    if uses.top_k:
        floor_b1 = _top_k_threshold(scaled_bv, transform.top_k_b[:, None])
    if uses.top_p:
        floor_b1 = _top_p_threshold(scaled_bv, top_b1, floor_b1, transform.top_p_b[:, None])
    if uses.min_p:
        floor_b1 = jnp.maximum(floor_b1, top_b1 + jnp.log(transform.min_p_b[:, None]))
    if uses.top_k or uses.top_p or uses.min_p:
        scaled_bv = jnp.where(scaled_bv >= floor_b1, scaled_bv, -jnp.inf)
    return scaled_bv


def scale(logits_bv: jax.Array, temperature_b1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits over temperature, and their maximum.

    They are shifted first, so that a small temperature cannot overflow; rows at temperature 1 stay
    as they are.
    """
    top_b1 = jnp.max(logits_bv, axis=-1, keepdims=True)
    shifted_bv = logits_bv - top_b1
    cold = jnp.where(shifted_bv < 0, -jnp.inf, 0.0)
    divisor_b1 = jnp.where(temperature_b1 > 0, temperature_b1, 1.0)
    scaled_bv = jnp.where(temperature_b1 > 0, shifted_bv / divisor_b1, cold)
    plain_b1 = temperature_b1 == 1
    return jnp.where(plain_b1, logits_bv, scaled_bv), jnp.where(plain_b1, top_b1, 0.0)


def _top_k_threshold(scaled_bv: jax.Array, k_b1: jax.Array) -> jax.Array:
    """[b, 1]: the k-th largest entry of each row; -inf where k is 0."""

    def enough(least_b1: jax.Array) -> jax.Array:
        return jnp.sum(scaled_bv >= least_b1, axis=-1, keepdims=True) >= k_b1

    return jnp.where(k_b1 > 0, _largest(enough, k_b1.shape), -jnp.inf)


def _top_p_threshold(
    scaled_bv: jax.Array, top_b1: jax.Array, floor_b1: jax.Array, p_b1: jax.Array
) -> jax.Array:
    """[b, 1]: the least logit of the smallest set of likeliest tokens that holds mass `p`.

    Args:
        floor_b1: tokens below it have no mass.
    """
    mass_bv = jnp.where(scaled_bv >= floor_b1, jnp.exp(scaled_bv - top_b1), 0.0)
    wanted_b1 = p_b1 * jnp.sum(mass_bv, axis=-1, keepdims=True)

    def enough(least_b1: jax.Array) -> jax.Array:
        kept_bv = jnp.where(scaled_bv >= least_b1, mass_bv, 0.0)
        return jnp.sum(kept_bv, axis=-1, keepdims=True) >= wanted_b1

    # The likeliest stays even where `p` is too small for float32, and no mass at all is wanted.
    found_b1 = jnp.clip(_largest(enough, p_b1.shape), floor_b1, top_b1)
    return jnp.where(p_b1 < 1, found_b1, floor_b1)


_SIGN = -(2**31)
_NEGATIVE_INFINITY = -0x7F800001  # its place among the floats, see `_float_at`


def _largest(holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The largest float32 for which a property holds that holds for all smaller ones.

    Bisection over the order of the floats: 32 steps find it exactly. -inf where it never holds.
    """

    def step(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # it holds at low, not at high
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        good = holds(_float_at(middle))
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    low = jnp.full(shape, _NEGATIVE_INFINITY, jnp.int32)
    high = jnp.full(shape, 0x7F800000, jnp.int32)  # +inf
    low, _ = jax.lax.fori_loop(0, 32, step, (low, high))
    return _float_at(low)


def _float_at(place: jax.Array) -> jax.Array:
    """The float32 at a place in their order: 0 at 0, and integers as the bits of positive ones."""
    bits = jnp.where(place >= 0, place, ~place ^ jnp.int32(_SIGN))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
