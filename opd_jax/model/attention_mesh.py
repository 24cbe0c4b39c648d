"""Attention on a mesh: each device computes its own rows, heads and queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from opd_jax.core.mesh import sharding_for


class Inputs(NamedTuple):
    """What every implementation takes."""

    q_btnh: jax.Array
    k_btkh: jax.Array
    v_btkh: jax.Array
    segments_bt: jax.Array | None


def on_each_device(
    local: Callable[[Inputs], jax.Array], inputs: Inputs, mesh: Mesh | None
) -> jax.Array:
    """`local` of each device's part of the inputs, under `shard_map`.

    Raises:
        ConfigError: the mesh does not divide rows, tokens, heads or kv heads.
    """
    if mesh is None or mesh.size == 1:
        return local(inputs)
    kv_axes = ("batch", "time", "kv_heads", "head_dim")
    axes = (("batch", "time", "heads", "head_dim"), kv_axes, kv_axes, ("batch", "time"))
    specs = tuple(
        PartitionSpec()  # stands for no array
        if x is None
        else sharding_for(mesh, logical, x.shape, f"attention.{name}").spec
        for name, x, logical in zip(Inputs._fields, inputs, axes, strict=True)
    )

    def run(*mine: Any) -> jax.Array:
        return local(Inputs(*mine))

    # Pallas calls do not say over which mesh axes their results vary, so that check is off.
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(*inputs)
