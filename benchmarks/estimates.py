"""What `--fit` says a train step needs, against what the step takes, on this machine's CPU.

    python benchmarks/estimates.py

The OPD step of the quickstart and one of SmolLM2-135M's shapes (4 rows of 512 tokens), in float32
on one device, each in a process of its own. Estimated is what `--fit` prints as `alone`, from the
same compiled program; measured is the largest resident size while two steps run, less the resident
size before their state exists (Linux). A step of the quickstart's model with one short row has run
before, so that what a process takes once (threads, their scratch memory, code) is not counted:
no device's memory holds it. FLOPs are those that `--fit` counts, over those that the mathematics
asks for.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from common import ROOT, report
from model import SHAPE

CASES = {
    "quickstart": (),
    "smollm2": (
        *("prompts.max_prompt_tokens=128", "rollout.max_new_tokens=384"),
        *("train.runs.opd.batch_size=4", "train.runs.opd.micro_batch_size=4"),
    ),
}
SHORT = (
    *("prompts.max_prompt_tokens=16", "rollout.max_new_tokens=16"),
    *("train.runs.opd.batch_size=1", "train.runs.opd.micro_batch_size=1"),
)


def resident(field):
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since `forget`."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if field in x]
    return int(line.split()[1]) * 1024


def forget():
    """Begin anew to note the largest resident size."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(name, folder):
    """Estimated and measured bytes, FLOPs over the model's."""
    from opd_jax.config_load import load_config
    from opd_jax.fit.setup import Setup
    from opd_jax.fit.targets import parse_target
    from opd_jax.fit.training import training_draft
    from opd_jax.train.mesh_choice import mesh_of

    def draft_of(*settings):
        words = ["model.compute_dtype=float32", *settings]
        config = load_config(str(ROOT / "configs" / "quickstart.yaml"), words)
        mesh = mesh_of(config, jax.devices()[:1])
        return training_draft(Setup(config, parse_target("h100"), mesh), "train.opd")

    run(draft_of(*SHORT).lower().compile())
    student = () if name == "quickstart" else (f"model.student={folder}",)
    draft = draft_of(*student, *CASES[name])
    compiled = draft.lower().compile()
    memory = compiled.memory_analysis()
    estimated = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    flops = draft.count()
    ratio = flops / draft.model_flops
    return {"estimated": estimated, "measured": run(compiled), "flops": ratio}


def run(compiled):
    """Bytes that two steps take, their state included."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    before = resident("VmRSS")
    forget()
    state, batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), compiled.args_info[0])
    for _ in range(2):
        state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    return resident("VmHWM") - before


def main():
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    figures = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE}
            Path(folder, "config.json").write_text(json.dumps(config))
            command = [sys.executable, __file__, name, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["estimated"] / found["measured"]
        print(
            f"{name:12} estimated {found['estimated'] / 2**20:8.1f} MiB, "
            f"measured {found['measured'] / 2**20:8.1f} MiB, ratio {ratio:.3f}; "
            f"FLOPs {found['flops']:.3f} of the model's"
        )
        figures |= {f"{name}.memory_ratio": ratio, f"{name}.flops_ratio": found["flops"]}
    report("estimates", figures)


if __name__ == "__main__":
    main()
