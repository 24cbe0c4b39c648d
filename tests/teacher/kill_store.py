"""Run in a process of its own: stores written and scored, undisturbed and with kills.

python tests/teacher/kill_store.py kills FOLDER    one process at a time, killed 30 times
python tests/teacher/kill_store.py pair FOLDER     two processes at once, one of them killed

Leaves FOLDER/straight and FOLDER/killed. Every child ends by itself or by SIGKILL. They are forked
from this process, which has imported everything but never opens a store or a JAX backend: so a
start costs milliseconds, and no thread or lock is copied. Compiled programs are kept on disk.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

RECORDS, PER_SEGMENT = 360, 3
KILLS, SEED, LIMIT_SECONDS = 15, 5, 1200  # so many kills of each of the two kinds of work
PASS = "teacher/t/"


def record_of(number):
    """Record `number`, the same in every process."""
    from opd_jax.data.records import Record

    rng = np.random.default_rng(number)
    prompt, response = (rng.integers(0, 64, n).astype(np.int32) for n in rng.integers(1, 30, 2))
    logprob = -rng.exponential(size=len(response)).astype(np.float32)
    return Record(f"p{number:03d}", 0, prompt, response, logprob, "length")


def write(root, told, share):
    """Writes the records of a share that are not there; tells how many are committed for sure."""
    from opd_jax.data.store import create_store

    store = create_store(root, {})
    done = {int(prompt_id[1:]) for prompt_id, _ in store.committed_keys()}
    numbers = [n for n in range(share[0], RECORDS, share[1]) if n not in done]
    with store.writer(share[0]) as writer:
        for count, number in enumerate(numbers, 1):
            writer.append(record_of(number))
            if count % PER_SEGMENT == 0:
                writer.flush()
                told(count)
    store.freeze()


def score(root, told, share):
    """Scores a share of the frozen records."""
    from models import tiny

    from opd_jax.data.store import open_store
    from opd_jax.teacher.score import Scorer
    from opd_jax.teacher.score_pass import score_snapshot

    store = open_store(root)
    snapshot, appended = store.freeze(), [0]

    def on_batch(records, tokens):
        told(appended[0])  # the batches before this one are committed
        appended[0] += records

    scoring = store.create_pass("t", {})
    scorer = Scorer(*tiny(), top_k=2, batch_tokens=64)
    score_snapshot(scorer, snapshot, scoring, on_batch, 0.0, share)


def read_for_ever(root, told, straight):
    """Reads whatever is committed, again and again, until an error or its parent's end."""
    from opd_jax.data.store import open_store

    wanted = [record_digest_of(record_of(number)) for number in range(RECORDS)]
    whole = open_store(straight)
    scores = whole.open_pass("t").read_many(whole.freeze(), range(RECORDS))
    before, scored_before = set(), 0
    parent = os.getppid()
    while os.getppid() == parent:
        if not (root / "commits").exists():
            continue
        store = open_store(root)
        keys = store.committed_keys()
        assert before <= keys, "records were lost"
        before = keys
        snapshot = store.freeze()
        snapshot.verify()
        assert keys <= set(snapshot.keys)
        numbers = [int(prompt_id[1:]) for prompt_id, _ in snapshot.keys]
        records = snapshot.read_many(range(len(snapshot)))
        assert [record_digest_of(r) for r in records] == [wanted[n] for n in numbers]
        scored = []
        if (root / PASS / "commits").exists():
            scoring = store.open_pass("t")
            scored = sorted(scoring.committed_records(snapshot))
            assert scored_before <= len(scored), "scores were lost"
            scored_before = len(scored)
            scoring.verify(snapshot)
            for index, found in zip(scored, scoring.read_many(snapshot, scored), strict=True):
                assert same_scores(found, scores[numbers[index]])
        told(len(records) + len(scored))


def record_digest_of(record):
    from opd_jax.data.store_rows import record_digest

    return record_digest(record)


def same_scores(one, other):
    names = ("logprob", "topk_ids", "topk_logprob", "topk_rest")
    return all(getattr(one, n).tobytes() == getattr(other, n).tobytes() for n in names)


class Child:
    """A forked process that does `work(root, told, argument)`; what it tells comes back."""

    def __init__(self, work, root, argument):
        self._pipe, end = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(end)
            os.set_blocking(self._pipe, False)
            self._told = b""
            return
        code = 1
        try:
            work(root, lambda count: os.write(end, b"%d\n" % count), argument)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def told(self):
        """Every number told so far."""
        try:
            while data := os.read(self._pipe, 65536):
                self._told += data
        except BlockingIOError:
            pass
        return [int(line) for line in self._told.split()]

    def finish(self):
        self.told()
        os.set_blocking(self._pipe, True)
        told = self.told()
        _, status = os.waitpid(self.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        return told

    def kill(self):
        """SIGKILL; returns everything it had told."""
        assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), "over before the kill"
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return self.told()


def commits(root, base=""):
    """How many segments are committed below a base, without opening the store."""
    folder = root / base / "commits"
    return sum(name.endswith(".json") for name in os.listdir(folder)) if folder.exists() else 0


def records(root, base=""):
    """How many records those segments hold."""
    found = (root / base / "commits").glob("*.json")
    return sum(json.loads(commit.read_bytes())["records"] for commit in found)


def orphans(root, base=""):
    """How many segments were begun and never committed."""
    return len(os.listdir(root / base / "data")) - commits(root, base)


def await_commits(child, root, base, wanted):
    deadline = time.monotonic() + LIMIT_SECONDS
    while commits(root, base) < wanted:
        assert os.waitpid(child.pid, os.WNOHANG) == (0, 0), "over before the kill"
        assert time.monotonic() < deadline, "never began"
        time.sleep(0.0005)


def await_reading(reader, wanted):
    """Wait until the reader has read so many records and scores at once."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while max(reader.told(), default=0) < wanted:
        assert os.waitpid(reader.pid, os.WNOHANG) == (0, 0), "the reader ended"
        assert time.monotonic() < deadline, "never read everything"
        time.sleep(0.01)


def timed(work, root, base):
    """Does the work undisturbed; returns the seconds that a segment takes."""
    child = Child(work, root, (0, 1))
    await_commits(child, root, base, 1)
    started = time.monotonic()
    child.finish()
    return (time.monotonic() - started) / commits(root, base)


def kill_many(work, root, base, segment_seconds):
    """Kills the work at random moments of one segment or another; returns what each kill left."""
    moments, left = random.Random(SEED), []
    for _ in range(KILLS):
        before, torn = (records(root, base), orphans(root, base)) if left else (0, 0)
        child = Child(work, root, (0, 1))
        wanted = commits(root, base) + moments.randint(1, 6)
        await_commits(child, root, base, wanted)
        ready = time.monotonic() + moments.uniform(0, 1.5 * segment_seconds)
        while time.monotonic() < ready and commits(root, base) <= wanted:  # it may be faster now
            time.sleep(0.0005)
        told = child.kill()
        after = records(root, base)
        assert after >= before + max(told, default=0), "a committed record was lost"
        left.append({"records": after, "orphans": orphans(root, base) - torn})
    Child(work, root, (0, 1)).finish()
    return left


def kills(folder):
    straight, killed = folder / "straight", folder / "killed"
    seconds = [timed(work, straight, base) for work, base in WORK]
    reader = Child(read_for_ever, killed, straight)
    try:
        left = [
            kill_many(work, killed, base, each)
            for (work, base), each in zip(WORK, seconds, strict=True)
        ]
        await_reading(reader, 2 * RECORDS)
    finally:
        read = reader.kill()
    return {"writing": left[0], "scoring": left[1], "read": read}


def pair(folder):
    """Two children, a share each: one is killed and started again while the other goes on."""
    straight, killed = folder / "straight", folder / "killed"
    torn = {}
    for work, base in WORK:
        Child(work, straight, (0, 1)).finish()
        first, second = (Child(work, killed, (index, 2)) for index in range(2))
        await_commits(second, killed, base, 12)
        second.kill()
        again = Child(work, killed, (1, 2))
        torn[work.__name__] = orphans(killed, base)
        assert os.waitpid(first.pid, os.WNOHANG) == (0, 0), "over before the other's kill"
        again.finish()
        first.finish()
    return torn


WORK = ((write, ""), (score, PASS))


def main(action, folder):
    import models  # noqa: F401  what the children import

    import opd_jax.data.store
    import opd_jax.teacher.score_pass  # noqa: F401

    print(json.dumps({"kills": kills, "pair": pair}[action](folder)))


if __name__ == "__main__":
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(Path(sys.argv[2], "programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1], Path(sys.argv[2]))
