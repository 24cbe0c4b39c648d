"""Python programs in processes of their own."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

JOIN = """
import sys, jax, jax.experimental.multihost_utils
folder, port, rank, said = sys.argv[1], sys.argv[2], int(sys.argv[3]), open(sys.argv[4], "w")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
def say(*words):
    print(*words, file=said, flush=True)
"""

LIMIT_SECONDS = 1200  # of whatever must not hang: a busy machine is no error

# Tiny models spend their time in the compiler, which does the same programs with less polish.
QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def quick_environment(devices=1):
    """This process's environment, for one with so many devices that compiles as these tests do."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    if os.environ.get("OPD_JAX_OPTIMIZED"):
        return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": f"{flags} {QUICK_FLAGS}"}
    return {**os.environ, "JAX_PLATFORMS": "cpu", **quick}


def run_python(code, *arguments):
    """What a program prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def free_port():
    """A port below those that Linux gives to connections: nobody is given it before it is used."""
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_two(code, folder):
    """What each of two processes that JAX joins says; they know `folder`, their `rank` and `say`.

    It is not what they print: Gloo prints as well, in the middle of a line if it happens so.
    """
    command = [sys.executable, "-c", JOIN + code, str(folder), str(free_port())]
    with tempfile.TemporaryDirectory() as said:
        files = [Path(said, rank) for rank in "01"]
        ranks = [subprocess.Popen([*command, file.name, str(file)]) for file in files]
        try:
            assert [rank.wait(timeout=LIMIT_SECONDS) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        return [file.read_text() for file in files]
