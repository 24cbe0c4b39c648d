"""Writing and reading a rollout store, ArrayRecord beside it.

    python benchmarks/store.py

4,096 records of 64 prompt and about 4,000 response tokens (16 million in all), through the public
writer and reader: every check, digest and checksum is in the figures. Reads are of 32 records at
random places; `remote` reads the same store through a loopback object server that answers 30 ms
after each request, `--ahead` batches at a time, as a loader reads ahead. ArrayRecord holds the same
arrays, one record each, written and read by its own library, without the store's digests. The
loader's figures are `train.sources.offline_source` with its two threads, records and scores
together. `cold` is a process that opens the store and reads one batch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
from common import report

RECORDS, PROMPT, RESPONSE, BATCH = 4096, 64, 4000, 32
LATENCY_MS = 30
AHEAD = 8


def records():
    """Ids skewed as words are, log-probs as a student's are."""
    from opd_jax.data.records import Record

    rng = np.random.default_rng(0)
    found = []
    for number in range(RECORDS):
        length = int(rng.integers(RESPONSE // 2, RESPONSE * 3 // 2))
        ids = (rng.zipf(1.1, PROMPT + length) % 151_936).astype(np.int32)
        logprob = -rng.exponential(0.5, length).astype(np.float32)
        found.append(Record(f"p{number:06d}", 0, ids[:PROMPT], ids[PROMPT:], logprob, "stop"))
    return found


def tokens_of(found):
    return sum(len(record.response_ids) for record in found)


def write(root, found):
    """Seconds to write and freeze."""
    from opd_jax.data.store import create_store

    start = time.perf_counter()
    store = create_store(root, {})
    with store.writer() as writer:
        for record in found:
            writer.append(record)
    store.freeze()
    return time.perf_counter() - start


def write_array_record(path, found):
    """Seconds for the same arrays in one ArrayRecord file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    start = time.perf_counter()
    writer = ArrayRecordWriter(str(path), "group_size:1,zstd:1")
    for record in found:
        arrays = (record.prompt_ids, record.response_ids, record.student_logprob)
        writer.write(b"".join(array.tobytes() for array in arrays))
    writer.close()
    return time.perf_counter() - start


def random_batches(rounds):
    rng = np.random.default_rng(1)
    return [rng.integers(0, RECORDS, BATCH).tolist() for _ in range(rounds)]


def read(root, rounds, ahead=1):
    """Response tokens per second."""
    from opd_jax.data.store import open_store

    store = open_store(root)
    snapshot = store.open_snapshot(store.files.names("snapshots/")[0])
    snapshot.read_many(range(BATCH))
    with ThreadPoolExecutor(ahead) as pool:
        start = time.perf_counter()
        batches = list(pool.map(snapshot.read_many, random_batches(rounds)))
        seconds = time.perf_counter() - start
    return sum(map(tokens_of, batches)) / seconds


def read_array_record(path, rounds):
    """Tokens per second, decoded to arrays."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    start, tokens = time.perf_counter(), 0
    for batch in random_batches(rounds):
        for raw in reader.read(batch):
            values = np.frombuffer(raw, np.int32)
            length = (len(values) - PROMPT) // 2
            tokens += len(values[PROMPT : PROMPT + length].copy())
            values[PROMPT + length :].view(np.float32).copy()
    return tokens / (time.perf_counter() - start)


def load(root, rounds):
    """Response tokens per second of training batches: records and scores, packed."""
    from opd_jax.config_train import TrainRun
    from opd_jax.data.records import Scores
    from opd_jax.data.store import open_store
    from opd_jax.train.sources import Packing, offline_source

    store = open_store(root)
    snapshot = store.open_snapshot(store.files.names("snapshots/")[0])
    scores = store.create_pass("t", {})
    lengths = snapshot.lengths()[1]
    if not scores.committed_records(snapshot):
        rng = np.random.default_rng(2)
        with scores.writer(snapshot) as writer:
            for index, length in enumerate(lengths.tolist()):
                writer.append(index, Scores(-rng.exponential(0.5, length).astype(np.float32)))
    run = TrainRun(batch_size=BATCH, steps=rounds + 1)
    packing = Packing.of(run, int(sum(snapshot.lengths()).max()), 1, 0)
    source = offline_source(snapshot, scores, range(len(snapshot)), run, packing, 0)
    next_batch = source.start(0)
    next_batch(0, dict)
    start = time.perf_counter()
    tokens = sum(int(next_batch(step, dict)["mask_bt"].sum()) for step in range(1, rounds + 1))
    return tokens / (time.perf_counter() - start)


def remote(folder, rounds, ahead):
    """`read` of the folder's store through the slow object server."""
    server = Path(__file__).with_name("object_server.py")
    command = [sys.executable, str(server), str(folder), str(LATENCY_MS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = int(process.stdout.readline())
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
            return read("s3://bucket/store", rounds, ahead)
        finally:
            process.terminate()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--ahead", type=int, default=AHEAD)
    given = parser.parse_args()
    # Before the first store is opened: all share one set of credentials.
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    found = records()
    tokens = tokens_of(found)
    writes, reads, their_writes, their_reads = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(given.rounds):
            root, path = folder / f"store{number}", folder / f"{number}.array_record"
            writes.append(tokens / write(root, found))
            their_writes.append(tokens / write_array_record(path, found))
            reads.append(read(root, given.batches))
            their_reads.append(read_array_record(path, given.batches))
        (folder / "remote").mkdir()
        (folder / "store0").rename(folder / "remote" / "store")
        size = sum(p.stat().st_size for p in (folder / "remote").rglob("*") if p.is_file())
        their_size = (folder / "0.array_record").stat().st_size
        distant = [remote(folder / "remote", given.batches, given.ahead) for _ in range(3)]
        loader = load(folder / "remote" / "store", given.batches)
    figures = {
        "write.mtok_per_second": median(writes) / 1e6,
        "read.mtok_per_second": median(reads) / 1e6,
        "remote.read.mtok_per_second": median(distant) / 1e6,
        "loader.mtok_per_second": loader / 1e6,
        "bytes_per_token": size / tokens,
        "array_record.write.mtok_per_second": median(their_writes) / 1e6,
        "array_record.read.mtok_per_second": median(their_reads) / 1e6,
        "array_record.bytes_per_token": their_size / tokens,
    }
    print(f"{RECORDS:,} records, {tokens:,} response tokens, {given.rounds} rounds, medians")
    for key, value in figures.items():
        print(f"  {key:36} {value:8.2f}")
    report("store", figures)


if __name__ == "__main__":
    main()
