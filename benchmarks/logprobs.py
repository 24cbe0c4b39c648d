"""Token log-probs by blocks of the vocabulary against all logits at once.

    python benchmarks/logprobs.py

Vocabulary 151,936, width 1,024. Temporary memory is the compiler's, for forward and backward at
16,384 tokens (the naive form is compiled there, not run). Error and speed are measured at 512
tokens, where the naive form fits: the largest absolute difference of log-probs and of gradients,
each relative to the largest entry, and seconds of the two forms in turn.
"""

from __future__ import annotations

import time
from statistics import median

import jax
import jax.numpy as jnp
from common import report

from opd_jax.algo.logprobs import chosen_logprobs

VOCABULARY, WIDTH = 151_936, 1_024
LONG, SHORT = 16_384, 512
ROUNDS = 5


def ours(hidden, head, ids):
    return chosen_logprobs(hidden, head, ids).logprob_bts


def naive(hidden, head, ids):
    logits = jnp.einsum("btd,vd->btv", hidden, head)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), ids, axis=-1)


def step(form):
    """Log-probs and the gradients of their weighted sum."""

    def run(hidden, head, ids, weight):
        def total(hidden, head):
            found = form(hidden, head, ids)
            return jnp.sum(weight * found), found

        (_, found), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head)
        return found, *grads

    return jax.jit(run)


def shapes(tokens):
    row = (1, tokens)
    return (
        jax.ShapeDtypeStruct((*row, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((VOCABULARY, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((*row, 1), jnp.int32),
        jax.ShapeDtypeStruct((*row, 1), jnp.float32),
    )


def temporary(form):
    compiled = step(form).lower(*shapes(LONG)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def example():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head, ids, weight = shapes(SHORT)
    return (
        jax.random.normal(keys[0], hidden.shape),
        jax.random.normal(keys[1], head.shape) / WIDTH**0.5,
        jax.random.randint(keys[2], ids.shape, 0, VOCABULARY),
        jax.random.normal(keys[3], weight.shape),
    )


def seconds(run, arguments):
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - start


def main():
    memory = {form.__name__: temporary(form) for form in (ours, naive)}
    arguments, runs = example(), [step(ours), step(naive)]
    mine, plain = (run(*arguments) for run in runs)
    error = max(
        float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(mine, plain, strict=True)
    )
    absolute = float(jnp.max(jnp.abs(mine[0] - plain[0])))
    del mine, plain
    pairs = [tuple(seconds(run, arguments) for run in runs) for _ in range(ROUNDS)]
    print(f"vocabulary {VOCABULARY:,}, width {WIDTH:,}, float32, forward and backward")
    for index, name in enumerate(("ours", "naive")):
        print(
            f"  {name:6} {memory[name] / 2**30:6.2f} GiB temporary at {LONG:,} tokens,"
            f" {median(pair[index] for pair in pairs):6.2f} s at {SHORT}"
        )
    print(f"  largest difference: log-probs {absolute:.1e}, with gradients {error:.1e} relative")
    figures = {
        "memory_ratio": memory["ours"] / memory["naive"],
        "max_abs_error": absolute,
        "max_relative_error": error,
        "speed.ratio": median(b / a for a, b in pairs),
    }
    report("logprobs", figures)


if __name__ == "__main__":
    main()
