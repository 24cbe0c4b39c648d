"""SmolLM2-135M's shapes, float32: a teacher pass, against torch and transformers.

    pip install -e '.[parity]' && python benchmarks/scoring.py

256 records, prompts of 20 to 200 tokens and responses of a long-tailed length (at most 512), random
weights that both sides read from one folder. Ours is the teacher pass as the `score` stage runs it:
records come from a store, scores go into one, all checksums and digests included. Theirs scores the
same records from memory in length-sorted batches of 16, padded to the longest, and computes logits
at all positions of a batch at once. Peak memory is the largest resident size of each process.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from statistics import median

from common import report
from model import SHAPE, make_model
from sides import Side, alternate, arguments, ratio, serve

RECORDS, BATCH = 256, 16


def records():
    """Prompt and response ids."""
    import numpy as np

    rng = np.random.default_rng(0)
    prompts = rng.integers(20, 201, RECORDS)
    responses = np.clip(rng.lognormal(np.log(110), 0.8, RECORDS).round(), 1, 512).astype(int)
    pairs = zip(prompts, responses, strict=True)
    return [
        tuple(rng.integers(0, SHAPE["vocab_size"], n).astype(np.int32) for n in p) for p in pairs
    ]


def ours(folder, batch_tokens):
    """Score a store; a round returns the log-probs' sum and the share of padding."""
    import numpy as np

    from opd_jax.data.records import Record
    from opd_jax.data.store import create_store
    from opd_jax.model.load import read_model
    from opd_jax.teacher.batches import padding_share, score_batches
    from opd_jax.teacher.score import Scorer
    from opd_jax.teacher.score_pass import score_snapshot

    model, params = read_model(folder)
    scorer = Scorer(model, params, batch_tokens=int(batch_tokens))
    store = create_store(folder / "store", {})
    if not (folder / "store" / "commits").exists():
        with store.writer() as writer:
            for i, (prompt, response) in enumerate(records()):
                zeros = np.zeros(len(response), np.float32)
                writer.append(Record(f"{i:04d}", 0, prompt, response, zeros, "stop"))
    snapshot = store.freeze()
    tokens_r = sum(snapshot.lengths())
    padding = padding_share(score_batches(tokens_r, scorer), tokens_r)

    def score():
        shutil.rmtree(folder / "store" / "teacher", ignore_errors=True)
        found = store.create_pass("t", {})
        score_snapshot(scorer, snapshot, found, lambda *_: None, 60.0)
        logprobs = [s.logprob for s in found.read_many(snapshot, range(RECORDS))]
        np.save(folder / "ours.npy", np.concatenate(logprobs))
        return padding

    serve(score)


def theirs(folder, _):
    """The same in length-sorted batches; a round returns the share of padding."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = records()
    order = sorted(range(RECORDS), key=lambda i: sum(map(len, rows[i])))
    found = [np.zeros(0)] * RECORDS

    def batch(members):
        longest = max(len(p) + len(r) for p, r in (rows[i] for i in members))
        ids = torch.zeros((len(members), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(members):
            tokens = np.concatenate(rows[i])
            ids[row, : len(tokens)] = torch.from_numpy(tokens)
            mask[row, : len(tokens)] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        flat = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
        )
        logprob = -flat.reshape(len(members), -1)
        for row, i in enumerate(members):
            start = len(rows[i][0]) - 1
            found[i] = logprob[row, start : start + len(rows[i][1])].numpy()
        return ids.numel()

    def score():
        with torch.inference_mode():
            computed = sum(batch(order[i : i + BATCH]) for i in range(0, RECORDS, BATCH))
        np.save(folder / "theirs.npy", np.concatenate(found))
        return 1 - sum(len(p) + len(r) for p, r in rows) / computed

    serve(score)


def main():
    import numpy as np

    sides = {"ours": ours, "theirs": theirs}
    given = arguments(__doc__, sides, rounds=3, parts=["score"])
    tokens = sum(len(p) + len(r) for p, r in records())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        pair = [Side(__file__, "ours", folder, 8192), Side(__file__, "theirs", folder, 0)]
        alternate(pair, given.rounds)
        mine, other = (np.load(folder / f"{side}.npy") for side in sides)
    error = float(np.abs(mine - other).max())
    print(f"{RECORDS} records, {tokens:,} tokens, float32, {given.rounds} rounds, medians")
    for label, side in zip(("opd_jax", "transformers"), pair, strict=True):
        seconds = median(side.seconds)
        print(
            f"  {label:12} {seconds:8.2f} s {tokens / seconds:8.0f} tokens/s"
            f"  padding {side.values[-1]:5.1%}  peak {side.peak / 2**30:5.2f} GiB"
        )
    print(f"  largest difference of log-probs {error:.1e}")
    figures = {
        "score.ratio": ratio(*pair),
        "score.memory_ratio": pair[0].peak / pair[1].peak,
        "score.padding": pair[0].values[-1],
        "score.tokens_per_second": tokens / median(pair[0].seconds),
        "score.error": error,
    }
    report("scoring", figures)


if __name__ == "__main__":
    main()
