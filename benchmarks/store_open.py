"""Opens a store of ten million response tokens and reads all of it in random batches.

    python benchmarks/store_open.py

Records of 50 and of 2,000 tokens on average, in one segment each, written first and just then, so
that the operating system still holds the files. Every figure is from a process of its own:

    open_seconds      open_store, open_snapshot and a first batch of 32 records; imports not counted
    tokens_a_second   all records, 32 at a time, in random order
    peak_megabytes    the process' largest resident memory, imports included
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time

from common import report

TOKENS, MEANS, BATCH = 10_000_000, (50, 2000), 32


def write(root, mean):
    """A store of records of about `mean` tokens; returns its snapshot's hash."""
    import numpy as np

    from opd_jax.data.records import Record
    from opd_jax.data.store import create_store

    rng = np.random.default_rng(0)
    store = create_store(root, {"benchmark": "store_open"})
    with store.writer() as writer:
        for index in range(TOKENS // mean):
            ids = rng.integers(0, 150_000, int(rng.exponential(mean)) + 1).astype(np.int32)
            logprob = -rng.exponential(size=len(ids)).astype(np.float32)
            record = Record(f"p{index // 4:07d}", index % 4, ids[:20], ids, logprob, "stop")
            writer.append(record)
    return store.freeze().hash


def read(root, snapshot_hash):
    """The figures of one reader."""
    import numpy as np

    from opd_jax.data.store import open_store

    start = time.perf_counter()
    snapshot = open_store(root).open_snapshot(snapshot_hash)
    order = np.random.default_rng(0).permutation(len(snapshot))
    snapshot.read_many(order[:BATCH])
    opened = time.perf_counter()
    for first in range(0, len(order), BATCH):
        snapshot.read_many(order[first : first + BATCH])
    seconds = time.perf_counter() - opened
    with open("/proc/self/status", encoding="ascii") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return {
        "open_seconds": opened - start,
        "tokens_a_second": snapshot.lengths()[1].sum() / seconds,
        "peak_megabytes": peak / 1000,
    }


def main():
    """Write, then read in a process of its own."""
    figures = {}
    for mean in MEANS:
        with tempfile.TemporaryDirectory() as root:
            command = [sys.executable, __file__, root, write(root, mean)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            figures |= {f"{key}.{mean}": value for key, value in found.items()}
    report("store_open", figures)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(read(*sys.argv[1:])))
    else:
        main()
