"""SmolLM2-135M's shapes, float32: sampling at temperature 1, against transformers' `generate`.

    pip install -e '.[parity]' && python benchmarks/sampling.py

Random weights that both sides read from one folder; no end token, every response has the length
that it was given. Only tokens that were asked for count.

    ragged   64 prompts of 20 to 200 tokens, responses of a long-tailed length (mean about 64, at
             most 256), 16 slots; our cache is planned for responses of any length up to 256; theirs
             in batches of 16, each of which waits for its longest row
    static   16 of those prompts, 64 tokens each: one full batch, nothing to refill
    single   one prompt of 64 tokens, 64 tokens
    first    the same prompt, one token: the time to the first token

`shared` is ours alone: 4 prompts of 300 to 500 tokens, each with 16 samples that read its keys and
values from one place, against a copy for each sample; responses as in `ragged`, 16 slots.

`slots.N` is ours alone with N prompts of 64 tokens and 64 tokens each in N slots. Its share of the
bandwidth bound compares with reading every weight once per step as fast as a plain sum reads.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from common import report
from model import SHAPE, make_model
from sides import Side, alternate, arguments, ratio, serve

BATCH, LONGEST = 16, 256
SLOTS = (1, 4, 16, 64)
SHARED = ("shared", "copied")
SAMPLES = 16  # of each prompt there
READ_FLOATS = 100 * 2**20


def work(what):
    """Prompts and the lengths of their responses, one after the other."""
    import numpy as np

    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 201, 64)
    lengths = np.clip(rng.lognormal(np.log(36), 0.9, 64).round(), 1, LONGEST).astype(int)
    if what == "static":
        sizes, lengths = sizes[:BATCH], np.full(BATCH, 64)
    elif what in ("single", "first"):
        sizes, lengths = np.array([64]), np.array([64 if what == "single" else 1])
    elif what in SHARED:
        sizes = rng.integers(300, 501, 4)
        lengths = np.resize(lengths, SAMPLES * len(sizes))
    elif what.startswith("slots"):
        count = int(what.partition(".")[2])
        sizes, lengths = np.full(count, 64), np.full(count, 64)
    prompts = [rng.integers(0, SHAPE["vocab_size"], size).astype(np.int32) for size in sizes]
    return prompts, [int(length) for length in lengths]


def ours(folder, what):
    """Continuous batching; a round returns its tokens, programs and the bytes of the cache."""
    from opd_jax.config import SamplingConfig
    from opd_jax.model.decode import split_layers
    from opd_jax.model.load import read_model
    from opd_jax.sampling import engine
    from opd_jax.sampling.plan import plan_cache
    from opd_jax.sampling.queue import Request
    from opd_jax.sampling.sampler import SamplingJob, generate, plan_for

    model, params = read_model(folder)
    prompts, lengths = work(what)
    slots = int(what.partition(".")[2] or BATCH) if what.startswith("slots") else BATCH
    each = len(lengths) // len(prompts)
    settings = [SamplingConfig(max_new_tokens=n, min_new_tokens=n) for n in lengths]
    requests = [
        Request(str(i // each), i % each, prompts[i // each], x) for i, x in enumerate(settings)
    ]
    split = split_layers(model, params)
    job = SamplingJob(model, params, SamplingConfig(slots=slots), (), 0, split=split)
    plan = plan_for(job, requests)
    if what == "ragged":  # how long each response gets is not known when pages are laid out
        unknown = SamplingConfig(max_new_tokens=LONGEST)
        plan = plan_for(job, [replace(request, sampling=unknown) for request in requests])
    assert (plan.program.pages.prompts is not None) == (what in SHARED)
    if what == "copied":
        sizes = [len(r.prompt_ids) for r in requests]
        cache = plan_cache(model, slots, sizes, lengths, lengths)
        program = replace(plan.program, pages=cache.pages)
        plan = replace(plan, program=program, cache=cache)
    cached = (engine.empty_state, engine.prefill, engine.start, engine.decode_round, split_layers)

    def sample():
        tokens = sum(len(s.token_ids) for s in generate(job, requests, plan))
        programs = sum(f._cache_size() for f in cached)
        return {"tokens": tokens, "programs": programs, "cache": plan.cache.total_bytes}

    serve(sample)


def theirs(folder, what):
    """`generate` in batches of 16, in the order of the prompts; a round returns its tokens."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Lengths(StoppingCriteria):
        """Each row ends at its own length."""

        def __init__(self, ends):
            self.ends = torch.tensor(ends)

        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] >= self.ends

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompts, lengths = work(what)

    def batch(prompts, lengths):
        width = max(map(len, prompts))
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, width - len(prompt) :] = 1
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(lengths),
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Lengths([width + n for n in lengths])]),
        )
        assert out.shape[1] == width + max(lengths)

    def sample():
        for start in range(0, len(prompts), BATCH):
            batch(prompts[start : start + BATCH], lengths[start : start + BATCH])
        return {"tokens": sum(lengths)}

    serve(sample)


def reading(_folder, _what):
    """A plain sum over 400 MiB; a round returns bytes per second, the best of five."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((READ_FLOATS // 1024, 1024))
    total = jax.jit(jnp.sum)

    def read():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            total(x).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return 4 * READ_FLOATS / min(seconds)

    serve(read)


SIDES = {"ours": ours, "theirs": theirs, "reading": reading}


def compare(folder, what, rounds):
    """One piece of work on both sides."""
    mine, other = Side(__file__, "ours", folder, what), Side(__file__, "theirs", folder, what)
    start = mine.round(warm=True)  # compiles
    alternate([mine, other], rounds)
    seconds = median(mine.seconds)
    tokens = mine.values[0]["tokens"]
    assert tokens == other.values[0]["tokens"]
    compiling, programs = start - seconds, mine.values[-1]["programs"]
    print(
        f"\n{what}: {tokens} tokens, float32, {rounds} rounds, medians; ours compiled "
        f"{programs} programs in {compiling:.1f} s, cache {mine.values[0]['cache'] / 2**20:.0f} MiB"
    )
    for name, side in (("opd_jax", mine), ("transformers", other)):
        print(
            f"  {name:12} {median(side.seconds):7.3f} s  {tokens / median(side.seconds):7.1f}"
            f" tokens/s  peak {side.peak / 2**30:5.2f} GiB"
        )
    return {
        f"{what}.ratio": ratio(mine, other),
        f"{what}.memory_ratio": mine.peak / other.peak,
        f"{what}.tokens_per_second": tokens / seconds,
        f"{what}.seconds": seconds,
        f"{what}.compile_seconds": compiling,
        f"{what}.programs": programs,
        f"{what}.peak_gib": mine.peak / 2**30,
    }


def weights():
    """Bytes that a step reads: every weight once."""
    s = SHAPE
    d, h = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"]
    layer = 2 * d * d + 2 * d * s["num_key_value_heads"] * h + 3 * d * s["intermediate_size"]
    return 4 * (s["num_hidden_layers"] * layer + s["vocab_size"] * d)


def over_slots(folder, rounds):
    """Ours alone for several numbers of slots, beside a plain sum."""
    sides = [Side(__file__, "ours", folder, f"slots.{n}") for n in SLOTS]
    top = Side(__file__, "reading", folder, "-")
    alternate([*sides, top], rounds)
    bandwidth = max(top.values)
    found = {"read.gb_per_second": bandwidth / 1e9}
    print(f"\nslots: 64 tokens each after 64, {rounds} rounds, medians; reads {bandwidth:.3g} B/s")
    for slots, side in zip(SLOTS, sides, strict=True):
        rate = side.values[0]["tokens"] / median(side.seconds)
        share = rate / slots * weights() / bandwidth
        print(f"  {slots:3} slots {rate:7.1f} tokens/s  {share:5.2f} of the bandwidth bound")
        found |= {f"slots.{slots}.tokens_per_second": rate, f"slots.{slots}.bound_share": share}
    return found


def sharing(folder, rounds):
    """Ours alone, with the keys and values of a prompt once, and with a copy in each slot."""
    shared, copied = sides = [Side(__file__, "ours", folder, what) for what in SHARED]
    alternate(sides, rounds)
    print(f"\nshared: 16 samples for each of 4 prompts, {rounds} rounds, medians")
    for what, side in zip(SHARED, sides, strict=True):
        rate = side.values[0]["tokens"] / median(side.seconds)
        print(f"  {what:6} {rate:7.1f} tokens/s  cache {side.values[0]['cache'] / 2**20:6.1f} MiB")
    return {
        "shared.ratio": ratio(shared, copied),
        "shared.cache_ratio": shared.values[0]["cache"] / copied.values[0]["cache"],
        "shared.tokens_per_second": shared.values[0]["tokens"] / median(shared.seconds),
    }


def main():
    compared = ("first", "single", "static", "ragged")
    given = arguments(__doc__, SIDES, 3, (*compared, "slots", "shared"))
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch))
        for what in compared:
            if given.only in (None, what):
                found |= compare(scratch, what, given.rounds)
        if given.only in (None, "slots"):
            found |= over_slots(scratch, given.rounds)
        if given.only in (None, "shared"):
            found |= sharing(scratch, given.rounds)
    report("sampling", found)


if __name__ == "__main__":
    main()
