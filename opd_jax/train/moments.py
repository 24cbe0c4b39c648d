"""Adam whose moments are stored in few bits, rounded at random: on average nothing is lost.

To nearest, a moment would stand still wherever a step changes it by less than half a code: with
`b2` = 0.999 a bfloat16 second moment would never fall. What is drawn depends on the step and the
parameter alone.

`int8` cuts the last axis into blocks of at most 256 values with a scale each: codes have their
parameter's shape and sharding, scales that of the other axes. Source: Dettmers et al., 8-bit
Optimizers via Block-wise Quantization, arXiv 2110.02861 (the blocks; the codes here are formulas,
not tables: cubes for the first moment, powers of two for the root of the second).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.core.rng import key_for

LARGEST_BLOCK, SMALLEST_CUT, MOST_CUTS = 256, 64, 16
OCTAVES = 20  # from the smallest code of the second moment's root to the block's largest
Parts = tuple[jax.Array, ...]
"""One stored moment: the values, or codes and scales."""
Encode = Callable[[jax.Array, jax.Array], Parts]
"""From float32 values and as many numbers in [0, 1) to what is stored."""


class Storage(NamedTuple):
    """How moments are kept; the second one is never below 0."""

    encode_first: Encode
    decode_first: Callable[..., jax.Array]
    encode_second: Encode
    decode_second: Callable[..., jax.Array]


class MomentState(NamedTuple):
    """Of `scale_by_adam`: each moment's parts are trees like the parameters."""

    step: jax.Array
    first: tuple[Any, ...]
    second: tuple[Any, ...]


def scale_by_adam(
    b1: float, b2: float, eps: float, kind: Literal["bfloat16", "int8"]
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments stored as `kind`; the arithmetic is float32."""
    storage = STORAGES[kind]

    def init(params: Any) -> MomentState:
        def parts(encode: Encode) -> tuple[Any, ...]:
            def one(part: int, param: jax.Array) -> jax.Array:
                zero = jnp.zeros(param.shape, jnp.float32)
                return encode(zero, zero)[part]

            count = 2 if kind == "int8" else 1
            return tuple(jax.tree.map(functools.partial(one, i), params) for i in range(count))

        count = jnp.zeros((), jnp.int32)
        return MomentState(count, parts(storage.encode_first), parts(storage.encode_second))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MomentState]:
        del params
        step = state.step + 1
        grads, tree = jax.tree.flatten(updates, is_leaf=_left_out)
        old = [zip(*map(tree.flatten_up_to, parts), strict=True) for parts in state[1:]]
        columns: list[tuple[Any, Parts, Parts]] = []
        for i, (grad, first, second) in enumerate(zip(grads, *old, strict=True)):
            if _left_out(grad):  # it has its number all the same, and others their noise
                columns.append((grad, first, second))
                continue
            g = grad.astype(jnp.float32)
            m = b1 * storage.decode_first(*first) + (1 - b1) * g
            v = b2 * storage.decode_second(*second) + (1 - b2) * g * g
            m_hat, v_hat = m / (1 - b1**step), v / (1 - b2**step)
            noise = _noise(jax.random.fold_in(key_for(0, "moments", i), step), g.shape)
            new = storage.encode_first(m, noise[0]), storage.encode_second(v, noise[1])
            columns.append((m_hat / (jnp.sqrt(v_hat) + eps), *new))
        direction, *moments = zip(*columns, strict=True)
        first, second = (
            tuple(tree.unflatten(part) for part in zip(*moment, strict=True)) for moment in moments
        )
        return tree.unflatten(direction), MomentState(step, first, second)

    return optax.GradientTransformation(init, update)


def _noise(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Two arrays of multiples of 2^-16 in [0, 1): the halves of one draw, which is the costly part.

    The bits of an entry do not depend on how the array is cut over devices.
    """
    bits = jax.random.bits(key, shape, jnp.uint32)
    low, high = bits & 0xFFFF, bits >> 16
    return low.astype(jnp.float32) * 2**-16, high.astype(jnp.float32) * 2**-16


def _to_bfloat16(x: jax.Array, noise: jax.Array) -> Parts:
    """Up with the probability that keeps the mean: noise in the bits that are then cut off."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise * 2**16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return (cut.astype(jnp.bfloat16),)


def _from_bfloat16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def block_length(size: int) -> int:
    """Values of a block: a divisor of the axis, at most 256.

    Their number is a multiple of as much of 16 as leaves 64 values, so that a mesh which cuts the
    axis cuts between blocks; it follows from the size alone, and a checkpoint fits any mesh.
    """
    cuts = math.gcd(size, MOST_CUTS)
    while cuts > 1 and size // cuts < SMALLEST_CUT:
        cuts //= 2
    largest = min(size // cuts, LARGEST_BLOCK)
    return next(n for n in range(largest, 0, -1) if size // cuts % n == 0)


def _blocks(x: jax.Array) -> jax.Array:
    """[..., x] -> [..., blocks, values of a block]."""
    block = block_length(x.shape[-1])
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """|x| in blocks, divided by each block's largest, and the largest ones [..., blocks, 1]."""
    size = jnp.abs(_blocks(x))
    scale = jnp.max(size, axis=-1, keepdims=True)
    return size / jnp.where(scale > 0, scale, 1), scale


def _rounded(
    x: jax.Array,
    code: jax.Array,
    noise: jax.Array,
    value: Callable[[jax.Array], jax.Array],
    top: int,
) -> jax.Array:
    """The code below `x` or the next, by chance such that the mean of their values is `x`."""
    low = jnp.clip(jnp.floor(code), 0, top - 1)
    below, above = value(low), value(low + 1)
    return low + (noise * (above - below) < x - below)


def _cube(code: jax.Array) -> jax.Array:
    """In [0, 1] of a code from 0 to 127: 2.4% apart at the block's largest, 24% at a thousandth."""
    return (code / 127) ** 3


def _power(code: jax.Array) -> jax.Array:
    """In (0, 1] of a code from 0 to 255: 11% apart, for a root 5.6%."""
    return jnp.exp2((code - 255) * (2 * OCTAVES / 255))


def _first_to_int8(x: jax.Array, noise: jax.Array) -> Parts:
    size, scale = _scaled(x)
    code = _rounded(size, 127 * jnp.cbrt(size), _blocks(noise), _cube, 127)
    return (jnp.sign(x) * code.reshape(x.shape)).astype(jnp.int8), scale[..., 0]


def _first_from_int8(code: jax.Array, scale: jax.Array) -> jax.Array:
    blocks = _blocks(code.astype(jnp.float32))
    value = jnp.sign(blocks) * _cube(jnp.abs(blocks)) * scale[..., None]
    return value.reshape(code.shape)


def _second_to_int8(x: jax.Array, noise: jax.Array) -> Parts:
    """Values below the smallest code's become that: steps get smaller by it, never larger."""
    size, scale = _scaled(x)
    log = jnp.log2(jnp.maximum(size, 2.0 ** (-2 * OCTAVES)))
    code = _rounded(size, 255 + log * (255 / (2 * OCTAVES)), _blocks(noise), _power, 255)
    return code.reshape(x.shape).astype(jnp.uint8), scale[..., 0]


def _second_from_int8(code: jax.Array, scale: jax.Array) -> jax.Array:
    return (_power(_blocks(code.astype(jnp.float32))) * scale[..., None]).reshape(code.shape)


def _left_out(node: object) -> bool:
    return isinstance(node, optax.MaskedNode)


STORAGES = {
    "bfloat16": Storage(_to_bfloat16, _from_bfloat16, _to_bfloat16, _from_bfloat16),
    "int8": Storage(_first_to_int8, _first_from_int8, _second_to_int8, _second_from_int8),
}


def sharding_like(
    shape: tuple[int, ...], like: NamedSharding, kind: str | None = None
) -> NamedSharding:
    """A parameter's sharding for an array of as many axes, whole along axes it does not divide.

    Args:
        kind: of the memory that the array lies in; `None`: the device's.
    """
    spec = [*like.spec, *[None] * (len(shape) - len(like.spec))]
    ways = [_ways(like, names) for names in spec]
    kept = [names if n % w == 0 else None for n, names, w in zip(shape, spec, ways, strict=True)]
    return NamedSharding(like.mesh, PartitionSpec(*kept), memory_kind=kind)


def _ways(sharding: NamedSharding, names: Any) -> int:
    axes = () if names is None else (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[axis] for axis in axes)
