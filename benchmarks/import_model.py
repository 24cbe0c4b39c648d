"""Reading a checkpoint: peak memory and speed, beside transformers.

    python benchmarks/import_model.py

Writes a random bfloat16 checkpoint of 2 billion parameters in 8 safetensors shards (4 GB, removed
at the end) and reads it on CPU in processes of their own, ours and transformers' in turn, as
bfloat16. All then add up every weight with the same NumPy call, inside the time that counts, since
a mapped file costs nothing until it is touched; the sums must agree.

`import.ratio` is their seconds over ours. On CPU transformers leaves the weights in the mapped
file, while ours are stacked and transposed into memory of their own: the third side, `copy`, reads
the bytes of the files into fresh memory and does nothing else, and `import.copy_ratio` is its
seconds over ours. `import.cpu_ratio` and `import.copy_cpu_ratio` are the same in CPU seconds, which
other work on the machine disturbs less. `import.memory_ratio` is our peak resident bytes over
theirs; `import.beyond_target_mib` how far our peak rose above what was resident before, less the
size of the parameters.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
from common import ROOT, report

SHARDS = 8
# Qwen3-1.7B with an output head of its own.
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write_checkpoint(folder):
    """The checkpoint; returns its bytes."""
    import ml_dtypes

    from opd_jax.model.hf_config import architecture_from_hf
    from opd_jax.model.hf_tensors import expected_shapes
    from opd_jax.model.safetensors_files import write_safetensors
    from opd_jax.model.transformer import LanguageModel

    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = expected_shapes(LanguageModel(architecture_from_hf(CONFIG, "benchmark")))
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    pool = np.random.default_rng(0).normal(0, 0.02, 2**22).astype(ml_dtypes.bfloat16)
    shards, seen = [{} for _ in range(SHARDS)], 0
    for name, shape in shapes.items():
        shards[SHARDS * seen // total][name] = shape
        seen += int(np.prod(shape))
    weight_map = {}
    for number, part in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        arrays = (np.resize(pool, shape) for shape in part.values())
        write_safetensors(folder / file, part, pool.dtype, arrays)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return 2 * total


def status(field):
    """Bytes of one line of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024


class AnonymousPeak(threading.Thread):
    """The largest RssAnon, looked up fifty times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0

    def run(self):
        while True:
            self.peak = max(self.peak, status("RssAnon"))
            time.sleep(0.02)


def added_up(arrays):
    """Modulo 2**16, of 16-bit words: any order gives the same."""
    return sum(int(np.sum(array.view(np.uint16), dtype=np.uint16)) for array in arrays) % 2**16


def read_ours(folder):
    import jax

    from opd_jax.model.load import read_model

    jax.devices()

    def read():
        _, params = read_model(folder, "bfloat16", "bfloat16")
        return jax.block_until_ready(params)

    return read, lambda params: [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def read_theirs(folder):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401 - not part of reading

    def read():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    return read, lambda model: [p.detach().view(torch.int16).numpy() for p in model.parameters()]


def read_copy(folder):
    def read():
        return [weights_of(path) for path in sorted(Path(folder).glob("*.safetensors"))]

    return read, lambda arrays: arrays


def weights_of(path):
    """The bytes after the header."""
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    return np.fromfile(path, np.uint8, offset=header)


SIDES = {"ours": read_ours, "theirs": read_theirs, "copy": read_copy}


def measure(side, folder):
    """Runs in a process of its own; prints what it found."""
    read, arrays_of = SIDES[side](folder)
    sampler = AnonymousPeak()
    before = status("VmRSS")
    sampler.start()
    began, cpu_began = time.perf_counter(), time.process_time()
    model = read()
    read_at = time.perf_counter()
    arrays = arrays_of(model)
    checksum = added_up(arrays)
    found = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "read_seconds": read_at - began,
        "peak": status("VmHWM"),
        "anonymous": sampler.peak,
        "target": sum(array.nbytes for array in arrays),
        "checksum": checksum,
    }
    found["beyond"] = found["peak"] - before - found["target"]
    print(json.dumps(found))


def run(side, folder):
    command = [sys.executable, __file__, "--measure", side, "--folder", str(folder)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, env=environ, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(rounds):
    """Every side in turn, the order reversed every other round."""
    needed = 5 * 10**9
    with tempfile.TemporaryDirectory() as scratch:
        if shutil.disk_usage(scratch).free < needed:
            sys.exit(f"{scratch}: less than {needed} bytes are free; set TMPDIR to another disk")
        size = write_checkpoint(Path(scratch))
        print(f"checkpoint of {size / 1e9:.2f} GB in {SHARDS} shards", file=sys.stderr)
        found = {side: [] for side in SIDES}
        for turn in range(rounds):
            for side in list(SIDES)[:: 1 if turn % 2 == 0 else -1]:
                found[side].append(run(side, scratch))
    sums = {one["checksum"] for side in found.values() for one in side}
    if len(sums) != 1 or any(one["target"] != size for one in found["ours"]):
        sys.exit(f"the sides read different weights: {sums}")
    return found


def print_table(found):
    print(f"{'':8}seconds  (reading)  of CPU  peak MiB  anonymous MiB  beyond target MiB")
    for side, rows in found.items():
        for row in rows:
            mib = {key: row[key] / 2**20 for key in ("peak", "anonymous", "beyond")}
            print(
                f"{side:8}{row['seconds']:7.2f}{row['read_seconds']:11.2f}{row['cpu_seconds']:8.2f}"
                f"{mib['peak']:10.0f}{mib['anonymous']:15.0f}{mib['beyond']:19.0f}"
            )


def figures(found):
    """Medians over the rounds; the worst round for the bound."""
    ours, theirs, copy = (
        {key: median(row[key] for row in found[side]) for key in found[side][0]} for side in SIDES
    )
    return {
        "import.ratio": theirs["seconds"] / ours["seconds"],
        "import.cpu_ratio": theirs["cpu_seconds"] / ours["cpu_seconds"],
        "import.copy_ratio": copy["seconds"] / ours["seconds"],
        "import.copy_cpu_ratio": copy["cpu_seconds"] / ours["cpu_seconds"],
        "import.memory_ratio": ours["peak"] / theirs["peak"],
        "import.beyond_target_mib": max(row["beyond"] for row in found["ours"]) / 2**20,
        "import.seconds": ours["seconds"],
        "import.cpu_seconds": ours["cpu_seconds"],
        "import.peak_mib": ours["peak"] / 2**20,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if arguments.measure:
        measure(arguments.measure, arguments.folder)
        return
    found = compare(arguments.rounds)
    print_table(found)
    report("import_model", figures(found))


if __name__ == "__main__":
    main()
