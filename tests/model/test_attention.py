"""The plain forms of attention against the oracle, and their memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from opd_jax.model.attention import attend, attend_by_row, attend_chunked


def inputs(t, kv_heads=2, h=8):
    rng = np.random.default_rng(t)
    q, k, v, grad = (
        rng.normal(size=(2, t, n, h)).astype(np.float32) for n in (4, kv_heads, kv_heads, 4)
    )
    segments = np.sort(rng.integers(0, 3, (2, t)), axis=1).astype(np.int32)
    return q, k, v, segments, grad


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("form", "t"),
    [
        (attend, 39),
        (functools.partial(attend_chunked, block=16), 39),  # no whole number of blocks
        (functools.partial(attend_chunked, block=16), 48),
        (attend_chunked, 39),  # one block
        (functools.partial(attend_by_row, block=8), 39),
    ],
    ids=["whole", "ragged tiles", "tiles", "one tile", "row by row"],
)
def test_packed_rows_forward_and_backward(form, t, kv_heads):
    q, k, v, segments, grad = given = inputs(t, kv_heads)

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: form(q, k, v, segments), q, k, v)
        return out, *pull(grad)

    got = run(q, k, v)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, oracles.attention(*given), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_no_segments_are_one_segment():
    q, k, v, segments, _ = inputs(40)
    for form in (attend, functools.partial(attend_chunked, block=16), attend_by_row):
        np.testing.assert_allclose(
            form(q, k, v, None), form(q, k, v, np.zeros_like(segments)), atol=1e-6
        )


def test_a_row_by_itself_computes_no_tile_of_other_segments():
    """NaN in the values of the first segment reaches no block of the others, padding's neither."""
    q, k, v, _, _ = inputs(48)
    segments = np.repeat([1, 7, 9, 0], [16, 8, 16, 8])[None].repeat(2, axis=0)
    out = attend_by_row(q, k, np.where(segments[..., None, None] == 1, np.nan, v), segments, 8)
    assert np.isnan(out[:, :16]).all()
    np.testing.assert_allclose(out[:, 16:], attend(q, k, v, segments)[:, 16:], atol=1e-6)
    mixed = np.tile([5, 2, 2, 9], 12)[None].repeat(2, axis=0)  # in no order: nothing is left out
    np.testing.assert_allclose(attend_by_row(q, k, v, mixed, 8), attend(q, k, v, mixed), atol=1e-6)


def test_16k_tokens_need_no_square():
    """Forward and backward together stay below the scores of a single head."""
    t = 16384
    shape = jax.ShapeDtypeStruct((1, t, 2, 64), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(attend_chunked(q, k, v, None) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * t * t // 8
