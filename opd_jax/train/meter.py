"""What a step costs: speed, padding, waiting for data, memory, and how much of the peak is used."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from opd_jax.core.peak import total_peak_flops
from opd_jax.model.transformer import LanguageModel


class Load(NamedTuple):
    """The work in a batch, counted on the host.

    Attributes:
        tokens: input tokens that are no padding.
        computed: tokens of all micro-batches that are not empty.
        context: for all tokens together, how many tokens each attends to.
    """

    tokens: int
    computed: int
    context: int

    @staticmethod
    def of(batch: Mapping[str, np.ndarray], pieces: int) -> Load:
        """The load of a packed batch that a step cuts into `pieces` micro-batches."""
        segments_bt = batch["segments_bt"]
        real_bt = segments_bt > 0
        used = sum(bool(batch["mask_bt"][i::pieces].any()) for i in range(pieces))
        context = int((batch["positions_bt"][real_bt] + 1).sum())
        return Load(int(real_bt.sum()), segments_bt.size * used // pieces, context)


def model_flops(model: LanguageModel, load: Load, *, frozen: bool = False) -> float:
    """FLOPs of a forward and backward pass: 6 for each weight and token, 12 for each head, head
    dimension, layer and pair of tokens. Nothing that is computed again counts. Weights that are
    `frozen` have no gradient: 4.

    Source: Chowdhery et al., PaLM (arXiv 2204.02311), appendix B; causal attention counted once.
    """
    arch = model.arch
    pairs = arch.num_layers * arch.num_heads * arch.head_dim * load.context
    return (4.0 if frozen else 6.0) * active_weights(model) * load.tokens + 12.0 * pairs


def active_weights(model: LanguageModel) -> int:
    """Weights that multiply a token: the head (a tied one too), and of the experts the chosen."""
    arch, total = model.arch, 0
    leaves, _ = jax.tree_util.tree_flatten_with_path(model.abstract())
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name == "embed" and not arch.tie_embeddings:
            continue
        size = int(np.prod(leaf.shape))
        if name.startswith("moe/") and name != "moe/router":
            size = size * arch.experts_per_token // arch.num_experts
        total += size
    return total


class Meter:
    """Times the steps of a run; figures of a step come when the next one has begun."""

    def __init__(self, model: LanguageModel, *, frozen: bool = False) -> None:
        self._model, self._frozen = model, frozen
        self._peak = total_peak_flops()
        self._last = time.monotonic()
        self._waited = 0.0

    def waited(self, seconds: float) -> None:
        """So long did the step wait for its batch."""
        self._waited += seconds

    def pause(self) -> None:
        """What passed since the last step is no part of the next: a checkpoint, an evaluation."""
        self._last, self._waited = time.monotonic(), 0.0

    def figures(self, load: Load, target_tokens: float) -> dict[str, Any]:
        """Of the step that is over now."""
        now = time.monotonic()
        seconds = max(now - self._last, 1e-9)
        waited = min(self._waited / seconds, 1.0)
        self._last, self._waited = now, 0.0
        found = {
            "step_seconds": seconds,
            "tokens_per_second": target_tokens / seconds,
            "padding": 1.0 - load.tokens / max(load.computed, 1),
            "data_wait": waited,
            "memory_gib": memory_gib(),
        }
        if self._peak is not None:
            flops = model_flops(self._model, load, frozen=self._frozen)
            found["mfu"] = flops / seconds / self._peak
        return found


def memory_gib() -> float:
    """The most memory in use so far: of a device, or of this process where devices tell nothing."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
