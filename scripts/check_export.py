"""Compare an exported model in transformers with the same folder read by this project.

    pip install -e '.[parity]'
    python scripts/check_export.py runs/smollm2/export/opd_topk \\
        --prompts configs/smollm2/prompts_eval.jsonl

Prints the largest absolute difference of float32 logits over the prompts; exit code 1 above 1e-3.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

try:
    import torch
    from transformers import AutoModelForCausalLM
except ImportError:
    raise SystemExit("this comparison needs torch: pip install -e '.[parity]'") from None

from opd_jax.data.prompts import load_prompts
from opd_jax.data.tokenizer import load_tokenizer
from opd_jax.model.load import read_model

TOLERANCE = 1e-3


def differences(folder, prompts):
    """Largest absolute logit difference on each prompt, and the largest logit."""
    tokenizer = load_tokenizer(folder)
    model, params = read_model(folder)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    print({name: list(keys) for name, keys in info.items()})
    for prompt in prompts:
        ids = np.array([tokenizer.encode_chat(prompt.messages)], np.int32)
        positions = np.arange(ids.shape[1], dtype=np.int32)[None]
        hidden = model.forward(params, ids, positions).hidden_btd
        ours = np.asarray(hidden @ model.head(params).T)
        with torch.no_grad():
            want = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
        yield float(np.abs(ours - want).max()), float(np.abs(want).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=5)
    arguments = parser.parse_args()
    found = list(differences(arguments.folder, load_prompts(arguments.prompts, arguments.limit)))
    worst, size = (max(values) for values in zip(*found, strict=True))
    print(f"{len(found)} prompts: largest difference {worst:.2e}, logits up to {size:.1f}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
