"""Opens a store of ten million response tokens and reads all of it in random batches.

    python benchmarks/store_open.py

Records of 50 and of 2,000 tokens on average in one segment each, and of 2,000 in 500 segments, as a
stage that commits every 20 seconds leaves them; written first and just then, so that the operating
system still holds the files. Those of 500 segments also through an object server that answers 30 ms
late. Every figure is from a process of its own:

    open_seconds      open_store, open_snapshot and a first batch of 32 records; imports not counted
    tokens_a_second   all records, 32 at a time, in random order
    peak_megabytes    the process' largest resident memory, imports included
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import report

TOKENS, BATCH = 10_000_000, 32
CASES = {"50": (50, 1), "2000": (2000, 1), "2000.segments": (2000, 500)}
LATENCY_MS = 30


def write(root, mean, segments):
    """A store of records of about `mean` tokens; returns its snapshot's hash."""
    import numpy as np

    from opd_jax.data.records import Record
    from opd_jax.data.store import create_store

    rng = np.random.default_rng(0)
    store = create_store(root, {"benchmark": "store_open"})
    records = TOKENS // mean
    with store.writer() as writer:
        for index in range(records):
            if index and index % (records // segments) == 0:
                writer.flush()
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


def apart(root, snapshot_hash, **variables):
    """`read` in a process of its own."""
    command = [sys.executable, __file__, str(root), snapshot_hash]
    env = {**os.environ, **variables}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def distant(folder, snapshot_hash):
    """The same of `folder`/store through the slow object server."""
    server = str(Path(__file__).with_name("object_server.py"))
    command = [sys.executable, server, str(folder), str(LATENCY_MS)]
    keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            return apart("s3://bucket/store", snapshot_hash, AWS_ENDPOINT_URL=url, **keys)
        finally:
            process.terminate()


def main():
    """Write, then read in a process of its own."""
    figures = {}
    for name, (mean, segments) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "store"
            snapshot_hash = write(root, mean, segments)
            found = {name: apart(root, snapshot_hash)}
            if segments > 1:
                found[f"{name}.remote"] = distant(folder, snapshot_hash)
            for case, values in found.items():
                figures |= {f"{key}.{case}": value for key, value in values.items()}
    for key, value in figures.items():
        print(f"  {key:40} {value:14.2f}")
    report("store_open", figures)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(read(*sys.argv[1:])))
    else:
        main()
