"""The train step: pure, jitted in one place, with named shardings and donated state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from opd_jax.algo.logprobs import chosen_logprobs
from opd_jax.algo.losses import (
    Loss,
    Terms,
    TokenLogprobs,
    advantage,
    anchor_loss,
    diagnostics,
    sampled_opd,
    sft_loss,
    token_weights,
    topk_reverse_kl,
)
from opd_jax.core.in_order import after
from opd_jax.core.mesh import batch_sharding, replicated
from opd_jax.errors import ConfigError
from opd_jax.model.gradient_sums import STACKED
from opd_jax.model.lora import Adapters
from opd_jax.model.moe import RouterSums, balance_loss, router_metrics
from opd_jax.model.transformer import ForwardOutput, LanguageModel, Params
from opd_jax.train.moments import sharding_like
from opd_jax.train.offload import HOST, OnHost


class TrainState(NamedTuple):
    """All that a step changes."""

    params: Any
    opt_state: Any
    step: Any


class Objective(NamedTuple):
    """Which loss, with its constants. Hashable."""

    kind: Literal["sft", "sampled", "topk"]
    terms: Terms = Terms()
    tail: bool = False
    router_balance: float = 0.0


Batch = dict[str, jax.Array]
Trained = LanguageModel | Adapters
"""What declares the parameters that are trained."""
StepFn = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def batch_loss(model: LanguageModel, objective: Objective, params: Params, batch: Batch) -> Loss:
    """One fused forward: hidden states, log-probs of what the objective needs, the loss.

    Args:
        batch: as `data.collate` makes it.
    """
    return _loss_and_sums(model, objective, params, batch, None)[0]


def _loss_and_sums(
    model: LanguageModel, objective: Objective, params: Params, batch: Batch, sums: Params | None
) -> tuple[Loss, Params | None]:
    """`batch_loss`, and the sums that went through `LanguageModel.forward`."""
    out = model.forward(
        params,
        batch["input_bt"],
        batch["positions_bt"],
        batch.get("segments_bt"),
        _counted(batch) if model.arch.sparse_layers else None,
        sums,
    )
    loss = _token_loss(model, objective, out, batch)
    if out.router is not None:
        loss = _with_router(loss, out.router, objective.router_balance)
    return loss, out.sums


def _counted(batch: Batch) -> jax.Array:
    """bool [b, t]: no padding, which packed rows mark and other rows have after their last target.

    The prompt counts: its tokens go through the router too.
    """
    if "segments_bt" in batch:
        return batch["segments_bt"] > 0
    return jax.lax.cummax(batch["mask_bt"].astype(jnp.int32), axis=1, reverse=True) > 0


def _with_router(loss: Loss, router: RouterSums, coefficient: float) -> Loss:
    """Add the balance loss and the router's figures.

    The balance of several micro-batches is their mean, weighted as the loss is; the figures' mean
    is weighted by response tokens.
    """
    figures = {name: x * loss.sums["tokens"] for name, x in router_metrics(router).items()}
    total = loss.total
    if coefficient:
        total = total + coefficient * balance_loss(router) * loss.divisor
    return Loss(total, loss.divisor, {**loss.sums, **figures})


def _token_loss(
    model: LanguageModel, objective: Objective, out: ForwardOutput, batch: Batch
) -> Loss:
    ids_bts = batch["target_bt"][..., None]
    if objective.kind == "topk":
        ids_bts = jnp.concatenate([ids_bts, batch["support_ids_bts"]], axis=-1)
    chosen = chosen_logprobs(
        out.hidden_btd,
        out.head_vd,
        ids_bts,
        model.mesh,
        padded_from=model.padded_from,
        keep_logits=model.remat == "none",  # a fraction of what the layers keep then
        needed_bt=batch["mask_bt"],
    )
    student_bt, mask_bt = chosen.logprob_bts[..., 0], batch["mask_bt"]
    if objective.kind == "sft":
        return sft_loss(student_bt, mask_bt)
    terms, weight_bt = objective.terms, batch["weight_bt"]
    given = (batch["teacher_bt"], batch["sampler_bt"], mask_bt, batch.get("segments_bt"))
    tokens = TokenLogprobs(student_bt, *given)
    sums = diagnostics(tokens, terms)
    sums["entropy"] = jnp.sum(jnp.where(mask_bt, chosen.entropy_bt, 0.0))
    divisor = jnp.sum(weight_bt)  # each sequence's weights add up to 1, or each token's is 1
    weight_bt = token_weights(tokens, weight_bt, advantage(tokens, terms), terms)
    if objective.kind == "sampled":
        return Loss(sampled_opd(tokens, weight_bt, terms), divisor, sums)
    support_bts = chosen.logprob_bts[..., 1:]
    rest_bt = batch["support_rest_bt"] if objective.tail else None
    kl_bt = topk_reverse_kl(support_bts, batch["support_logprob_bts"], rest_bt, mask_bt)
    sums["topk_kl"] = jax.lax.stop_gradient(jnp.sum(kl_bt))
    total = jnp.sum(weight_bt * kl_bt)
    if terms.kl_anchor:
        total = total + anchor_loss(tokens, weight_bt, terms)
    return Loss(total, divisor, sums)


def gradients(
    model: LanguageModel,
    objective: Objective,
    params: Params,
    batch: Batch,
    pieces: int,
    attach: Callable[[Params], Params] | None = None,
) -> tuple[Params, Loss]:
    """Gradient of the loss's total, added up over `pieces` micro-batches (not yet divided).

    Micro-batches without a target come last (`data.collate.spread_rows`) and are not computed.

    Args:
        params: what is trained.
        attach: from these to the parameters of a forward; `None`: they are these, and the gradients
            of their layers are added up in place.
    """

    def total(params: Params, piece: Batch) -> tuple[jax.Array, Loss]:
        loss = batch_loss(model, objective, attach(params) if attach else params, piece)
        return loss.total, loss

    grad_fn = jax.grad(total, has_aux=True)
    if pieces == 1:
        return grad_fn(params, batch)

    cut = jax.tree.map(lambda x: _interleave(x, pieces), batch)
    used = jnp.sum(jnp.any(cut["mask_bt"], axis=(1, 2)), dtype=jnp.int32)

    def body(number: jax.Array, carry: tuple[Params, Loss]) -> tuple[Params, Loss]:
        piece = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, False), cut)
        if attach is None:
            return _add_micro_batch(model, objective, params, piece, carry)
        return jax.tree.map(jnp.add, carry, grad_fn(params, piece))

    shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], cut))
    zero, no_loss = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if model.mesh is not None and attach is None:
        cut_as = jax.tree.map(lambda x: x.sharding, model.abstract())
        zero = jax.lax.with_sharding_constraint(zero, cut_as)
    return jax.lax.fori_loop(0, used, body, (zero, no_loss))


def _add_micro_batch(
    model: LanguageModel,
    objective: Objective,
    params: Params,
    piece: Batch,
    before: tuple[Params, Loss],
) -> tuple[Params, Loss]:
    """`before`, with a micro-batch's gradients and loss: those of the layers are added in place."""
    stacks = {name: x for name, x in params.items() if name in STACKED}
    others = {name: x for name, x in params.items() if name not in STACKED}
    sums, losses = before

    def total(others: Params, passing: Params) -> tuple[tuple[jax.Array, Any], Loss]:
        loss, passed = _loss_and_sums(model, objective, {**others, **stacks}, piece, passing)
        return (loss.total, passed), loss

    # What passes through is not read: any arrays of these shapes would do.
    _, pull, loss = jax.vjp(total, others, stacks, has_aux=True)
    grads, summed = pull((jnp.ones_like(loss.total), {name: sums[name] for name in stacks}))
    added = {name: jax.tree.map(jnp.add, sums[name], x) for name, x in grads.items()}
    return {**added, **summed}, jax.tree.map(jnp.add, losses, loss)


def _interleave(x: jax.Array, pieces: int) -> jax.Array:
    """[b, ...] -> [pieces, b / pieces, ...], each device keeping its own rows."""
    return x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)


def make_train_step(
    model: LanguageModel,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    pieces: int,
    adapters: Adapters | None = None,
) -> StepFn:
    """`step(state, batch) -> (state, metrics)`; metrics are the loss, gradient norm and sums.

    A loss or gradient that is not finite leaves the parameters as they were; `sound` is then 0, and
    the moments fade as with a gradient of 0 (an optimizer of `make_optimizer`). With `adapters` the
    state is about these, and the step is `step(state, batch, params)`: the frozen parameters are
    left as they are.

    Raises:
        ConfigError: a balance loss for a model without experts.
    """
    if objective.router_balance and not model.arch.sparse_layers:
        raise ConfigError(
            f"router_balance={objective.router_balance}: the student ({model.arch.family}) has no "
            "experts to balance; set it to 0"
        )

    def step(
        state: TrainState, batch: Batch, *frozen: Params
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        attach = functools.partial(adapters.attach, *frozen) if adapters else None
        grads, loss = gradients(model, objective, state.params, batch, pieces, attach)
        scale = 1 / jnp.maximum(loss.divisor, 1e-9)
        factor = after(scale, tuple(jax.tree.leaves(grads)), model.mesh)
        grads = jax.tree.map(lambda g: g * factor, grads)  # XLA would keep quotients as a copy
        grad_norm = optax.tree.norm(grads)
        sound = jnp.isfinite(loss.total) & jnp.isfinite(grad_norm)
        update = optax.with_extra_args_support(optimizer).update
        updates, opt_state = update(grads, state.opt_state, state.params, sound=sound)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss.total * scale,
            "grad_norm": grad_norm,
            "update_ratio": optax.tree.norm(updates) / optax.tree.norm(state.params),
            "sound": sound.astype(jnp.float32),
            **loss.sums,
        }
        return TrainState(params, opt_state, state.step + 1), metrics

    if model.mesh is None:
        return jax.jit(step, donate_argnums=0)
    shardings = state_shardings(adapters or model, optimizer)
    frozen = [jax.tree.map(lambda x: x.sharding, model.abstract())] if adapters else []
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(model.mesh), *frozen),
        out_shardings=(shardings, replicated(model.mesh)),
        donate_argnums=0,
    )


def abstract_state(
    model: Trained, optimizer: optax.GradientTransformation, dtype: str = "float32"
) -> TrainState:
    """Shapes, dtypes and (with a mesh) shardings of the whole state."""

    def make(params: Params) -> TrainState:
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    abstract = model.abstract(dtype)
    shapes = jax.eval_shape(make, abstract)
    if model.mesh is None:
        return shapes
    whole = replicated(model.mesh)
    kind = HOST if isinstance(optimizer, OnHost) else None

    def plain(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda x, like: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding_like(x.shape, like.sharding, kind)
        ),
        shapes.opt_state,
        abstract,
        transform_non_params=plain,
    )
    return TrainState(abstract, opt_state, plain(shapes.step))


def state_shardings(model: Trained, optimizer: optax.GradientTransformation) -> TrainState:
    """The sharding of every leaf of the state."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer))


def init_state(
    model: Trained, optimizer: optax.GradientTransformation, params: Params
) -> TrainState:
    """A fresh state around a copy of `params` (the step donates its state)."""

    def make(params: Params) -> TrainState:
        copied = jax.tree.map(jnp.copy, params)
        return TrainState(copied, optimizer.init(copied), jnp.zeros((), jnp.int32))

    shardings = state_shardings(model, optimizer) if model.mesh is not None else None
    return jax.jit(make, out_shardings=shardings)(params)
