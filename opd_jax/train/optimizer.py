"""AdamW with warm-up, schedule, clipping and a decay mask from the parameter declarations."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from opd_jax.config_train import LoopConfig, OptimConfig
from opd_jax.model.lora import Adapters
from opd_jax.model.transformer import LanguageModel
from opd_jax.train.moments import scale_by_adam
from opd_jax.train.offload import OnHost, one_at_a_time


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant, or a cosine down to a tenth of a percent of the peak, or wsd.

    Source: "warmup-stable-decay", arXiv 2404.06395; its last part falls as 1 - sqrt(x), which
    arXiv 2405.18392 found better than a line. The step after the last would have rate 0.
    """
    if config.schedule == "wsd":
        after = _stable_then_decay(config, steps - config.warmup_steps, steps)
    elif config.schedule == "cosine":
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


def _stable_then_decay(config: OptimConfig, left: int, steps: int) -> optax.Schedule:
    """What is left of all steps after warm-up: the decay is cut short before it delays warm-up."""
    decay = min(max(round(config.decay_share * steps), 1), max(left, 1))

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        share = jnp.clip((jnp.asarray(step) - (left - decay)) / decay, 0, 1)
        return config.learning_rate * (1 - jnp.sqrt(share))

    return rate


def decay_mask(model: LanguageModel | Adapters) -> dict[str, Any]:
    """True for the parameters that weight decay shrinks: matrices, not norms or biases."""
    return jax.tree.map(
        lambda param: param.get_metadata("decay"), model.declaration(), is_leaf=_is_param
    )


def _is_param(node: object) -> bool:
    return not isinstance(node, dict)


def make_optimizer(
    model: LanguageModel | Adapters, loop: LoopConfig
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW, then the moving average of what comes out."""
    config = loop.optim
    if config.moments == "float32":
        adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    else:
        adam = scale_by_adam(config.b1, config.b2, config.eps, config.moments)
    adamw = optax.chain(
        adam,
        optax.add_decayed_weights(config.weight_decay, decay_mask(model)),
        optax.scale_by_learning_rate(learning_rate(config, loop.steps)),
    )
    average = [] if config.ema is None else [_average(config.ema)]
    kept = [_guarded(adamw), *average]
    if config.offload:
        return OnHost(*optax.chain(_clip(config.clip_norm), *map(one_at_a_time, kept)))
    return optax.chain(_clip(config.clip_norm), *kept)


def _guarded(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An update that is not `sound` is 0, and the moments fade as with a gradient of 0.

    To leave the old moments as they are would cost a copy of them: XLA computes the parameters from
    the old ones once more, and so cannot write the new ones in their place.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, sound: Any = True, **_: Any
    ) -> tuple[Any, Any]:
        def kept(tree: Any) -> Any:
            return jax.tree.map(lambda x: jnp.where(sound, x, 0), tree)

        updates, state = inner.update(kept(updates), state, params)
        return kept(updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


class AverageState(NamedTuple):
    """Moving average of the parameters, float32."""

    average: Any


def _average(keep: float) -> optax.GradientTransformationExtraArgs:
    """Passes updates on, and keeps the moving average of the parameters that they make.

    A step that is not `sound` leaves the average as it is.
    """

    def init(params: Any) -> AverageState:
        return AverageState(jax.tree.map(lambda x: jnp.array(x, jnp.float32), params))

    def update(
        updates: Any, state: Any, params: Any = None, *, sound: Any = True, **_: Any
    ) -> tuple[Any, AverageState]:
        new, share = optax.apply_updates(params, updates), jnp.where(sound, keep, 1.0)
        average = jax.tree.map(
            lambda old, x: share * old + (1 - share) * x.astype(jnp.float32), state.average, new
        )
        return updates, AverageState(average)

    return optax.GradientTransformationExtraArgs(init, update)


def result_of(params: Any, opt_state: Any) -> Any:
    """What a training gives: the moving average where and as the parameters are, or these."""
    average = optax.tree.get(opt_state, "average")
    if average is None:
        return params

    def alike(x: jax.Array, like: jax.Array) -> jax.Array:
        return jax.device_put(x, like.sharding).astype(like.dtype)  # it may lie on the host

    return jax.tree.map(alike, average, params)


def _clip(norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` as one product with a scalar.

    Optax divides every entry, and XLA keeps the quotients: a second copy of all gradients.
    """

    def scaled(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        scale = jnp.minimum(1.0, norm / jnp.maximum(optax.tree.norm(updates), 1e-30))
        return jax.tree.map(lambda x: x * scale.astype(x.dtype), updates)

    return optax.stateless(scaled)
