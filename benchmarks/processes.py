"""The whole quickstart on two devices and on four: in one process, and in two and four.

    python benchmarks/processes.py

One after the other, each with the same seed and the same mesh; every device is a fake one on the
cores of this machine. `NAME.4x1` compares four processes of one device with one process of four:
how many responses (answers and rollouts) have other tokens, and by how much their log-probs, the
teacher's scores and the exported parameters differ at most. 0 is equality to the bit. Seconds are
those of the stages: several processes on one machine only cost.

The one process talks to itself by gloo, as several do, since a sum over four devices depends on its
order. `NAME.alone.1x4` compares it with itself as anyone would start it, adding in another one.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import ROOT, report

PROCESSES = {2: (2,), 4: (2, 4)}
"""By the devices of all processes together."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(run_dir, devices, processes, words, *, alone=False):
    """The quickstart in so many processes, which have so many devices together.

    `alone`: one process that joins nobody.
    """
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    command = [
        *(sys.executable, "-m", "opd_jax.main"),
        *("--config", str(ROOT / "configs" / "quickstart.yaml"), f"run_dir={run_dir}", *words),
    ]
    join = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes), "--rank")
    started = [
        subprocess.Popen(
            command if alone else [*command, *join, str(rank)],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=sys.stderr,
        )
        for rank in range(processes)
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"a run in {processes} processes failed")


def records_of(store):
    """A snapshot of all, and its records by their keys."""
    snapshot = store.freeze()
    found = snapshot.read_many(range(len(snapshot)))
    return snapshot, {(r.prompt_id, r.sample_index): r for r in found}


def contents(run_dir):
    """Responses with their log-probs, scores, exported parameters and seconds of a run."""
    from safetensors.numpy import load_file

    from opd_jax.data.store import open_store

    stages = {p.stem: json.loads(p.read_text()) for p in (run_dir / "stages").glob("*.json")}
    samples, scores = {}, {}
    for folder in ("answers", "rollouts"):
        store = open_store(run_dir / folder)
        snapshot, found = records_of(store)
        samples |= {(folder, *key): record for key, record in found.items()}
        if folder == "rollouts":
            scoring = store.open_pass(stages["score"]["outputs"]["pass"])
            read = scoring.read_many(snapshot, range(len(snapshot)))
            scores = dict(zip(snapshot.keys, (s.logprob for s in read), strict=True))
    exports = sorted((run_dir / "export").glob("*/model.safetensors"))
    params = {(p.parent.name, name): x for p in exports for name, x in load_file(p).items()}
    return samples, scores, params, sum(stage["seconds"] for stage in stages.values())


def largest(one, other):
    """The largest difference of arrays with the same keys and shapes."""
    assert one.keys() == other.keys()
    same = [key for key in one if one[key].shape == other[key].shape]
    return max(float(np.abs(one[key] - other[key]).max(initial=0)) for key in same)


def compare(one, other):
    """What differs between two runs' `contents`."""
    (samples, scores, params, _), (samples2, scores2, params2, _) = one, other
    assert samples.keys() == samples2.keys()
    differing = sum(
        samples[key].response_ids.tolist() != samples2[key].response_ids.tolist() for key in samples
    )
    logprobs = [{key: r.student_logprob for key, r in x.items()} for x in (samples, samples2)]
    return {
        "responses.differing": differing,
        "logprob.difference": largest(*logprobs),
        "score.difference": largest(scores, scores2),
        "parameter.difference": largest(params, params2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    parser.add_argument("--devices", type=int, choices=PROCESSES, help="only so many")
    parser.add_argument("words", nargs="*", help="settings of the config, as KEY=VALUE")
    given = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = given.keep or Path(scratch)
        for devices in [given.devices] if given.devices else PROCESSES:
            figures |= on_devices(root, devices, given.words)
    report("processes", figures)


def on_devices(root, devices, words):
    """Figures of all numbers of processes, each shown when it is there: the next may fail."""
    one = root / f"1x{devices}"
    run(one, devices, 1, words)
    wanted = contents(one)
    figures = {f"seconds.{one.name}": wanted[3]}
    print(
        f"{len(wanted[0]):,} responses; one process with {devices} devices: {wanted[3]:.0f} s",
        flush=True,
    )
    others = {f"{count}x{devices // count}": count for count in PROCESSES[devices]}
    for name, processes in {f"alone.{one.name}": 1, **others}.items():
        run(root / name, devices, processes, words, alone=processes == 1)
        found = contents(root / name)
        for key, value in (compare(wanted, found) | {"seconds": found[3]}).items():
            print(f"  {f'{key}.{name}':32} {value:10.4g}", flush=True)
            figures[f"{key}.{name}"] = value
    return figures


if __name__ == "__main__":
    main()
