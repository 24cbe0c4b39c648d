"""The teacher's scoring program, on a batch of the longest responses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.algo.top_k import CHUNK_TOKENS
from opd_jax.core.flops import count_flops
from opd_jax.fit.draft import Draft, context_of, device_bytes, forward_flops, on_one, rows_of
from opd_jax.fit.setup import Setup
from opd_jax.model.transformer import LanguageModel
from opd_jax.teacher.batches import score_batches
from opd_jax.teacher.score import Scorer, score_program

MOST_RECORDS = 4096
"""So many records settle the shape of a batch."""


def scoring_draft(setup: Setup) -> Draft:
    """The program that scores most of the rollouts."""
    config, model = setup.config, setup.model("teacher")
    prompt = setup.prompt_tokens(setup.model("student"), config.rollout)
    longest = prompt + config.rollout.max_new_tokens
    records = setup.prompts("opd") * config.rollout.samples_per_prompt
    scorer = Scorer(model, {}, config.score.top_k, config.score.batch_tokens)
    some = np.full(min(records, MOST_RECORDS), longest)
    first = score_batches(some, scorer)[0]
    rows, t = first.rows, first.length
    held = sum(len(row) for row in first.packed)  # records
    params = model.abstract(setup.store_dtype)
    responses = -(-held // rows) * config.rollout.max_new_tokens

    def lower() -> Any:
        batch = {name: rows_of(setup, shape, jnp.int32) for name, shape in _arrays(rows, t).items()}
        program: Any = score_program(model, config.score.top_k)
        return program.lower(params, batch)

    tokens = held * (longest - 1)
    asked = held * config.rollout.max_new_tokens, held * context_of(longest - 1)
    return Draft(
        name="score",
        what=f"{rows:,} rows of {t:,}, top-k {config.score.top_k}",
        stage="score",
        runs=records / held,
        tokens=tokens,
        model_flops=forward_flops(model, tokens, *asked),
        lower=lower,
        count=lambda: _flops(setup, model, (rows, t), responses),
        parts=lambda: {"parameters": device_bytes(params)},
        loops=-(-responses // min(t, max(CHUNK_TOKENS // rows, 1))),
    )


def _arrays(rows: int, t: int) -> dict[str, tuple[int, ...]]:
    names = ("input_bt", "positions_bt", "segments_bt", "target_bt", "column_bt")
    return {**dict.fromkeys(names, (rows, t)), "count_b": (rows,)}


def _flops(setup: Setup, model: LanguageModel, size: tuple[int, int], responses: int) -> float:
    """Products of a batch each of whose rows has so many response tokens."""
    one = on_one(model)
    batch = {name: jax.ShapeDtypeStruct(x, jnp.int32) for name, x in _arrays(*size).items()}
    known: dict[str, Any] = dict.fromkeys(batch)
    known["count_b"] = np.full(size[0], responses, np.int32)
    params = one.abstract(setup.store_dtype)
    given = [None] * len(jax.tree.leaves(params)) + [known[name] for name in sorted(batch)]
    program = jax.make_jaxpr(score_program(one, setup.config.score.top_k))(params, batch)
    return float(count_flops(program, given))
