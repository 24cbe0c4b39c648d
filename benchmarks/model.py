"""SmolLM2-135M's shapes, float32: a training step and scoring, against torch and transformers.

    pip install -e '.[parity]' && python benchmarks/model.py

Batch 4 x 512, random weights that both sides read from one folder. The step is the sampled-token
objective with AdamW and clipping, over the whole batch at once; ours keeps no more of a layer than
its input (`remat: full`), theirs is one fused cross-entropy with weights (its loss is the same
number, printed beside; `accumulated.*` is against theirs by micro-batches of one sequence, which is
slower and takes less memory). Peak memory is the
largest resident size of each process, from its start to its end. `ceiling_share` is the rate
of matrix products in the step or pass over that of one large product measured in the same call.
`compile.depth_ratio` is the seconds to compile the step with 48 layers over those with 4.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from common import report
from sides import Side, alternate, arguments, ratio, serve

BATCH, LENGTH, PROMPT = 4, 512, 64
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
LEARNING_RATE = 1e-5


def example():
    """Token ids, teacher log-probs and the target mask, as numpy arrays."""
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SHAPE["vocab_size"], (BATCH, LENGTH + 1))
    teacher = rng.uniform(-14, -8, (BATCH, LENGTH)).astype(np.float32)
    mask = np.ones((BATCH, LENGTH), bool)
    mask[:, :PROMPT] = False
    return tokens, teacher, mask


def make_model(folder):
    """A Hugging Face folder with random weights."""
    import jax

    from opd_jax.model.hf_config import architecture_from_hf, architecture_to_hf
    from opd_jax.model.hf_export import _write_weights
    from opd_jax.model.transformer import LanguageModel

    arch = architecture_from_hf({"model_type": "llama", **SHAPE}, "benchmark")
    model = LanguageModel(arch)
    params = model.init(jax.random.key(0))
    _write_weights(folder, model, params)
    (folder / "config.json").write_text(json.dumps(architecture_to_hf(arch)))


def our_batch():
    """The example as the train step takes it."""
    import jax.numpy as jnp

    tokens, teacher, mask = example()
    return {
        "input_bt": jnp.asarray(tokens[:, :-1], jnp.int32),
        "target_bt": jnp.asarray(tokens[:, 1:], jnp.int32),
        "positions_bt": jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (BATCH, 1)),
        "teacher_bt": jnp.asarray(teacher),
        "sampler_bt": jnp.asarray(teacher),
        "mask_bt": jnp.asarray(mask),
        "weight_bt": jnp.asarray(mask / mask.sum(-1, keepdims=True), jnp.float32),
    }


def score_ours(folder):
    """Log-probs of the targets."""
    import jax

    from opd_jax.algo.logprobs import chosen_logprobs
    from opd_jax.model.load import read_model

    model, params = read_model(folder)
    batch = our_batch()

    @jax.jit
    def score(params, batch):
        hidden = model.forward(params, batch["input_bt"], batch["positions_bt"]).hidden_btd
        head, ids = model.head_parameter(params), batch["target_bt"][..., None]
        return chosen_logprobs(hidden, head, ids).logprob_bts

    serve(lambda: float(score(params, batch).mean()))


def train_ours(folder):
    """One optimizer step over the whole batch; layers are computed again in the backward pass."""
    from opd_jax.config_train import LoopConfig, OptimConfig
    from opd_jax.model.load import read_model
    from opd_jax.train.optimizer import make_optimizer
    from opd_jax.train.step import Objective, init_state, make_train_step

    model, params = read_model(folder)
    model = replace(model, remat="full")
    batch = our_batch()
    optimizer = make_optimizer(model, LoopConfig(optim=OptimConfig(learning_rate=LEARNING_RATE)))
    step = make_train_step(model, Objective("sampled"), optimizer, 1)
    state = init_state(model, optimizer, params)
    del params

    def train():
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    serve(train)


def ours(folder, what):
    """Our side: `train` or `score`."""
    {"train": train_ours, "score": score_ours}[what](folder)


def theirs(folder, what):
    """torch and transformers: `train`, `accumulated` (by sequence) or `score`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, teacher, mask = (torch.from_numpy(x) for x in example())
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    weight = mask / mask.sum(-1, keepdim=True)

    def logprobs(rows=slice(None)):
        logits = model(input_ids=inputs[rows], use_cache=False).logits
        flat = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets[rows].reshape(-1), reduction="none"
        )
        return -flat.reshape(-1, LENGTH)

    if what == "score":

        def score():
            with torch.inference_mode():
                return float(logprobs().mean())

        serve(score)
        return
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1
    )

    step = 1 if what == "accumulated" else BATCH

    def train():
        optimizer.zero_grad()
        total = 0.0
        for start in range(0, BATCH, step):
            rows = slice(start, start + step)
            student = logprobs(rows)
            advantage = (teacher[rows] - student.detach()).clamp(-10, 10)
            loss = -(weight[rows] * advantage * student).sum() / BATCH
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    serve(train)


def ceiling(_folder, _what):
    """One large float32 product in JAX; a round is 8 of them."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2048, 2048))
    product = jax.jit(lambda x: x @ x)

    def rounds():
        for _ in range(8):
            product(x).block_until_ready()

    serve(rounds)


def compiling(_folder, what):
    """Seconds to lower and compile the step with `what` layers; a round compiles once."""
    import jax
    import jax.numpy as jnp

    from opd_jax.config_train import LoopConfig
    from opd_jax.model.hf_config import architecture_from_hf
    from opd_jax.model.transformer import LanguageModel
    from opd_jax.train.optimizer import make_optimizer
    from opd_jax.train.step import Objective, abstract_state, make_train_step

    shape = SHAPE | {"num_hidden_layers": int(what)}
    model = LanguageModel(
        architecture_from_hf({"model_type": "llama", **shape}, "benchmark"), remat="full"
    )
    optimizer = make_optimizer(model, LoopConfig())
    ints = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    floats = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.float32)
    batch = dict.fromkeys(("input_bt", "target_bt", "positions_bt"), ints)
    batch |= dict.fromkeys(("teacher_bt", "sampler_bt", "weight_bt"), floats)
    batch["mask_bt"] = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.bool_)

    def compile_once():
        jax.clear_caches()
        step = make_train_step(model, Objective("sampled"), optimizer, 1)
        step.lower(abstract_state(model, optimizer), batch).compile()

    serve(compile_once)


SIDES = {"ours": ours, "theirs": theirs, "ceiling": ceiling, "compile": compiling}


def product_flops(passes):
    """Floating-point operations in matrix products that the mathematics asks for: `passes` is 1
    forward, 3 with backward, when only targets have logits. Attention counts the causal half."""
    s = SHAPE
    d, h = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"]
    per_layer = 2 * d * d + 2 * d * s["num_key_value_heads"] * h + 3 * d * s["intermediate_size"]
    logits = 1 if passes == 1 else 1 - PROMPT / LENGTH
    weights = s["num_hidden_layers"] * per_layer + s["vocab_size"] * d * logits
    attention = s["num_hidden_layers"] * 2 * d * LENGTH / 2
    return 2 * passes * BATCH * LENGTH * (weights + attention)


def compare(script, folder, what, passes, rounds):
    """One piece of work on both sides, with the ceiling between them."""
    mine, other = Side(script, "ours", folder, what), Side(script, "theirs", folder, what)
    top = Side(script, "ceiling", folder, what)
    pieces = [Side(script, "theirs", folder, "accumulated")] if what == "train" else []
    alternate([mine, top, other, *pieces], rounds)
    peak_rate = 8 * 2 * 2048**3 / median(top.seconds)
    tokens = BATCH * LENGTH
    print(f"\n{what}: batch {BATCH} x {LENGTH}, float32, {rounds} rounds, medians")
    named = [("opd_jax", mine), ("torch", other), *(("torch by 1", side) for side in pieces)]
    for name, side in named:
        rate = product_flops(passes) / median(side.seconds)
        print(
            f"  {name:10} {tokens / median(side.seconds):7.1f} tokens/s   peak"
            f" {side.peak / 2**30:5.2f} GiB   {rate / peak_rate:5.2f} of the ceiling"
            f"   first value {side.values[0]:.5f}"
        )
    share = product_flops(passes) / median(mine.seconds) / peak_rate
    accumulated = {}
    for side in pieces:
        accumulated["accumulated.ratio"] = ratio(mine, side)
        accumulated["accumulated.memory_ratio"] = mine.peak / side.peak
    return accumulated | {
        f"{what}.ratio": ratio(mine, other),
        f"{what}.memory_ratio": mine.peak / other.peak,
        f"{what}.ceiling_share": share,
        f"{what}.tokens_per_second": tokens / median(mine.seconds),
        f"{what}.difference": abs(mine.values[0] - other.values[0]),
    }


def main():
    given = arguments(__doc__, SIDES, 5, ("train", "score", "compile"))
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch))
        for what, passes in (("score", 1), ("train", 3)):
            if given.only in (None, what):
                found |= compare(__file__, scratch, what, passes, given.rounds)
    if given.only in (None, "compile"):
        shallow, deep = Side(__file__, "compile", ".", 4), Side(__file__, "compile", ".", 48)
        alternate([shallow, deep], 3)
        found["compile.depth_ratio"] = ratio(shallow, deep)
        print(
            f"\ncompile: 4 layers {median(shallow.seconds):.1f} s, 48 {median(deep.seconds):.1f} s"
        )
    report("model", found)


if __name__ == "__main__":
    main()
