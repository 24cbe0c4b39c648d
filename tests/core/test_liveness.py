"""Signs of life: a service that does not answer once is asked again."""

import os
import socket
import subprocess
import sys
import threading

from jax._src import distributed

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


def test_who_waits_in_vain_for_the_others_is_told_before_jax_aborts_it():
    code = (
        "import sys\n"
        "from opd_jax.core import distributed, liveness\n"
        "liveness.JOIN_SECONDS, liveness.JOIN_MARGIN = 20, 19\n"
        "distributed.start(sys.argv[1], 2, 1)\n"
    )
    with socket.socket() as nobody:  # bound, but it does not listen
        nobody.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{nobody.getsockname()[1]}"
        command = [sys.executable, "-c", code, where]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == liveness.NEVER_JOINED
    last = done.stderr.splitlines()[-1]
    assert last.startswith("opd_jax: error: process 1 (")
    assert f"not all 2 processes have joined at {where}; it cannot be reached from here (" in last
    assert last.endswith(liveness.AGAIN)
    assert "stack trace" not in done.stderr


def test_a_coordinator_that_answers_is_not_what_is_missing(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        state = distributed.State()
        state.process_id, state.num_processes = 2, 4
        state.coordinator_address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(distributed, "global_state", state)
        assert "it can be reached from here; look at what the others" in liveness._not_all_joined()
        state.process_id = 0
        assert "process 0 listens there" in liveness._not_all_joined()
