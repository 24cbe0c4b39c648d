"""Attention of whole rows: which implementation runs follows platform, shape and wish."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from opd_jax.core.mesh import axis_size, is_one_cpu, platform_of
from opd_jax.errors import ConfigError, MeshError
from opd_jax.model.attention import attend, attend_by_row, attend_chunked
from opd_jax.model.attention_mesh import Inputs, on_each_device

KERNEL_OF = {"tpu": "splash", "gpu": "triton"}
RUNS_ON = {"splash": "tpu", "triton": "gpu"}
SHORTEST_FOR_KERNEL = 128
"""Tokens: the kernels compute whole blocks of about this many, however few are there."""
LARGEST_TRITON_HEAD = 128


class AttentionCase(NamedTuple):
    """What is to be computed: global sizes, as the model sees them."""

    platform: str  # "cpu", "gpu" or "tpu"
    dtype: str
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    packed: bool
    mesh: Mesh | None


def attend_rows(
    wanted: str,
    mesh: Mesh | None,
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    segments_bt: jax.Array | None,
) -> jax.Array:
    """`attention.attend` by the implementation that `choose_attention` gives.

    Args:
        wanted: `model.attention`.

    Raises:
        ConfigError: the wanted one cannot do this case.
    """
    b, t, n, h = q_btnh.shape
    case = AttentionCase(
        platform_of(mesh),
        q_btnh.dtype.name,
        b,
        t,
        n,
        k_btkh.shape[2],
        h,
        packed=segments_bt is not None,
        mesh=mesh,
    )
    name = choose_attention(wanted, case)
    if name == "xla":
        return attend(q_btnh, k_btkh, v_btkh, segments_bt)
    if name == "chunked":
        if is_one_cpu(mesh):
            return attend_by_row(q_btnh, k_btkh, v_btkh, segments_bt)
        if mesh is None or axis_size(mesh, "time") == 1:
            return attend_chunked(q_btnh, k_btkh, v_btkh, segments_bt)

        def tiles(mine: Inputs) -> jax.Array:
            return attend_chunked(*mine, axis="context")

        return on_each_device(tiles, Inputs(q_btnh, k_btkh, v_btkh, segments_bt), mesh)
    from opd_jax.model import attention_kernels  # Pallas takes a second to import

    kernels = {
        "splash": attention_kernels.splash_attention,
        "triton": attention_kernels.triton_attention,
    }
    return kernels[name](q_btnh, k_btkh, v_btkh, segments_bt, mesh)


def choose_attention(wanted: str, case: AttentionCase) -> str:
    """The implementation for whole sequences (a single new token has `attend_cached`).

    | name | what | chosen by `auto` for |
    |---|---|---|
    | `splash` | Pallas kernel of TPUs | TPU, from 128 tokens of a row on a device |
    | `triton` | Pallas-Triton kernel of GPUs | GPU, from 128 tokens, heads up to 128 |
    | `chunked` | tiles of scores, plain XLA; on one CPU row by row | the rest |
    | `xla` | all scores at once, plain XLA | nothing: on CPU it takes two to three times as long |

    A kernel runs per device on its rows and heads; `auto` leaves what the mesh does not divide to
    `chunked`. Where `mesh.context` cuts the tokens of rows, `splash` and `chunked` give every
    device as much to compute; `triton` cannot, and GPUs take `chunked`.

    Args:
        wanted: `model.attention`: "auto", or one of the names.

    Raises:
        ConfigError: the wanted one cannot do this case.
    """
    if wanted == "auto":
        return _best(case)
    if problem := _problem(wanted, case):
        anywhere = case.mesh is None or _problem(wanted, case._replace(mesh=None))
        kind = ConfigError if anywhere else MeshError
        raise kind(f"model.attention: '{wanted}' {problem}; set it to '{_best(case)}'")
    return wanted


def _ways(case: AttentionCase, logical: str) -> int:
    return 1 if case.mesh is None else axis_size(case.mesh, logical)


def _best(case: AttentionCase) -> str:
    kernel = KERNEL_OF.get(case.platform)
    tokens = case.tokens // _ways(case, "time")
    if kernel and tokens >= SHORTEST_FOR_KERNEL and _problem(kernel, case) is None:
        return kernel
    return "chunked"


def _problem(name: str, case: AttentionCase) -> str | None:
    """Why an implementation cannot do this case, as the rest of a sentence about it."""
    if name not in RUNS_ON:
        return None
    if case.platform != RUNS_ON[name]:
        return f"runs on {RUNS_ON[name]} only, and the devices are {case.platform}"
    sizes = {"batch": case.batch, "time": case.tokens}
    sizes |= {"heads": case.heads, "kv_heads": case.kv_heads}
    for logical, size in sizes.items():
        ways = _ways(case, logical)
        if size % ways:
            return f"cuts '{logical}'={size} into {ways} equal parts on this mesh, which fails"
    if name == "triton" and _ways(case, "time") > 1:
        return "reads whole rows, and mesh.context cuts them"
    if name == "triton" and case.head_dim > LARGEST_TRITON_HEAD:
        return f"takes heads up to {LARGEST_TRITON_HEAD}, not {case.head_dim}"
    return None
