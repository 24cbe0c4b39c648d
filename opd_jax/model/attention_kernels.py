"""Attention by the fused kernels of TPUs and GPUs: no [t, t] array, forward or backward.

All have the semantics of `attention.attend`: causal within a row and within a segment, grouped
queries, scale head_dim ** -0.5. A kernel knows nothing of sharding: each device runs it on its own
rows and heads, under `shard_map`. Where a kernel wants whole blocks of tokens, padding goes after
the last token, where no query reads it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.gpu import attention as triton
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opd_jax.core.mesh import axis_size
from opd_jax.model.attention import NO_SEGMENT, SAVED, pad_time
from opd_jax.model.attention_mesh import (
    Inputs,
    mirrored,
    mirrored_halves,
    on_each_device,
    whole_rows,
)

TPU_LANES = 128
SPLASH_BLOCK = 512
TRITON_SMALLEST_BLOCK = 16  # of a side of a Triton matrix product


def splash_attention(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    segments_bt: jax.Array | None,
    mesh: Mesh | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The Pallas kernel of TPUs, "splash": it skips the blocks above the diagonal.

    Args:
        q_btnh: queries; query head n reads kv head n // (n_heads // kv_heads).
        k_btkh: keys of the same tokens.
        v_btkh: values of the same tokens.
        segments_bt: int32; tokens attend within their segment. `None`: one segment per row.
        mesh: rows go over its axes of `batch`, heads over those of `heads`, the tokens of a row
            over that of `time`; `None`: one device.
        interpret: run the kernel step by step on any platform, for tests.

    Returns:
        [b, t, n, h] in the dtype of `q_btnh`.

    Raises:
        ConfigError: rows, tokens, heads or kv heads are not divisible by the mesh.
    """
    inputs = Inputs(q_btnh, k_btkh, v_btkh, segments_bt)
    if mesh is not None and axis_size(mesh, "time") > 1:
        return _splash_of_parts(inputs, mesh, interpret=interpret)
    return on_each_device(functools.partial(_splash_local, interpret=interpret), inputs, mesh)


def triton_attention(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    segments_bt: jax.Array | None,
    mesh: Mesh | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The Pallas-Triton kernel of GPUs. Arguments, result and errors of `splash_attention`.

    But its queries and keys are of the same tokens: the mesh does not cut those of a row.
    """
    local = functools.partial(_triton_local, interpret=interpret)
    return on_each_device(local, Inputs(q_btnh, k_btkh, v_btkh, segments_bt), mesh)


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def _splash_local(inputs: Inputs, *, interpret: bool) -> jax.Array:
    q, k, v, segments = inputs
    _, t, n, h = q.shape
    block = splash_block(t)
    head_multiple = TPU_LANES if h > TPU_LANES else 1  # the kernel pads narrower heads itself
    q, k, v = (_pad(_pad(x, 1, block), 3, head_multiple) for x in (q * h**-0.5, k, v))
    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    padded = q.shape[2]
    kernel = _splash_kernel(masks.CausalMask((padded, padded)), n, block, interpret=interpret)
    ids = None
    if segments is not None:
        ids_bt = _pad(segments, 1, block)
        ids = splash.SegmentIds(ids_bt, ids_bt)
    out: Any = jax.vmap(kernel)(q, k, v, ids)  # typed as if it could return residuals
    return jnp.moveaxis(out, 2, 1)[:, :t, :, :h]


def _splash_kernel(
    mask: masks.CausalMask, heads: int, block: int, *, parts: int = 1, interpret: bool
) -> splash.SplashAttentionKernel:
    sizes = splash.BlockSizes(
        **dict.fromkeys(
            ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"),
            block,
        ),
        # The fused backward kernel writes dq once per kv block: t / block times its memory.
        use_fused_bwd_kernel=False,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )


def _splash_of_parts(inputs: Inputs, mesh: Mesh, *, interpret: bool) -> jax.Array:
    """Rows whose tokens are cut: each device has the mask of the queries that it computes."""
    parts = axis_size(mesh, "time")
    b, t, n, _ = inputs.q_btnh.shape
    block = splash_block(-(-t // parts // 2))
    half = -(-t // parts // (2 * block)) * block
    places = mirrored_halves(parts).reshape(-1, 1) * half + np.arange(half)
    mask = masks.CausalMask((places.size, places.size))
    mask.q_sequence = places.reshape(-1).astype(np.int32)
    heads = n // axis_size(mesh, "heads")
    kernel = _splash_kernel(mask, heads, block, parts=parts, interpret=interpret)
    spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, "context")))
    if inputs.segments_bt is None:
        inputs = inputs._replace(segments_bt=jnp.zeros((b, t), jnp.int32))
    local = functools.partial(_splash_part, multiple=2 * block)
    return on_each_device(local, inputs, mesh, (kernel, spec))


def _splash_part(inputs: Inputs, kernel: Any, *, multiple: int) -> jax.Array:
    q, k, v, segments = inputs
    _, t, _, h = q.shape
    head_multiple = TPU_LANES if h > TPU_LANES else 1
    q, k, v = (_pad(pad_time(x, multiple), 3, head_multiple) for x in (q * h**-0.5, k, v))
    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    ids_bt = pad_time(cast(jax.Array, segments), multiple, NO_SEGMENT)
    ids = splash.SegmentIds(mirrored(ids_bt, "context", 1), whole_rows(ids_bt, "context", 1))
    k, v = (whole_rows(x, "context", 2) for x in (k, v))
    out: Any = jax.vmap(kernel)(mirrored(q, "context", 2), k, v, ids)
    return jnp.moveaxis(mirrored(out, "context", 2), 2, 1)[:, :t, :, :h]


def splash_block(t: int) -> int:
    """Tokens per block: whole lanes, and a row is padded to a multiple of it."""
    return min(SPLASH_BLOCK, t + -t % TPU_LANES)


def _triton_local(inputs: Inputs, *, interpret: bool) -> jax.Array:
    q, k, v, segments = inputs
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    sizes = triton_blocks(t, h, q.dtype.itemsize)
    longest = max(sizes.block_q, sizes.block_k)
    q, k, v = (_pad(x, 1, longest) for x in (q, k, v))
    if segments is not None:
        segments = _pad(segments, 1, longest)
    q_btkgh = q.reshape(b, -1, kv_heads, n // kv_heads, h)
    call = _TritonCall(h**-0.5, sizes, interpret)

    def group(q_btkh: jax.Array) -> jax.Array:
        out = _triton(q_btkh, k, v, segments, call)
        return cast(jax.Array, out)  # `custom_vjp` hides the type

    # Over the query heads of a group by vmap: keys and values are read in place, not repeated.
    out_btkgh = jax.vmap(group, in_axes=3, out_axes=3)(q_btkgh)
    return out_btkgh.reshape(b, -1, n, h)[:, :t]


class _TritonCall(NamedTuple):
    """The kernel's static arguments."""

    scale: float
    sizes: triton.BlockSizes
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _triton(
    q_btkh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    segments_bt: jax.Array | None,
    call: _TritonCall,
) -> jax.Array:
    """`triton.mha` with its residuals named, so that a `jax.checkpoint` policy can keep them."""
    return _triton_fwd(q_btkh, k_btkh, v_btkh, segments_bt, call)[0]


def _triton_fwd(
    q_btkh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    segments_bt: jax.Array | None,
    call: _TritonCall,
) -> tuple[jax.Array, Any]:
    both: Any = triton.mha(
        q_btkh,
        k_btkh,
        v_btkh,
        segments_bt,
        sm_scale=call.scale,
        causal=True,
        block_sizes=call.sizes,
        interpret=call.interpret,
        return_residuals=True,
    )
    named = [checkpoint_name(x, SAVED) for x in (q_btkh, k_btkh, v_btkh, *both)]
    return named[3], (*named[:3], segments_bt, *named[3:])


def _triton_bwd(call: _TritonCall, saved: Any, grad_btkh: jax.Array) -> tuple[Any, ...]:
    # The module has no public name for it.
    return triton._mha_backward(  # pyright: ignore[reportPrivateUsage]
        *(call.scale, True, call.sizes, "triton", None, 2, None, call.interpret, False, False),
        saved,
        grad_btkh,
    )


_triton.defvjp(_triton_fwd, _triton_bwd)


def triton_blocks(t: int, head_dim: int, itemsize: int) -> triton.BlockSizes:
    """Block sizes whose tiles fit the shared memory of an SM (Ampere and later).

    They are safe, not tuned. The backward kernel holds five tiles at a time, hence its smaller
    blocks; its query and kv blocks must be equal.
    """
    row_bytes = max(head_dim, 64) * itemsize
    short = max(TRITON_SMALLEST_BLOCK, 1 << (t - 1).bit_length())
    forward = min(128 if row_bytes <= 128 else 64 if row_bytes <= 256 else 32, short)
    backward = min(64 if row_bytes <= 128 else 32, short)
    return triton.BlockSizes(
        block_q=forward,
        block_k=forward,
        block_q_dkv=backward,
        block_kv_dkv=backward,
        block_q_dq=backward,
        block_kv_dq=backward,
    )
