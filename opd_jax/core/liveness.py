"""Among several processes, one that is gone is noticed and named by the others, which end.

Without this they would wait in a collective, or be aborted with a stack trace. Every process leaves
signs of life with the coordination service that process 0 hosts; process 0 reads them, and tells
the others who is gone. That process 0 itself is gone is for a sentry to say, a small process beside
each of the others: JAX aborts whoever has lost the service. It also aborts whoever has waited too
long for all to join; `joining` comes before.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from typing import ClassVar, NoReturn

from jax._src import distributed  # the public module does not hand out its client

SILENT_SECONDS = 30.0
"""Who gives no sign of life for so long is given up."""
SIGN_SECONDS = 2.0
RETRY_SECONDS = 20.0
"""For so long a service that does not answer is asked again."""
LOST = 4
"""Exit code of a process that ends because another one did: the same command goes on."""
NEVER_JOINED = 1
"""That of one that ends because another one never came."""
JOIN_SECONDS, JOIN_MARGIN = 300, 15
"""Whoever has waited so long for the others is aborted by JAX, and told of it so long before."""
AGAIN = "start the same command on every host again, it goes on from here"

_SENTRY = """
import socket, sys
host, port, text = sys.argv[1:]
if not sys.stdin.read():  # the process ended without a word
    try:
        socket.create_connection((host, int(port)), 5).close()
    except OSError:
        print(text, file=sys.stderr, flush=True)
"""


class Liveness:
    """The signs of life of this process, and what is known of the others'."""

    here: ClassVar[Liveness | None] = None
    """That of this process, if it is one of several."""

    def __init__(self) -> None:
        state = distributed.global_state  # no device is touched yet: the others may never come
        assert state.client is not None
        self._client, self._rank = state.client, state.process_id
        self._sign = f"opd_jax/alive/{self._rank} {platform.node()}"
        self._over = threading.Event()
        self._seen: dict[str, tuple[str, float]] = {}
        self._sentry = None
        if self._rank > 0:
            self._sentry = _start_sentry(*str(state.coordinator_address).rsplit(":", 1))
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def failed(self, reason: str, code: int) -> NoReturn:
        """End, and let the others know why; they end with the same code."""
        self.stop(f"failed {code} {reason}")
        if self._rank == 0:
            self._publish(f"{code} process 0 ({platform.node()}) failed: {reason}")
        self._end(code)

    def await_verdict(self) -> None:
        """After an error that a lost process may have caused: end if one turns out to be gone."""
        self._thread.join(SILENT_SECONDS + 8 * SIGN_SECONDS)

    def stop(self, sign: str = "done") -> None:
        """This process ends in good order, or as its last sign says."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # the service may be gone
            self._client.key_value_set(self._sign, sign, allow_overwrite=True)
        self._dismiss_sentry()

    def _watch(self) -> None:
        signs, verdict, answered = 0, None, time.monotonic()
        while verdict is None and not self._over.wait(SIGN_SECONDS if signs else 0):
            signs += 1
            try:
                self._client.key_value_set(self._sign, str(signs), allow_overwrite=True)
                verdict = self._silent() if self._rank == 0 else self._published()
                answered = time.monotonic()
            except Exception:
                if time.monotonic() - answered > RETRY_SECONDS:
                    return  # the service is gone, JAX aborts this process, and the sentry speaks
        if verdict is not None:
            code, text = verdict.split(" ", 1)
            with contextlib.suppress(OSError):  # nobody may be there to read it
                print(f"opd_jax: error: {text}; {AGAIN}", file=sys.stderr, flush=True)
            if self._rank == 0:
                self._publish(verdict)
            self._end(int(code))  # the main thread may hang in a collective

    def _silent(self) -> str | None:
        """For process 0: who failed, or has given no sign for too long; with an exit code."""
        now = time.monotonic()
        for key, sign in self._client.key_value_dir_get("opd_jax/alive/"):
            rank, host = key.rsplit("/", 1)[1].split(" ", 1)
            if sign.startswith("failed "):
                _, code, reason = sign.split(" ", 2)
                return f"{code} process {rank} ({host}) failed: {reason}"
            if sign == "done" or self._seen.get(key, ("",))[0] != sign:
                self._seen[key] = sign, now
            elif now - self._seen[key][1] > SILENT_SECONDS:
                return (
                    f"{LOST} process {rank} ({host}) is gone: no sign of life for "
                    f"{SILENT_SECONDS:.0f} s, so it was killed or its host is lost"
                )
        return None

    def _publish(self, verdict: str) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set("opd_jax/lost/verdict", verdict, allow_overwrite=True)
        time.sleep(3 * SIGN_SECONDS)  # the others read it before the service goes with this process

    def _published(self) -> str | None:
        found = self._client.key_value_dir_get("opd_jax/lost/")
        return found[0][1] if found else None

    def _end(self, code: int) -> NoReturn:
        """At once: an orderly shutdown would wait for the others."""
        self._dismiss_sentry()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)

    def _dismiss_sentry(self) -> None:
        sentry, self._sentry = self._sentry, None
        if sentry is not None and sentry.stdin is not None:
            with contextlib.suppress(OSError):
                sentry.stdin.write(b"bye")
                sentry.stdin.close()


def watch() -> None:
    """Begin, if this process is one of several."""
    if distributed.global_state.num_processes > 1:
        Liveness.here = Liveness()


@contextlib.contextmanager
def joining() -> Generator[None]:
    """While processes join, JAX's calls do not return: where some do not come, say so and end."""
    joined = threading.Event()
    threading.Thread(target=_await_others, args=(joined,), daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _await_others(joined: threading.Event) -> None:
    while distributed.global_state.client is None:  # JAX has not begun to wait
        if joined.wait(0.1):
            return
    if joined.wait(JOIN_SECONDS - JOIN_MARGIN):
        return
    line = f"opd_jax: error: {_not_all_joined()}; {AGAIN}"
    if joined.is_set():  # the last one came while this one looked
        return
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    os._exit(NEVER_JOINED)  # the main thread is in JAX's call


def _not_all_joined() -> str:
    """What this process can tell of those that did not come."""
    state = distributed.global_state
    where, why = str(state.coordinator_address), "process 0 listens there"
    if state.process_id > 0:
        try:
            host, port = where.rsplit(":", 1)
            socket.create_connection((host.strip("[]"), int(port)), 5).close()
            why = "it can be reached from here"
        except (OSError, ValueError) as error:
            why = f"it cannot be reached from here ({error})"
    return (
        f"process {state.process_id} ({platform.node()}): after {JOIN_SECONDS - JOIN_MARGIN} s not "
        f"all {state.num_processes} processes have joined at {where}; {why}; look at what the "
        "others print: one may have failed before it joined"
    )


def _start_sentry(host: str, port: str) -> subprocess.Popen[bytes]:
    text = f"opd_jax: error: process 0 ({host}) is gone: killed, or its host is lost; {AGAIN}"
    return subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _SENTRY, host, port, text],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # what ends a whole terminal or job must not end it first
    )
