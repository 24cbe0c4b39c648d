"""Runs that begin in milliseconds: forked from a process that has imported everything they need.

That process never touches a JAX backend, so no thread or lock of JAX is copied, as in
`stages/kill_rollout.py`. A run ends as any Python program does, and by any signal.
"""

import atexit
import contextlib
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys

from processes import quick_environment

MODULE = ("-m", "opd_jax.main")
LARGEST = 2**20  # bytes of a request


class Forked:
    """What a test uses of `subprocess.Popen`."""

    def __init__(self, status: int, written: list[int]) -> None:
        self._status, self._written = status, written
        self.returncode = None
        self.pid = int(self._told())

    def __del__(self) -> None:
        for file in {self._status, *self._written}:
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
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._told())
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked run", timeout or 0.0)
            self.returncode = int(self._told())
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What it wrote on standard output and on standard error, once it has ended."""
        self.wait(timeout)
        return tuple(os.pread(file, os.fstat(file).st_size, 0) for file in self._written)


def start_run(words, devices=1, *, cwd, program=MODULE, log=None, merged=True):
    """Start a run on so many fake devices.

    Args:
        program: `-m` and a module, or `-c` and what to execute.
        log: an open file, which gets all that is written; by default `communicate` returns it.
        merged: standard error goes where standard output does.
    """
    written = [] if log else [os.memfd_create("out")]
    if not (log or merged):
        written.append(os.memfd_create("err"))
    output = [log.fileno()] if log else written
    request = {
        "program": program,
        "words": [str(word) for word in words],
        "cwd": str(cwd),
        "flags": quick_environment(devices)["XLA_FLAGS"],
    }
    status, theirs = os.pipe()
    try:
        files = [output[0], output[-1], theirs]
        socket.send_fds(_parent(), [json.dumps(request).encode()], files)
    finally:
        os.close(theirs)
    return Forked(status, written)


@functools.cache
def _parent():
    """The socket of the process that runs are forked from; it ends when that is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=quick_environment(),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    atexit.register(_end, ours, process)
    return ours


def _end(ours, process):
    ours.close()
    process.wait()


def _serve(requests):
    """Fork for each request; returns, in the child alone, what to run."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running = {}
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            os.read(woken, LARGEST)
            _tell_ends(running)
        if requests in ready:
            message, files, _, _ = socket.recv_fds(requests, LARGEST, 3)
            if not message:
                sys.exit()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                requests.close()
                for file in (woken, wake, *running.values()):
                    os.close(file)
                os.dup2(files[0], 1)
                os.dup2(files[1], 2)
                for file in files:
                    os.close(file)
                return json.loads(message)
            running[pid] = files[2]
            os.write(files[2], b"%d\n" % pid)
            for file in files[:2]:
                os.close(file)


def _tell_ends(running):
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            file = running.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                os.write(file, b"%d\n" % os.waitstatus_to_exitcode(status))
            os.close(file)


def _run(request):
    kind, what = request["program"]
    os.environ["XLA_FLAGS"] = request["flags"]
    os.chdir(request["cwd"])
    sys.argv = [what if kind == "-m" else kind, *request["words"]]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    import gc

    import matplotlib.figure  # noqa: F401

    import opd_jax.main
    import opd_jax.stages.pipeline  # noqa: F401  what every run imports

    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        request = _serve(requests)
    _run(request)
