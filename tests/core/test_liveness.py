"""Signs of life: a service that does not answer once is asked again."""

import os
import subprocess
import sys
import threading

from opd_jax.core import liveness
from opd_jax.core.liveness import Liveness


class Service:
    """Fails at its second call, and says at the fourth that it is over."""

    def __init__(self, over):
        self.calls, self.over = 0, over

    def key_value_set(self, *_, **__):
        self.calls += 1
        if self.calls == 4:
            self.over.set()
        if self.calls == 2:
            raise RuntimeError("UNAVAILABLE")

    def key_value_dir_get(self, _):
        return []


def watched(monkeypatch, retry_seconds):
    monkeypatch.setattr(liveness, "SIGN_SECONDS", 0.01)
    monkeypatch.setattr(liveness, "RETRY_SECONDS", retry_seconds)
    process = object.__new__(Liveness)  # without a thread: none of jax.distributed is here
    process._rank, process._sign, process._over = 1, "opd_jax/alive/1 here", threading.Event()
    process._client = Service(process._over)
    process._watch()
    return process._client.calls


def test_a_call_that_fails_once_does_not_end_the_signs(monkeypatch):
    assert watched(monkeypatch, 20.0) == 4


def test_a_service_that_stays_away_does(monkeypatch):
    assert watched(monkeypatch, 0.0) == 2


def test_a_process_ends_although_nobody_reads_what_it_says():
    code = (
        "import os, sys, threading\n"
        "from opd_jax.core.liveness import Liveness\n"
        "process = object.__new__(Liveness)\n"
        "process._rank, process._sign, process._sentry = 1, 'one', None\n"
        "process._over = threading.Event()\n"
        "class Service:\n"
        "    key_value_set = lambda *_, **__: None\n"
        "    key_value_dir_get = lambda *_: [('verdict', '4 process 0 (a) is gone')]\n"
        "process._client = Service()\n"
        "process._watch()\n"
        "os._exit(9)\n"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=write, check=False)
    os.close(write)
    assert done.returncode == liveness.LOST
