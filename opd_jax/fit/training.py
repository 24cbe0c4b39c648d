"""The train steps of a config, as `stages.training` would run them on full batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.config_train import LoopConfig, TrainRun
from opd_jax.core.flops import count_flops
from opd_jax.core.mesh import axis_size
from opd_jax.data.collate import best_fit
from opd_jax.fit.draft import Draft, context_of, device_bytes, on_one, rows_of
from opd_jax.fit.results import Bytes
from opd_jax.fit.setup import Setup
from opd_jax.model.lora import Adapters
from opd_jax.model.transformer import LanguageModel
from opd_jax.train.jobs import objective_of
from opd_jax.train.meter import Load, model_flops
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.sources import Packing, support_size
from opd_jax.train.step import Objective, abstract_state, gradients, make_train_step


class Shape(NamedTuple):
    """The arrays of a step, and the work in them."""

    pieces: int
    micro_rows: int
    row_tokens: int
    support: int
    load: Load


def training_draft(setup: Setup, name: str) -> Draft:
    """The train step of `sft` or of `train.NAME`."""
    config = setup.config
    loop = config.sft if name == "sft" else config.train.runs[name.removeprefix("train.")]
    model, objective = setup.model("student"), objective_of(loop)
    shape = sft_shape(setup, loop) if objective.kind == "sft" else opd_shape(setup, loop)
    adapters = None if loop.lora is None else Adapters(model, loop.lora)
    optimizer = make_optimizer(adapters or model, loop)
    state = abstract_state(adapters or model, optimizer)
    batch = abstract_batch(setup, objective, shape)
    frozen = [model.abstract(setup.store_dtype)] if adapters else []
    trained = device_bytes(state.params)
    kept = jax.tree.leaves(state.opt_state)
    host: Bytes = {}
    if loop.optim.offload:  # all but counters; absent cards know no memories that could be asked
        host = {"moments": device_bytes([x for x in kept if x.ndim])}
    moments = device_bytes(kept) - sum(host.values())

    def lower() -> Any:
        step: Any = make_train_step(model, objective, optimizer, shape.pieces, adapters)
        return step.lower(state, batch, *frozen)

    def parts() -> Bytes:
        weights = {"frozen parameters": device_bytes(frozen)} if frozen else {}
        own = {"parameters": trained, "moments": moments, "batch": device_bytes(batch)}
        return {**weights, **own}

    rows = shape.pieces * shape.micro_rows
    return Draft(
        name=name,
        what=f"{rows:,} rows of {shape.row_tokens:,}{_cut(shape)}, remat {model.remat}",
        stage=name,
        runs=loop.steps,
        tokens=shape.load.tokens,
        model_flops=model_flops(model, shape.load, frozen=adapters is not None),
        lower=lower,
        count=lambda: step_flops(setup, model, objective, loop, shape),
        parts=parts,
        passing={"gradients": trained},
        beside=lambda: _beside(setup, loop),
        loops=shape.pieces,
        host=host,
    )


def _cut(shape: Shape) -> str:
    return f" in {shape.pieces:,} micro-batches" if shape.pieces > 1 else ""


def _beside(setup: Setup, loop: LoopConfig) -> Bytes:
    """What else a run keeps in memory: a live teacher."""
    if not (isinstance(loop, TrainRun) and has_teacher(loop)):
        return {}
    return {"teacher": device_bytes(setup.model("teacher").abstract(setup.store_dtype))}


def has_teacher(run: TrainRun) -> bool:
    """Whether a run keeps the teacher loaded."""
    watched = bool(run.guard.teacher and run.guard.fresh and run.heldout)
    return run.algorithm != "sft" and (run.algorithm == "opd" or watched)


def sft_shape(setup: Setup, loop: LoopConfig) -> Shape:
    """Packed rows of answers, all full."""
    config, rows = setup.config, loop.batch_size
    pieces = rows // (loop.micro_batch_size or rows)
    model = setup.model("student")
    longest = setup.prompt_tokens(model, config.answer) + config.answer.max_new_tokens - 1
    t = config.sft.row_tokens
    length = min(longest, t)
    context = rows * t / length * context_of(length)
    return Shape(pieces, rows // pieces, t, 0, Load(rows * t, rows * t, int(context)))


def opd_shape(setup: Setup, loop: LoopConfig) -> Shape:
    """Packed rows of rollouts, all as long as the config allows."""
    assert isinstance(loop, TrainRun)
    config, model = setup.config, setup.model("student")
    longest = setup.prompt_tokens(model, config.rollout) + config.rollout.max_new_tokens
    topk = loop.objective == "topk"
    support = support_size(config.score.top_k, loop.support, tail=loop.tail) if topk else 0
    parts = axis_size(setup.mesh, "time")
    packing = Packing.of(loop, longest, setup.ways, support, parts)
    count = loop.batch_size
    if loop.batch_tokens is not None:
        count = max(loop.batch_tokens // longest, 1)
    rows = len(best_fit([longest - 1] * count, packing.row_tokens))
    pieces, micro = packing.shape_within(rows, count) if loop.draws else packing.shape(rows)
    tokens = count * (longest - 1)
    load = Load(tokens, pieces * micro * packing.row_tokens, int(count * context_of(longest - 1)))
    return Shape(pieces, micro, packing.row_tokens, support, load)


def abstract_batch(setup: Setup, objective: Objective, shape: Shape) -> dict[str, Any]:
    """The arrays of a step, as `data.collate` makes them."""
    size = shape.pieces * shape.micro_rows, shape.row_tokens
    return {
        name: rows_of(setup, (*size, *more), dtype)
        for name, (more, dtype) in _arrays(objective, shape.support).items()
    }


def _arrays(objective: Objective, support: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name to further axes and dtype."""
    ints, floats = ((), jnp.int32), ((), jnp.float32)
    names = ("input_bt", "target_bt", "positions_bt", "segments_bt")
    found: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(names, ints)
    found["mask_bt"] = ((), jnp.bool_)
    if objective.kind != "sft":
        found |= dict.fromkeys(("weight_bt", "sampler_bt", "teacher_bt"), floats)
    if support:
        found["support_ids_bts"] = ((support,), jnp.int32)
        found["support_logprob_bts"] = ((support,), jnp.float32)
        found["support_rest_bt"] = floats
    return found


def step_flops(
    setup: Setup, model: LanguageModel, objective: Objective, loop: LoopConfig, shape: Shape
) -> float:
    """Products of a step: those of a micro-batch, as often as there are."""
    one = on_one(model)
    size = shape.micro_rows, shape.row_tokens
    batch = {
        name: jax.ShapeDtypeStruct((*size, *more), dtype)
        for name, (more, dtype) in _arrays(objective, shape.support).items()
    }
    whole = one.abstract(setup.store_dtype)
    if loop.lora is None:
        traced = jax.make_jaxpr(lambda p, b: gradients(one, objective, p, b, 1))
        program = traced(one.abstract(), batch)
    else:
        adapters = Adapters(one, loop.lora)
        traced = jax.make_jaxpr(
            lambda p, b, w: gradients(
                one, objective, p, b, 1, lambda trained: adapters.attach(w, trained)
            )
        )
        program = traced(adapters.abstract(), batch, whole)
    return float(count_flops(program)) * shape.pieces
