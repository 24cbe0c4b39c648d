"""Run in a process of its own: compile attention for absent devices, print its size.

python tests/fit/compile_attention.py v5e:2x2 splash bfloat16 16384 128 packed fsdp
"""

import re
import time

import jax
import jax.numpy as jnp
from compilers import serve
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.config import MeshConfig
from opd_jax.core.mesh import make_mesh, platform_of
from opd_jax.fit.topology import devices_of
from opd_jax.model.attention_choice import AttentionCase, attend_rows, choose_attention

HEADS, KV_HEADS = 16, 4


def main(
    target: str, name: str, dtype: str, tokens: str, head_dim: str, rows: str, axis: str
) -> dict:
    t, h, packed = int(tokens), int(head_dim), rows == "packed"
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, "tensor": 2, axis: 2}), devices_of(target)[:4])
    case = AttentionCase(
        platform_of(mesh), dtype, 2, t, HEADS, KV_HEADS, h, packed=packed, mesh=mesh
    )
    wanted = name if name == "chunked" else "auto"

    def loss(q, k, v, segments):
        mixed = attend_rows(wanted, mesh, q, k, v, segments)
        return jnp.sum(mixed.astype(jnp.float32) ** 2)

    def array(heads):
        sharding = NamedSharding(mesh, PartitionSpec("fsdp", "context", "tensor"))
        return jax.ShapeDtypeStruct((2, t, heads, h), dtype, sharding=sharding)

    segments = None
    if packed:
        tokens_only = NamedSharding(mesh, PartitionSpec("fsdp", "context"))
        segments = jax.ShapeDtypeStruct((2, t), jnp.int32, sharding=tokens_only)
    start = time.monotonic()
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    compiled = step.lower(array(HEADS), array(KV_HEADS), array(KV_HEADS), segments).compile()
    program = compiled.as_text()
    return {
        "chosen": choose_attention(wanted, case),
        "devices": mesh.size,
        "seconds": round(time.monotonic() - start, 1),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "square_arrays": len(re.findall(rf"\[(?:\d+,)*{t},{t}\]", program)),
        "kernel_calls": program.count("custom-call("),
    }


if __name__ == "__main__":
    serve(main)
