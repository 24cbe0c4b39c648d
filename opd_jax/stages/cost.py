"""About what a stage will cost: tokens, bytes and operations, before it has run."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.config import SamplingConfig
from opd_jax.model.architecture import Architecture
from opd_jax.model.load import architecture_of
from opd_jax.model.lora import Adapters
from opd_jax.stages.context import RunContext

RECORD_BYTES = 9.6  # per response token: ids and a log-prob, compressed
TOPK_BYTES = 3.2  # per token and stored entry: id and float16 log-prob, compressed


class Estimate(NamedTuple):
    """An upper bound on tokens, and what follows from it."""

    tokens: int
    stored_bytes: float
    flops: float


def estimate(ctx: RunContext, name: str) -> Estimate:
    """Tokens, bytes and floating-point operations of a stage that has not run."""
    config = ctx.config
    student = parameter_count(architecture_of(config.model.student))
    teacher = parameter_count(architecture_of(config.model.teacher))
    kind, _, run_name = name.partition(".")
    if kind == "answer":
        return _sampled(len(ctx.prompts("sft")), config.answer, teacher)
    rollouts = _sampled(len(ctx.prompts("opd")), config.rollout, student)
    sft_tokens = config.sft.steps * config.sft.batch_size * config.sft.row_tokens
    score_bytes = 4 + TOPK_BYTES * config.score.top_k
    if kind == "train":
        return _train_estimate(ctx, run_name, student, teacher)
    if kind == "evaluate":
        return _evaluate_estimate(ctx, teacher if run_name == "teacher" else student + teacher)
    return {
        "sft": Estimate(sft_tokens, 12.0 * student, 6.0 * student * sft_tokens),
        "rollout": rollouts,
        "score": Estimate(
            rollouts.tokens, rollouts.tokens * score_bytes, 2.0 * teacher * rollouts.tokens
        ),
        "export": Estimate(0, 4.0 * student, 0.0),
    }[kind]


def _sampled(prompts: int, sampling: SamplingConfig, parameters: int) -> Estimate:
    tokens = prompts * sampling.samples_per_prompt * sampling.max_new_tokens
    return Estimate(tokens, tokens * RECORD_BYTES, 2.0 * parameters * tokens)


def _evaluate_estimate(ctx: RunContext, parameters: int) -> Estimate:
    config = ctx.config.evaluate
    tokens = len(ctx.prompts("eval")) * config.max_new_tokens
    tokens *= config.samples_per_prompt + int(config.greedy)
    return Estimate(tokens, tokens * RECORD_BYTES, 2.0 * parameters * tokens)


def _train_estimate(ctx: RunContext, name: str, student: int, teacher: int) -> Estimate:
    run = ctx.config.train.runs[name]
    length = ctx.config.rollout.max_new_tokens
    if run.algorithm == "sft":
        length = ctx.config.sft.row_tokens
    tokens = run.steps * run.batch_size * length
    live = 2 * (student + teacher) if run.draws else 0
    if run.lora is None:
        return Estimate(tokens, 12.0 * student, (6 * student + live) * tokens)
    adapters = Adapters(ctx.program("student"), run.lora).abstract()
    added = sum(math.prod(x.shape) for x in jax.tree.leaves(adapters))
    # The merged model is kept as a whole; frozen weights have no gradient.
    stored = 4.0 * student + 12.0 * added
    return Estimate(tokens, stored, (4 * student + 6 * added + live) * tokens)


def parameter_count(arch: Architecture) -> int:
    """Parameters that take part in a token's matrix products (the embedding once, as the head)."""
    attention = arch.embed_dim * arch.head_dim * 2 * (arch.num_heads + arch.num_kv_heads)
    experts = arch.num_experts + 3 * arch.experts_per_token * arch.expert_ffn_dim
    widths = len(arch.dense_layers) * 3 * arch.ffn_dim + len(arch.sparse_layers) * experts
    return arch.num_layers * attention + (widths + arch.vocab_size) * arch.embed_dim


def matmul_rate(size: int = 1024, repeats: int = 3) -> float:
    """Floating-point operations per second of one device on a square matrix product."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
