"""A program that is to be compiled, and what is known of it before."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.core.mesh import batch_sharding
from opd_jax.fit.results import Bytes
from opd_jax.fit.setup import Setup
from opd_jax.model.transformer import LanguageModel
from opd_jax.train.meter import active_weights


@dataclass(frozen=True)
class Draft:
    """One program of a config; fields that `ProgramReport` has too mean the same.

    Attributes:
        lower: traces it for the mesh.
        count: its FLOPs, over all devices.
        parts: arguments that have names, bytes of a device; taken once it has been lowered.
        passing: temporaries that have names.
        beside: as `parts`.
        host: of a device's state, what lies in the host's memory and visits the device.
        loops: trips of the outermost loop whose end XLA does not know.
    """

    name: str
    what: str
    stage: str
    runs: float
    tokens: int
    model_flops: float
    lower: Callable[[], Any]
    count: Callable[[], float]
    parts: Callable[[], Bytes]
    passing: Bytes = field(default_factory=dict)
    beside: Callable[[], Bytes] = dict
    loops: int = 1
    host: Bytes = field(default_factory=dict)


def device_bytes(tree: Any) -> int:
    """Bytes on one device of abstract arrays with shardings."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _bytes(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize


def rows_of(setup: Setup, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array of a batch, cut over the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(setup.mesh, len(shape)))


def on_one(model: LanguageModel) -> LanguageModel:
    """The same model without a mesh, to count what it computes.

    Attention kernels hide their products; the chunked one computes the same tiles.
    """
    return dataclasses.replace(model, mesh=None, attention="chunked")


def forward_flops(model: LanguageModel, tokens: float, headed: float, context: float) -> float:
    """What a forward pass asks for: 2 for each weight and token, 4 for each head, head dimension,
    layer and pair of tokens.

    Args:
        headed: tokens that meet the output head.
        context: for all tokens together, how many tokens each attends to.
    """
    arch = model.arch
    head = arch.vocab_size * arch.embed_dim
    pairs = arch.num_layers * arch.num_heads * arch.head_dim * context
    return 2.0 * (active_weights(model) - head) * tokens + 2.0 * head * headed + 4.0 * pairs


def context_of(length: float) -> float:
    """For all tokens of a sequence together, how many tokens each attends to."""
    return length * (length + 1) / 2
