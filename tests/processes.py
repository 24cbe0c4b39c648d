"""Python programs in processes of their own."""

import os
import socket
import subprocess
import sys

JOIN = """
import sys, jax, jax.experimental.multihost_utils
folder, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
"""

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


def run_two(code, folder):
    """What each of two processes prints that JAX joins; they know `folder` and their `rank`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", JOIN + code, str(folder), port]
    ranks = [subprocess.Popen([*command, rank], stdout=subprocess.PIPE, text=True) for rank in "01"]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    return outputs
