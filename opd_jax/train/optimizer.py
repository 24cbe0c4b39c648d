"""AdamW with warm-up, schedule, clipping and a decay mask from the parameter declarations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from opd_jax.config import LoopConfig, OptimConfig
from opd_jax.model.transformer import LanguageModel


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant, or a cosine down to a tenth of a percent of the peak."""
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(
            config.learning_rate, max(steps - config.warmup_steps, 1), alpha=1e-3
        )
    else:
        after = optax.constant_schedule(config.learning_rate)
    if not config.warmup_steps:
        return after
    # Step 0 already learns: the ramp starts at 1 / warmup_steps, not at 0.
    first = config.learning_rate / config.warmup_steps
    warmup = optax.linear_schedule(first, config.learning_rate, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def decay_mask(model: LanguageModel) -> dict[str, Any]:
    """True for the parameters that weight decay shrinks: matrices, not norms or biases."""
    return jax.tree.map(
        lambda param: param.get_metadata("decay"), model.declaration(), is_leaf=_is_param
    )


def _is_param(node: object) -> bool:
    return not isinstance(node, dict)


def make_optimizer(model: LanguageModel, loop: LoopConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW."""
    config = loop.optim
    return optax.chain(
        _clip(config.clip_norm),
        optax.adamw(
            learning_rate(config, loop.steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask(model),
        ),
    )


def _clip(norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as one product with a scalar.

    Optax divides every entry, and XLA keeps the quotients: a second copy of all gradients.
    """

    def scaled(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        scale = jnp.minimum(1.0, norm / jnp.maximum(optax.tree.norm(updates), 1e-30))
        return jax.tree.map(lambda x: x * scale.astype(x.dtype), updates)

    return optax.stateless(scaled)
