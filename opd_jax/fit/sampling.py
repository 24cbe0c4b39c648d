"""The sampler's programs: prefill of the longest prompts, and a round of decoding."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.config import SamplingConfig
from opd_jax.core.flops import count_flops
from opd_jax.core.mesh import axis_size, replicated
from opd_jax.fit.draft import Draft, context_of, device_bytes, forward_flops, on_one
from opd_jax.fit.results import Bytes
from opd_jax.fit.setup import Role, Setup
from opd_jax.model.cache import PageTable, cache_token_bytes, empty_cache, page_table
from opd_jax.model.decode import decode, logits, split_layers
from opd_jax.model.transformer import Params
from opd_jax.sampling import engine
from opd_jax.sampling.collect import requests_for
from opd_jax.sampling.sampler import Plan, SamplingJob, plan_for

Stage = Literal["answer", "rollout"]


class Sampler:
    """A stage's sampler without its values."""

    def __init__(self, setup: Setup, stage: Stage) -> None:
        role: Role = "teacher" if stage == "answer" else "student"
        self.setup, self.stage, self.model = setup, stage, setup.model(role)
        config = setup.config
        self.sampling: SamplingConfig = config.answer if stage == "answer" else config.rollout
        self.prompts = setup.prompts("sft" if stage == "answer" else "opd")
        self.prompt_tokens = setup.prompt_tokens(self.model, self.sampling)
        self.params = self.model.abstract(setup.store_dtype)

    @functools.cached_property
    def plan(self) -> Plan:
        """Slots, pages and prefills, were all prompts as long as they may be.

        A run that draws its rollouts itself takes samples of a prompt one by one: so do these then.
        """
        tokenizer = self.setup.tokenizer("student")
        ends = (0,) if tokenizer is None else tokenizer.end_ids
        text = str if self.sampling.stop else None
        job = SamplingJob(self.model, {}, self.sampling, ends, 0, text)
        some = min(self.prompts, 4 * self.sampling.slots)  # more do not change it
        prompts = [(str(i), [0] * self.prompt_tokens) for i in range(some)]
        train = self.setup.config.train
        alone = self.stage == "rollout" and any(train.runs[name].draws for name in train.enabled)
        requests = requests_for(prompts, self.sampling.samples_per_prompt)
        return plan_for(job, requests, together=not alone)

    @property
    def samples(self) -> int:
        """All responses of the stage."""
        return self.prompts * self.sampling.samples_per_prompt

    @property
    def prefill_shape(self) -> tuple[int, int]:
        """Prompts and their padded length."""
        return self.plan.prefills.rows[-1], self.plan.prefills.lengths[-1]

    @functools.cached_property
    def split(self) -> Params:
        """Weights as decoding wants them, and where they lie."""
        return _outputs(self.setup.mesh, split_layers.lower(self.model, self.params))

    @functools.cached_property
    def state(self) -> Any:
        """Slots and cache, and where they lie."""
        return _outputs(self.setup.mesh, engine.empty_state.lower(self.plan.program))

    def whole(self, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array that every device has."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.setup.mesh))

    @property
    def table(self) -> PageTable:
        """Whose page is whose."""
        return page_table(self.plan.program.pages, self.whole)


def _outputs(mesh: Mesh, lowered: Any) -> Any:
    """What a program returns, with the shardings that its compilation settles."""
    shardings = jax.tree.map(lambda _: replicated(mesh), lowered.out_info)
    if mesh.size > 1:  # else nothing in it names the device
        shardings = lowered.compile().output_shardings
    return jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        lowered.out_info,
        shardings,
    )


def sampling_drafts(setup: Setup, stage: Stage) -> list[Draft]:
    """Prefill and decoding of `answer` (the teacher) or `rollout` (the student)."""
    sampler = Sampler(setup, stage)
    return [_prefill(sampler), _decode(sampler)]


def _prefill(sampler: Sampler) -> Draft:
    setup, model = sampler.setup, sampler.model
    rows, t = sampler.prefill_shape

    def lower() -> Any:
        program = sampler.plan.program
        prompts = sampler.whole((rows, t)), sampler.whole((rows,))
        return engine.prefill.lower(program, sampler.params, *prompts)

    def count() -> float:
        one, tokens = on_one(model), jax.ShapeDtypeStruct((rows, t), jnp.int32)
        program = jax.make_jaxpr(one.forward)(one.abstract(setup.store_dtype), tokens, tokens)
        return float(count_flops(program))

    def beside() -> Bytes:
        return {
            "weights for decoding": device_bytes(sampler.split),
            "KV cache": device_bytes(sampler.state.cache),
        }

    length = sampler.prompt_tokens
    return Draft(
        name=f"{sampler.stage}.prefill",
        what=f"{rows:,} prompts of {t:,}",
        stage=sampler.stage,
        runs=sampler.prompts / rows,
        tokens=rows * length,
        model_flops=forward_flops(model, rows * length, 0, rows * context_of(length)),
        lower=lower,
        count=count,
        parts=lambda: {"parameters": device_bytes(sampler.params)},
        beside=beside,
    )


def _decode(sampler: Sampler) -> Draft:
    setup, model, slots = sampler.setup, sampler.model, sampler.plan.program.slots
    new = sampler.sampling.max_new_tokens

    def lower() -> Any:
        program = sampler.plan.program
        rest = sampler.table, sampler.whole(()), sampler.whole((slots,), jnp.bool_)
        return engine.decode_round.lower(program, sampler.split, sampler.state, *rest)

    def parts() -> Bytes:
        weights, cache = device_bytes(sampler.split), device_bytes(sampler.state.cache)
        return {"weights for decoding": weights, "KV cache": cache}

    def beside() -> Bytes:
        rows, t = sampler.prefill_shape
        cut = axis_size(setup.mesh, "kv_heads") * min(setup.ways, rows)
        prompts = rows * t * cache_token_bytes(model) // cut
        return {"parameters": device_bytes(sampler.params), "prompts that wait": prompts}

    context = slots * (sampler.prompt_tokens + new / 2)
    pages, steps = sampler.plan.program.pages, sampler.plan.program.round_steps
    return Draft(
        name=f"{sampler.stage}.decode",
        what=f"{slots:,} slots, {pages.tokens:,} cached tokens, {steps} steps",
        stage=sampler.stage,
        runs=sampler.samples * new / (slots * steps),
        tokens=slots * steps,
        model_flops=steps * forward_flops(model, slots, slots, context),
        lower=lower,
        count=lambda: steps * _step_flops(sampler),
        parts=parts,
        beside=beside,
        loops=steps,
    )


def _step_flops(sampler: Sampler) -> float:
    """Products of a step: those of the slots of one shard, as often as there are shards."""
    pages, one = sampler.plan.program.pages, on_one(sampler.model)
    mine = replace(pages, shards=1)
    whole = one.abstract(sampler.setup.store_dtype)
    params = jax.eval_shape(functools.partial(split_layers, one), whole)
    cache = jax.eval_shape(functools.partial(empty_cache, one, mine))
    tokens = jax.ShapeDtypeStruct((mine.rows,), jnp.int32)
    table = page_table(mine, lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32))

    def step(params: Params, tokens: Any, cache: Any, table: PageTable) -> Any:
        hidden, _ = decode(one, mine, params, tokens, cache, table)
        return logits(one, params, hidden)

    traced = jax.make_jaxpr(step)(params, tokens, cache, table)
    return float(count_flops(traced)) * pages.shards
