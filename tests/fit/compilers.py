"""Processes that compile for absent devices, asked case by case: each start takes seconds."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import jax

from opd_jax.fit.topology import environment

ANSWER = "answer: "


def serve(main):
    """A script's side: `main` of the command line's words, or of each line of standard input."""
    if sys.argv[1:]:
        print(json.dumps(main(*sys.argv[1:])))
        return
    for line in sys.stdin:
        try:
            found = main(*json.loads(line))
        except Exception:
            found = {"error": traceback.format_exc()}
        sys.stdout.write(f"\n{ANSWER}{json.dumps(found)}\n")  # at once: libraries print as well
        sys.stdout.flush()
        jax.clear_caches()


class Compilers:
    """The scripts of this folder, each in one process for every environment that it is asked in."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._ends = contextlib.ExitStack()
        self._numbers = itertools.count()
        self._running = {}
        self._known = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._ends.close()

    def __call__(self, script, *words, **given):
        """What a script finds of a case; `given` are variables that the user has set."""
        program = (script, *given.items())
        if (*program, words) not in self._known:
            self._known[*program, words] = self._ask(program, words, given)
        return self._known[*program, words]

    def _ask(self, program, words, given):
        if program not in self._running:
            self._running[program] = self._start(program[0], given)
        process, log = self._running[program]
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(words), file=process.stdin, flush=True)
        for line in process.stdout:
            if line.startswith(ANSWER):
                found = json.loads(line.removeprefix(ANSWER))
                assert "error" not in found, found["error"]
                return found
        del self._running[program]  # it is gone: another case begins another one
        raise AssertionError(log.read_text()[-3000:])

    def _start(self, script, given):
        log = self._logs / f"{next(self._numbers)}-{script}.txt"
        command = [sys.executable, str(Path(__file__).with_name(script))]
        pipe, env = subprocess.PIPE, environment({**os.environ, **given})
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, env=env, stdin=pipe, stdout=pipe, stderr=errors, text=True
            )
        return self._ends.enter_context(process), log  # at the end of its input it ends
