"""The flags of `core.platform_flags` are known to the compilers."""

import subprocess
import sys

import pytest

from opd_jax.core.platform_flags import GPU_FLAGS, TPU_FLAGS
from opd_jax.fit.topology import environment

PRODUCT = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec
from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh
from opd_jax.fit.topology import devices_of

mesh = make_mesh(MeshConfig(), devices_of(sys.argv[1]))
cut = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp"))
x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=cut)
text = jax.jit(lambda a, b: a @ b).lower(x, x).compile().as_text()
sys.stdout.write(f"\\ncompiled {len(text) > 0} {mesh.size}\\n")  # at once: libraries print as well
"""
CASES = [("v5e-16", "LIBTPU_INIT_ARGS", TPU_FLAGS), ("h100:8", "XLA_FLAGS", GPU_FLAGS)]


def run(command, env):
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "variable", "flags"), CASES)
def test_every_flag_is_known_on(target, variable, flags):
    env = environment()
    assert all(f"--{name}={value}" in env.get(variable, "") for name, value in flags.items())
    command = [sys.executable, "-c", PRODUCT, target]
    done = run(command, env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = f"compiled True {16 if target == 'v5e-16' else 8}"
    assert found in done.stdout.splitlines()
    # An unknown one is refused: else the above would show nothing.
    done = run(
        command, env | {variable: f"{env.get(variable, '')} --xla_gpu_xla_tpu_not_a_flag=true"}
    )
    assert done.returncode != 0
    assert "not_a_flag" in done.stderr
