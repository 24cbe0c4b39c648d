"""Make the quickstart's models and prompts in configs/quickstart/, within minutes on a CPU.

    python scripts/make_quickstart_models.py

The teacher (3 layers, width 128) always writes the columns out and is nearly always right. The base
student (2 layers, width 64) knows two styles: it was shown columns for nine in ten problems with
multipliers up to 5, but for one in four above, and the bare product otherwise.
It is trained on ground truth, never on the teacher.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from quickstart_task import (
    ALL_MULTIPLIERS,
    END,
    PAD,
    SFT_MULTIPLIERS,
    VOCABULARY,
    Problem,
    build_tokenizer,
    problems,
    write_prompts,
)

from opd_jax.core.rng import key_for
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.model.architecture import Architecture
from opd_jax.model.hf_export import export_folder
from opd_jax.model.transformer import LanguageModel, Params

ROW = 16 + 53
"""Tokens of the longest prompt and response."""
BATCH = 64
CARD = """---
license: apache-2.0
library_name: transformers
---
# The quickstart's {name}

Multiplies five digits by one: `86556*6=`. Trained from nothing on generated problems by
`scripts/make_quickstart_models.py`, to try distillation out within minutes.
"""
Batch = tuple[np.ndarray, np.ndarray]


def architecture(layers: int, width: int, ffn: int, head_dim: int) -> Architecture:
    """A Qwen3 decoder with 4 query heads on 2 key-value heads and tied embeddings."""
    return Architecture(
        family="qwen3",
        vocab_size=len(VOCABULARY),
        embed_dim=width,
        ffn_dim=ffn,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        tie_embeddings=True,
        qkv_bias=False,
        qk_norm=True,
        max_position=256,
    )


TEACHER = LanguageModel(architecture(layers=3, width=128, ffn=384, head_dim=32))
STUDENT = LanguageModel(architecture(layers=2, width=64, ffn=192, head_dim=16))


def encode_rows(tokenizer: Tokenizer, rows: list[tuple[Problem, bool]]) -> Batch:
    """Tokens [b, t] and the weight [b, t] of each as a target: 1 on response tokens, else 0."""
    tokens_bt = np.full((len(rows), ROW), VOCABULARY.index(PAD), np.int32)
    weight_bt = np.zeros((len(rows), ROW), np.float32)
    for row, (problem, worked) in enumerate(rows):
        prompt = tokenizer.encode_chat([{"role": "user", "content": problem.prompt}])
        response = tokenizer.encode(problem.response(worked) + END)
        stop = len(prompt) + len(response)
        tokens_bt[row, :stop] = prompt + response
        weight_bt[row, len(prompt) : stop] = 1
    return tokens_bt, weight_bt


def teacher_batches(tokenizer: Tokenizer, seed: int) -> Iterator[Batch]:
    """Columns always."""
    stream = problems("pretrain", ALL_MULTIPLIERS, np.random.default_rng(seed))
    while True:
        yield encode_rows(tokenizer, [(next(stream), True) for _ in range(BATCH)])


def student_batches(tokenizer: Tokenizer, seed: int) -> Iterator[Batch]:
    """Columns for most problems with small multipliers and for few others."""
    rng = np.random.default_rng(seed)
    stream = problems("pretrain", ALL_MULTIPLIERS, rng)
    while True:
        drawn = [next(stream) for _ in range(BATCH)]
        shares = [0.9 if p.multiplier in SFT_MULTIPLIERS else 0.25 for p in drawn]
        worked = [bool(rng.random() < share) for share in shares]
        yield encode_rows(tokenizer, list(zip(drawn, worked, strict=True)))


@partial(jax.jit, static_argnums=0)
def target_logprobs(
    model: LanguageModel, params: Params, tokens_bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of every next token [b, t-1], and whether it is the most likely one."""
    positions_bt = jnp.broadcast_to(jnp.arange(ROW, dtype=jnp.int32)[None], tokens_bt.shape)
    hidden_btd = model.forward(params, tokens_bt, positions_bt).hidden_btd[:, :-1]
    logits_btv = jnp.einsum("btd,vd->btv", hidden_btd, model.head(params))
    target_bt = tokens_bt[:, 1:]
    logprob_btv = jax.nn.log_softmax(logits_btv)
    logprob_bt = jnp.take_along_axis(logprob_btv, target_bt[..., None], axis=-1)[..., 0]
    return logprob_bt, logits_btv.argmax(-1) == target_bt


def fit(model: LanguageModel, batches: Iterator[Batch], steps: int, learning_rate: float) -> Params:
    """Train from random parameters on cross-entropy of response tokens."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))
    params = model.init(key_for(0, "init", model.arch.embed_dim))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, tokens_bt, weight_bt):
        def loss_fn(params):
            logprob_bt, _ = target_logprobs(model, params, tokens_bt)
            return -(logprob_bt * weight_bt[:, 1:]).sum() / weight_bt[:, 1:].sum()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for number in range(1, steps + 1):
        params, opt_state, loss = step(params, opt_state, *next(batches))
        if number % 100 == 0:
            print(f"  step {number}: {float(loss):.4f} nats per response token", flush=True)
    return params


def describe(name: str, model: LanguageModel, params: Params, tokenizer: Tokenizer) -> None:
    """Print, for every multiplier, what greedy decoding makes of each style once it has begun."""
    rng = np.random.default_rng(1)
    print(f"{name}: multiplier, right with columns, right bare, probability of columns")
    for multiplier in ALL_MULTIPLIERS:
        stream = problems("dev", [multiplier], rng)
        drawn = [next(stream) for _ in range(200)]
        right = {}
        for worked in (True, False):
            tokens_bt, weight_bt = encode_rows(tokenizer, [(p, worked) for p in drawn])
            logprob_bt, best_bt = target_logprobs(model, params, tokens_bt)
            first = int(weight_bt[0].argmax())
            free_bt = weight_bt[:, first + 1 :] == 0
            right[worked] = float((np.asarray(best_bt)[:, first:] | free_bt).all(1).mean())
            if worked:
                columns = float(np.exp(np.asarray(logprob_bt)[:, first - 1]).mean())
        print(f"  {multiplier}  {right[True]:.3f}  {right[False]:.3f}  {columns:.3f}")


def export(
    folder: Path, name: str, model: LanguageModel, params: Params, tokenizer: Tokenizer
) -> None:
    """Write one Hugging Face folder."""
    ids = {"eos_token_id": list(tokenizer.end_ids), "pad_token_id": VOCABULARY.index(PAD)}
    card = {"README.md": CARD.format(name=name)}
    export_folder(folder, model, params, tokenizer, card, ids)


def main() -> None:
    """Write prompts, teacher and student."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shipped = Path(__file__).parents[1] / "configs" / "quickstart"
    parser.add_argument("--out", type=Path, default=shipped)
    parser.add_argument("--teacher-steps", type=int, default=900)
    parser.add_argument("--student-steps", type=int, default=1100)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_prompts(args.out)
    tokenizer = Tokenizer(build_tokenizer(), [VOCABULARY.index(END)], "the quickstart's tokenizer")
    for name, model, batches, steps, learning_rate in (
        ("teacher", TEACHER, teacher_batches(tokenizer, 1), args.teacher_steps, 3e-3),
        ("student", STUDENT, student_batches(tokenizer, 2), args.student_steps, 5e-3),
    ):
        params = fit(model, batches, steps, learning_rate)
        describe(name, model, params, tokenizer)
        export(args.out / name, name, model, params, tokenizer)


if __name__ == "__main__":
    main()
