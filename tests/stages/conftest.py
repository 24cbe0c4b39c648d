"""What the tests of stages begin with: a trained student, or a sampler that needs no model."""

import fcntl
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from processes import quick_environment
from tiny_run import ROOT, arguments

from opd_jax.data.records import Record

TOGETHER = 3  # records of a commit


def record_of(request):
    """A response that follows from the request alone, as a sampled one does."""
    name = f"{request.prompt_id}/{request.sample_index}"
    ids = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint8).astype(np.int32) % 20
    return Record(
        request.prompt_id,
        request.sample_index,
        request.prompt_ids,
        ids,
        -ids.astype(np.float32),
        "stop",
    )


@pytest.fixture(scope="session")
def after_sft(tmp_path_factory):
    """The folder of a tiny run on one device up to SFT, made once for all workers; to be copied."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    run_dir = folder / "after_sft"
    with (folder / "after_sft.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (run_dir / "stages" / "sft.json").exists():
            words = arguments(run_dir, "--stages", "answer,sft")
            command = [sys.executable, "-m", "opd_jax.main", *words]
            done = subprocess.run(
                command, cwd=ROOT, env=quick_environment(), capture_output=True, check=False
            )
            assert done.returncode == 0, done.stderr.decode()
    return run_dir


@pytest.fixture
def instant(monkeypatch):
    """Responses come at once, in commits of three."""

    def collect(job, store, work, on_sample, flush_seconds):
        pending = work.without(work.done(store))
        with store.writer(process_index=work.share[0]) as writer:
            for number, request in enumerate(pending, 1):
                writer.append(record_of(request))
                if number % TOGETHER == 0:
                    writer.flush()

    monkeypatch.setattr("opd_jax.stages.common.collect", collect)
