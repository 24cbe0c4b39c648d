"""The likeliest tokens of every position, for a teacher whose distribution is stored."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.algo.chunks import cut_time, join_time
from opd_jax.algo.logprobs import pick
from opd_jax.algo.padding import without_padding
from opd_jax.core.mesh import axis_size, constrain

CHUNK_TOKENS = 1024


class TopK(NamedTuple):
    """The likeliest tokens of a distribution, likeliest first."""

    logprob_bt: jax.Array  # float32, of the target
    entropy_bt: jax.Array  # float32, nats
    ids_btk: jax.Array  # int32
    logprob_btk: jax.Array  # float32, normalised over the whole vocabulary


def top_k_logprobs(
    hidden_btd: jax.Array,
    head_vd: jax.Array,
    ids_bt: jax.Array,
    k: int,
    mesh: Mesh | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    padded_from: int | None = None,
) -> TopK:
    """The target's log-prob, the `k` likeliest tokens and the entropy, in one pass. Forward only.

    Each piece of a vocabulary that the mesh cuts finds its own `k`; only those travel.
    """
    shards = 1 if mesh is None else axis_size(mesh, "vocab")
    # Its rows whole, once: each chunk of tokens reads all of them.
    head_vd = constrain(head_vd.astype(hidden_btd.dtype), mesh, ("vocab", "replicated"), "head")
    head_nvd = head_vd.reshape(shards, -1, head_vd.shape[-1])
    b, t, _ = hidden_btd.shape
    chunk = min(t, max(1, chunk_tokens // b))

    def body(_: None, xs: tuple[jax.Array, jax.Array]) -> tuple[None, TopK]:
        hidden, ids = xs
        logits_bcnv = jnp.einsum(
            "bcd,nvd->bcnv", hidden, head_nvd, preferred_element_type=jnp.float32
        )
        logits_bcnv = without_padding(logits_bcnv, (2, 3), padded_from)
        logprob_bcnv = jax.nn.log_softmax(logits_bcnv, axis=(-2, -1))
        entropy_bc = -jnp.sum(jnp.exp(logprob_bcnv) * logprob_bcnv, axis=(-2, -1))
        target_bcn = pick(logprob_bcnv, ids[..., None], 0, head_nvd.shape[1])[..., 0]
        values, top_ids = _top_k_of_pieces(logprob_bcnv, k)
        return None, TopK(jnp.sum(target_bcn, axis=-1), entropy_bc, top_ids, values)

    _, out = jax.lax.scan(body, None, (cut_time(hidden_btd, chunk), cut_time(ids_bt, chunk)))
    return jax.tree.map(lambda x: join_time(x, t), out)


def _top_k_of_pieces(logprob_bcnv: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Values and ids [b, c, k], likeliest first; equal ones in the order of their ids."""
    b, c, n, v = logprob_bcnv.shape
    values, ids = jax.lax.top_k(logprob_bcnv, min(k, v))
    ids = ids.astype(jnp.int32) + (jnp.arange(n, dtype=jnp.int32) * v)[None, None, :, None]
    values, place = jax.lax.top_k(values.reshape(b, c, -1), k)
    return values, jnp.take_along_axis(ids.reshape(b, c, -1), place, axis=-1)
