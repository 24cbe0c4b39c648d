"""Compiled for absent devices: the paper's models at the paper's lengths, and a peer's step.

    python benchmarks/fit.py
    pip install -e '.[fit]' && python benchmarks/fit.py --compile
    python benchmarks/fit.py --compile --again --only v5e-64.qwen3_8b "4B on 8 x H100"

`--compile` compiles the rows that `benchmarks/fit_rows.json` does not have yet (minutes each, on
one core) and adds each when it is done; without it, the table is printed from there.

Each row is one program of a config of `configs/`, compiled by `--fit` in a process of its own: 256
rows of 1,024 prompt and 4,096 response tokens in micro-batches of one row a device, scoring of
batches of one such row a device, decoding of 64 slots of 4,096 tokens. GiB is what the program
alone takes of a device: arguments, temporaries and outputs less aliases; `needed` adds what lies
beside it; a model is its `config.json`. Of the online run it is the program that leaves least of
sampling, scoring and training, with all that the run keeps loaded beside it.

Beside it the pretraining step of MaxText 0.2.5 at one sequence of 4,096 tokens a device, with full
rematerialisation and flash attention: arguments and temporaries, as compiled for the same slices
(`PEER`; it needs an environment of its own, so these three are numbers here). Our OPD step has the
same shapes, and float32 moments as it has.

There are rows for other devices that `--fit` knows, for several slices, several nodes and rows of
32,768 tokens, too; what is not recorded yet is not printed.

The other rows `*.qwen3_8b` are the same step on more and more devices: how memory and bytes sent
of a device change from one slice to the next is printed below the table, and what grows by more
than a tenth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

from common import ROOT, report

DENSE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
MODELS = {
    "4b": {**DENSE, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "8b": {**DENSE, "hidden_size": 4096, "intermediate_size": 12288},
    "32b": {
        **DENSE,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
    },
    "30b_a3b": {
        **DENSE,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
"""From the models' published `config.json`."""
PAIRS = {
    "qwen3_4b": ("4b", "8b"),
    "qwen3_8b": ("8b", "32b"),
    "qwen3_30b_a3b": ("30b_a3b",) * 2,
    "qwen3_30b_a3b_online": ("30b_a3b",) * 2,
}
PEER = {"v5e-64.qwen3_8b": 6.29, "v5e-32.qwen3_8b": 8.09, "v5p-32.qwen3_30b_a3b": 34.9}
"""GiB of a device."""


def step(target, config, rows, *more):
    """The OPD step at the paper's lengths, with so many rows a micro-batch."""
    return target, config, "train", (f"train.runs.opd.micro_batch_size={rows}", *more)


def peer(target, config, devices):
    """The OPD step at the peer's shapes."""
    run = "train.runs.opd"
    return (
        *(target, config, "train"),
        (
            "rollout.max_new_tokens=3072",
            f"{run}.batch_size={devices}",
            f"{run}.micro_batch_size={devices}",
            f"{run}.optim.moments=float32",
        ),
    )


SCALING = {
    "v5e": {chips: f"v5e-{chips}" for chips in (16, 32, 64, 128, 256)},
    "v5p": {cores // 2: f"v5p-{cores}" for cores in (32, 64, 128, 256, 512, 1024)},
}
"""Chips to the slice's name."""
ONLINE = "30B-A3B online, 8 x H100"
ROWS = {
    "v5p-32.qwen3_30b_a3b": peer("v5p-32", "qwen3_30b_a3b", 16),
    "4B on 8 x H100": step("h100:8", "qwen3_4b", 8),
    "4B on v5e-16": step("v5e-16", "qwen3_4b", 16),
    "8B on 8 x H100": step("h100:8", "qwen3_8b", 8),
    "8B on 8 x A100-80": step("a100-80:8", "qwen3_8b", 8),
    "8B on v5e-32": step("v5e-32", "qwen3_8b", 32),
    "8B on v5p-16": step("v5p-16", "qwen3_8b", 8),
    "30B-A3B on 8 x H100": step("h100:8", "qwen3_30b_a3b", 8),
    "30B-A3B on v5p-32": step("v5p-32", "qwen3_30b_a3b", 16),
    "8B on 16 x H100": step("h100:16", "qwen3_8b", 16),
    "8B on 8 x H200": step("h200:8", "qwen3_8b", 8),
    "8B on 8 x B200": step("b200:8", "qwen3_8b", 8),
    "4B on 8 x A100-40": step("a100-40:8", "qwen3_4b", 8),
    "8B on v6e-16": step("v6e-16", "qwen3_8b", 16),
    "8B on v4-32": step("v4-32", "qwen3_8b", 16),
    "8B on 2 x v5e-64": step("2xv5e-64", "qwen3_8b", 128),
    # A row of 32,768 tokens on four devices.
    "8B, 32k, on v5p-32": step(
        *("v5p-32", "qwen3_8b", 4, "mesh.fsdp=4", "mesh.context=4", "rollout.max_new_tokens=31744")
    ),
    ONLINE: ("h100:8", "qwen3_30b_a3b_online", "rollout,score,train", ()),
    **{
        f"{what} on {shown}": (
            target,
            "qwen3_8b",
            stage,
            (*rows, "model.param_dtype=bfloat16", *more),
        )
        for what, stage, more in (
            ("32B scoring", "score", ("score.batch_tokens={tokens}",)),
            ("8B decoding", "rollout", ("rollout.max_new_tokens=3072",)),
        )
        for shown, target, rows in (
            ("8 x H100", "h100:8", ()),
            # A mesh has to suit the training that it is chosen with.
            ("v5e-16", "v5e-16", ("train.runs.opd.micro_batch_size=16",)),
        )
    },
    **{
        f"{target}.qwen3_8b": peer(target, "qwen3_8b", chips)
        for slices in SCALING.values()
        for chips, target in slices.items()
    },
}
RECORDS = ROOT / "benchmarks" / "fit_rows.json"
COLUMNS = {
    "gib": "GiB",
    "needed": "needed",
    "free": "free",
    "ratio": "FLOPs",
    "sent": "sent",
    "step": "step s",
    "compile": "compiled",
}


def compile_row(name, folder):
    """The program of a row: as `--fit` finds it."""
    from opd_jax.config_load import load_config
    from opd_jax.fit.driver import judge
    from opd_jax.fit.targets import parse_target

    target, config, stage, more = ROWS[name]
    devices = parse_target(target).count
    # Every batch has to fit the mesh.
    more = (*more, f"sft.batch_size={max(devices, 128)}", f"sft.micro_batch_size={devices}")
    student, teacher = (folder / model for model in PAIRS[config])
    models = (f"model.student={student}", f"model.teacher={teacher}", f"run_dir={folder}")
    settings = [word.format(tokens=5120 * devices) for word in more]
    loaded = load_config(str(ROOT / "configs" / f"{config}.yaml"), [*models, *settings])
    found = judge(loaded, target, stage.split(","))
    if name == ONLINE:
        return found, min(found.programs, key=lambda program: program.free_bytes)
    return found, found.programs[-1]  # of sampling: decoding


def figures(found, program):
    """What the table shows of a program."""
    sent = sum(x.sent_bytes for x in program.collectives)
    return {
        "gib": program.peak_bytes / 2**30,
        "needed": program.needed_bytes / 2**30,
        "free": program.free_bytes / 2**30,
        "ratio": program.flops / program.model_flops,
        "sent": sent / 2**30,
        "step": program.time.seconds if program.time else float("nan"),
        "compile": program.compile_seconds,
        "parts": {name: size / 2**30 for name, size in program.parts.items()},
        "sent_by": {f"{x.kind} {x.axes}": x.sent_bytes / 2**30 for x in program.collectives},
    }


def versions():
    """Of the compilers, and of this project: to be asked before a row is compiled."""
    revision = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(revision, capture_output=True, text=True, check=False)
    found = {name: version(name) for name in ("jax", "libtpu", "jax-cuda12-plugin")}
    return {**found, "revision": done.stdout.strip()}


def recorded():
    """Rows compiled so far: name -> figures."""
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def record(name, row):
    """Add a row; never half a file."""
    known = recorded() | {name: row}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(known[key])}" for key in sorted(known))
    RECORDS.with_suffix(".new").write_text(f"{{\n{lines}\n}}\n")
    RECORDS.with_suffix(".new").replace(RECORDS)


def compile_rows(names, keep):
    """Compile, and record each row when it is done."""
    with tempfile.TemporaryDirectory() as scratch:
        for model, config in MODELS.items():
            (Path(scratch) / model).mkdir()
            (Path(scratch) / model / "config.json").write_text(json.dumps(config))
        for name in names:
            made_by = versions()
            found, program = compile_row(name, Path(scratch))
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                text = json.dumps(found.to_json(), indent=1)
                (keep / f"{name.replace(' ', '_')}.json").write_text(text)
            record(name, figures(found, program) | {"problem": program.problem[:60], **made_by})


def print_scaling(rows):
    """Memory and bytes sent of a device, over those of the slice before."""
    for slices in SCALING.values():
        have = [name for name in slices.values() if f"{name}.qwen3_8b" in rows]
        for before, after in itertools.pairwise(have):
            old, new = (rows[f"{name}.qwen3_8b"] for name in (before, after))
            print(f"{before} -> {after}: memory x {new['gib'] / old['gib']:.2f}, "
                  f"sent x {new['sent'] / old['sent']:.2f}")  # fmt: skip
            for total, by in (("gib", "parts"), ("sent", "sent_by")):
                if new[total] > 1.1 * old[total] and by in new and by in old:
                    grown = {key: new[by][key] - old[by].get(key, 0) for key in new[by]}
                    most = max(grown, key=lambda key: grown[key])
                    print(f"  grows most: {most}, by {grown[most]:.2f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--compile", action="store_true", help="compile rows that are not recorded")
    parser.add_argument("--again", action="store_true", help="and those that are")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="every row's fit.json")
    arguments = parser.parse_args()
    if arguments.compile:
        known = {} if arguments.again else recorded()
        compile_rows([name for name in arguments.only if name not in known], arguments.keep)
    told, rows = {}, recorded()
    print(" " * 24 + "".join(f"{head:>9}" for head in COLUMNS.values()))
    for name in (name for name in arguments.only if name in rows):
        row = {key: rows[name][key] for key in COLUMNS}
        values = "".join(f"{value:9.2f}" for value in row.values())
        peer_gib = f"  peer {PEER[name]}" if name in PEER else ""
        print(f"{name:24}{values}{peer_gib}  {rows[name]['problem']}".rstrip())
        told |= {f"{name}.{key}".replace(" ", "_"): value for key, value in row.items()}
    print_scaling(rows)
    report("fit", told)


if __name__ == "__main__":
    main()
