"""Runs that begin in milliseconds: forked from processes that have imported everything they need.

Those never touch a JAX backend, so no thread or lock of JAX is copied, as in
`stages/kill_rollout.py`. A run ends as any Python program does, and by any signal. Runs are forked
from two of them in turn, whose hashes and addresses differ as those of any two processes do.
"""

import atexit
import contextlib
import functools
import itertools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import warnings

from processes import quick_environment

MODULE = ("-m", "opd_jax.main")
PARENTS = 2
LARGEST = 2**20  # bytes of a request
_turns = itertools.count()


class Forked:
    """What a test uses of `subprocess.Popen`."""

    def __init__(self, status: int, written: list[int]) -> None:
        self._status, self._written = status, written
        self.returncode = None
        self.pid = int(self._told())

    def __del__(self) -> None:
        if self.poll() is None:
            self.kill()
            warnings.warn(f"run {self.pid} is still running", ResourceWarning, stacklevel=2)
        for file in (self._status, *self._written):
            os.close(file)

    def _told(self) -> bytes:
        """A line, and nothing of the next one."""
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._status, 1)
            assert byte, "what runs are forked from has ended"
            line += byte
        return line

    def poll(self):
        if self.returncode is None and _readable([self._status], 0):
            self.returncode = int(self._told())
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not _readable([self._status], timeout):
                raise subprocess.TimeoutExpired("a forked run", timeout or 0.0)
            self.returncode = int(self._told())
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What is written on standard output and standard error until nobody holds them open."""
        found = dict.fromkeys(self._written, b"")
        reading, deadline = list(found), time.monotonic() + (timeout or 3600)
        while reading:
            ready = _readable(reading, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise subprocess.TimeoutExpired("a forked run", timeout or 3600)
            for file in ready:
                piece = os.read(file, 2**16)
                found[file] += piece
                if not piece:
                    reading.remove(file)
        self.wait(timeout)
        return tuple(found.values())


def _readable(files, timeout):
    return select.select(files, [], [], timeout)[0]


def start_run(words, devices=1, *, cwd, program=MODULE, log=None, merged=True):
    """Start a run on so many fake devices, with the environment that `python` would get.

    Args:
        program: `-m` and a module, or `-c` and what to execute.
        log: an open file, which gets all that is written; by default `communicate` returns it.
        merged: standard error goes where standard output does.
    """
    request = {
        "program": program,
        "words": [str(word) for word in words],
        "cwd": str(cwd),
        "environment": quick_environment(devices),
    }
    requests, jax_variables = _parent(next(_turns) % PARENTS)
    # They are read when JAX is imported, which is over.
    assert _of_jax(request["environment"]) == jax_variables
    status, *theirs = os.pipe()
    written = []
    for _ in range(0 if log else 1 if merged else 2):
        ours, its = os.pipe()
        written.append(ours)
        theirs.append(its)
    output = [log.fileno()] if log else theirs[1:]
    try:
        files = [output[0], output[-1], theirs[0]]
        socket.send_fds(requests, [json.dumps(request).encode()], files)
    except OSError:
        _parent.cache_clear()  # it is gone: the next run starts another one
        raise
    finally:
        for file in theirs:
            os.close(file)
    return Forked(status, written)


def _of_jax(environment):
    return {name: value for name, value in environment.items() if name.startswith("JAX_")}


@functools.cache
def _parent(number):
    """The socket of a process that runs are forked from, and its JAX_* variables.

    It ends when that is closed.
    """
    environment = quick_environment() | {"PYTHONHASHSEED": str(number + 1)}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    atexit.register(_end, ours, process)
    return ours, _of_jax(environment)


def _end(ours, process):
    ours.close()
    process.wait()


def _serve(requests):
    """Fork for each request; returns, in the child alone, what to run."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends it
    running = {}
    while True:
        ready = _readable([requests, woken], None)
        if woken in ready:
            os.read(woken, LARGEST)
            _tell_ends(running)
        if requests in ready:
            message, files, _, _ = socket.recv_fds(requests, LARGEST, 3)
            if not message:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                sys.exit()
            assert not xla_bridge._backends, "an import has begun to use JAX"
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                requests.close()
                for file in (woken, wake, *running.values()):
                    os.close(file)
                os.dup2(files[0], 1)
                os.dup2(files[1], 2)
                for file in files:
                    os.close(file)
                return json.loads(message)
            running[pid] = files[2]
            _tell(files[2], pid)
            for file in files[:2]:
                os.close(file)


def _tell(file, number):
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(file, b"%d\n" % number)


def _tell_ends(running):
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            file = running.pop(pid)
            _tell(file, os.waitstatus_to_exitcode(status))
            os.close(file)


def _run(request):
    kind, what = request["program"]
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = [what if kind == "-m" else kind, *request["words"]]
    sys.path[0] = request["cwd"]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    import gc

    import opd_jax.main

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    opd_jax.main._quiet_libraries()  # before they are imported, as there
    import matplotlib.figure  # noqa: F401
    from jax._src import xla_bridge

    import opd_jax.stages.pipeline  # what every run imports

    del sys.modules["opd_jax.main"]  # a run has its own
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        request = _serve(requests)
    _run(request)
