"""The top-k objective on rollouts that training never sees."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from opd_jax.core.mesh import put_batch
from opd_jax.data.collate import Scored, best_fit
from opd_jax.model.transformer import LanguageModel, Params
from opd_jax.train.guard import Figures
from opd_jax.train.sources import Packing
from opd_jax.train.step import Objective, batch_loss


@dataclass(frozen=True)
class TopKProbe:
    """Reverse KL on the teacher's support, nats a token, in micro-batches as training has them."""

    model: LanguageModel
    objective: Objective
    scored: Sequence[Scored]
    packing: Packing

    def __call__(self, params: Params) -> Figures:
        records = [s.record for s in self.scored]
        lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in records]
        rows = best_fit(lengths, self.packing.row_tokens)
        size = self.packing.micro_rows or self.packing.ways
        kl = tokens = 0.0
        for start in range(0, len(rows), size):
            batch = self.packing.batch(rows[start : start + size], self.scored, (1, size))
            given: Any = batch if self.model.mesh is None else put_batch(self.model.mesh, batch)
            found = jax.device_get(_sums(self.model, self.objective, params, given))
            kl, tokens = kl + float(found["topk_kl"]), tokens + float(found["tokens"])
        return {"heldout_topk_kl": kl / tokens}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(
    model: LanguageModel, objective: Objective, params: Params, batch: Any
) -> dict[str, jax.Array]:
    return batch_loss(model, objective, params, batch).sums
